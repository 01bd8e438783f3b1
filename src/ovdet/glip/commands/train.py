"""Train or tune a GLIP: python train.py CONFIG --work-dir DIR [--resume] [section.key=value ...]."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from ovdet.config import format_config
from ovdet.glip.assemble import read_config, start_model
from ovdet.glip.build import count_parameters
from ovdet.glip.config import GlipConfig
from ovdet.glip.task import BEST, FLAGS, LAST, Grounding, loop_options
from ovdet.glip.testing import open_test
from ovdet.precision import choose_precision
from training.engine.checkpoint import seed_generators
from training.engine.distributed import Dist, init_distributed, together
from training.engine.errors import UserError, run_program
from training.engine.flags import Parser
from training.engine.folder import open_folder, resume_after_restart
from training.engine.journal import setup_logging
from training.engine.loop import Loop

log = logging.getLogger(__name__)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="train.py", description="Train or tune a GLIP.")
    parser.add_argument("config", help="one of configs/*.toml, or your own")
    parser.add_argument("overrides", nargs="*", help="config values: section.key=value")
    parser.add_argument("--work-dir", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the work dir")
    parser.add_argument("--max-steps", type=int, default=0, help="end after so many steps in all (0: train.epochs)")
    parser.add_argument("--save-every-steps", type=int, default=1000, help="save inside epochs as well (0: never)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    return parser.parse_intermixed_args(argv)


def train(
    config: GlipConfig,
    work_dir: Path,
    dist: Dist,
    *,
    resume: bool = False,
    max_steps: int = 0,
    save_every_steps: int = 1000,
) -> int:
    """Check everything, then train. Returns the exit status: 0 done, 75 interrupted and saved.

    Raises:
        UserError: faulty input, before anything is written.
    """
    start = resume_after_restart(work_dir, "latest" if resume else None, FLAGS)
    with together():
        if start is None and work_dir.exists() and any(work_dir.iterdir()):
            raise UserError(f"--work-dir {work_dir} is not empty: give --resume to go on there, or another folder")
        model = start_model(config)
    seed_generators(config.train.seed + dist.rank)
    precision = choose_precision(config.train, dist.device, training=True)
    test = None
    if config.data.val_annotations and config.train.eval_every:
        test = open_test(config, model.tokenizer, model.image.divisor, dist)
    task = Grounding(config, model, test, dist, precision, work_dir)
    options = loop_options(config, max_steps=max_steps, save_every_steps=save_every_steps)
    loop = Loop(task, options, dist=dist, precision=precision)
    # A folder without a run in it is as good as none.
    with open_folder(work_dir, "auto", dist, FLAGS, {"config.toml": format_config(config)}):
        setup_logging(dist.rank, work_dir / "train.log" if dist.is_master else None)
        log.info(
            "%s: %s of %s, %d images in %s, %d process(es) on %s, %s", work_dir, config.train.mode,
            config.path or "a config", len(task.dataset), task.source, dist.world_size, dist.device, precision.name,
        )  # fmt: skip
        status = loop.train(work_dir, start)
    if status == 0 and dist.is_master:
        best = f", the best evaluated {work_dir / BEST}" if (work_dir / BEST).is_file() else ""
        log.info("the model is %s (%.1f M parameters)%s", work_dir / LAST, count_parameters(model) / 1e6, best)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says; gives the exit status. UserError for faulty input."""
    args = parse_args(argv)
    config = read_config(args.config, args.overrides)
    dist = init_distributed(args.device)
    setup_logging(dist.rank)
    return train(
        config, args.work_dir, dist, resume=args.resume, max_steps=args.max_steps,
        save_every_steps=args.save_every_steps,
    )  # fmt: skip


def run(argv: Sequence[str] | None = None) -> int:
    """:func:`main`, with its errors as an exit status, see :func:`~training.engine.errors.run_program`."""
    return run_program(lambda: main(argv), FLAGS)
