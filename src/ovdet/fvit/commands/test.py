"""Test a detector: python test.py CONFIG CHECKPOINT --eval bbox [segm] [section.key=value ...]."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ovdet.commands.test import about_test, parse_test
from ovdet.data.annotations import load
from ovdet.evaluation.coco import format_table
from ovdet.fvit.assemble import load_into, load_vit, make_detector, read_config
from ovdet.results import claim
from ovdet.task import FLAGS
from ovdet.testing import test
from ovdet.vocabulary import make_vocabulary
from training.engine.distributed import init_distributed, together
from training.engine.errors import run_program
from training.engine.journal import setup_logging


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, detect and print AP. UserError for faulty input."""
    args, kinds, config = parse_test(argv, read_config)
    dist = init_distributed(args.device)
    setup_logging(dist.rank)
    with together():
        annotations = load(config, "val", masks="segm" in kinds, images=True)
        vocabulary = make_vocabulary(config, annotations)
        vit = load_vit(config)
    detector = make_detector(config, vit, vocabulary, device=dist.device, progress=dist.is_master)
    content = load_into(args.checkpoint, detector, config, vit)
    claim(args.out, config, content["detector"], vit=vit.identity["hash"])
    metrics = test(
        config, detector, annotations, vocabulary, dist=dist, kinds=kinds, folder=args.out,
        about=about_test(args, config), level=logging.DEBUG,
    )  # fmt: skip
    if dist.is_master:
        print(format_table(metrics, config.data.protocol))


def run() -> int:
    """The command line of this process; gives its exit status."""
    return run_program(main, FLAGS)
