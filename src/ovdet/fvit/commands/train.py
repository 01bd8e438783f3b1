"""Train a detector: python train.py CONFIG --work-dir DIR [--resume] [section.key=value ...]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ovdet.fvit.assemble import read_config
from ovdet.fvit.run import train
from ovdet.task import FLAGS
from training.engine.distributed import init_distributed
from training.engine.errors import run_program
from training.engine.flags import Parser
from training.engine.journal import setup_logging


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and train; gives the exit status. UserError for faulty input."""
    parser = Parser(description="Train an open-vocabulary detector on a frozen ViT.")
    parser.add_argument("config", help="one of configs/*.toml, or your own")
    parser.add_argument("overrides", nargs="*", help="config values: section.key=value")
    parser.add_argument("--work-dir", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the work dir")
    parser.add_argument("--max-steps", type=int, default=0, help="end after so many steps in all (0: train.epochs)")
    parser.add_argument("--save-every-steps", type=int, default=1000, help="save inside epochs as well (0: never)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    args = parser.parse_intermixed_args(argv)
    config = read_config(args.config, args.overrides)
    dist = init_distributed(args.device)
    setup_logging(dist.rank)
    return train(
        config, dist, args.work_dir, resume=args.resume, max_steps=args.max_steps,
        save_every_steps=args.save_every_steps,
    )  # fmt: skip


def run() -> int:
    """The command line of this process; gives its exit status."""
    return run_program(main, FLAGS)
