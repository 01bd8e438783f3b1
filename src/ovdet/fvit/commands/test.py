"""Test a detector: python test.py CONFIG CHECKPOINT --eval bbox [segm] [section.key=value ...]."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ovdet.data.annotations import check_image_root, load
from ovdet.evaluation.coco import KINDS, format_table
from ovdet.fvit.assemble import load_into, load_vit, make_detector, read_config
from ovdet.task import FLAGS
from ovdet.testing import test
from ovdet.vocabulary import make_vocabulary
from training.engine.distributed import init_distributed, together
from training.engine.errors import UserError, run_program
from training.engine.flags import Parser
from training.engine.journal import setup_logging


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, detect and print AP. UserError for faulty input."""
    parser = Parser(description="Detect on the validation set and compute AP.")
    parser.add_argument("config", help="one of configs/*.toml, or your own")
    parser.add_argument("checkpoint", help="a detector file: epoch_N.pt or latest.pt")
    parser.add_argument("overrides", nargs="*", help="config values: section.key=value")
    parser.add_argument("--eval", nargs="+", default=["bbox"], metavar="KIND", help="bbox, segm, or both")
    parser.add_argument("--out", type=Path, help="folder of results.*.json and metrics.json; default: by CHECKPOINT")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    args = parser.parse_intermixed_args(argv)
    # "--eval bbox data.workers=0": what follows may be an override.
    kinds = [value for value in args.eval if "=" not in value]
    if not kinds or set(kinds) - set(KINDS):
        raise UserError(f"--eval {' '.join(args.eval)}: use {' or '.join(KINDS)}, or both")
    checkpoint = Path(args.checkpoint)
    if not checkpoint.is_file():
        raise UserError(f"checkpoint {checkpoint} does not exist: give a detector file that train.py wrote")
    config = read_config(args.config, [*args.overrides, *(value for value in args.eval if "=" in value)])
    dist = init_distributed(args.device)
    setup_logging(dist.rank)
    with together():
        annotations = load(config, "val", masks="segm" in kinds)
        check_image_root(annotations, config.locate(config.data.val_images), key="data.val_images")
        vocabulary = make_vocabulary(config, annotations)
        vit = load_vit(config)
    detector = make_detector(config, vit, vocabulary, device=dist.device, progress=dist.is_master)
    load_into(args.checkpoint, detector, config, vit)
    metrics = test(
        config, detector, annotations, vocabulary, dist=dist, kinds=kinds,
        folder=args.out or checkpoint.parent / f"{checkpoint.stem}_test", level=logging.DEBUG,
    )  # fmt: skip
    if dist.is_master:
        print(format_table(metrics, config.data.protocol))


def run() -> int:
    """The command line of this process; gives its exit status."""
    return run_program(main, FLAGS)
