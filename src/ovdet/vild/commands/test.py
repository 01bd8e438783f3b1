"""Test a detector: python test.py CONFIG CHECKPOINT --eval bbox [segm] [--crops ROW] [section.key=value ...].

With ``--crops`` the teacher judges crops of the detector's boxes: "clip", "clip-objectness" (of any detector, such as
the one that proposes regions) or "text-clip" (together with the detector's own scores).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ovdet.commands.test import about_test, parse_test
from ovdet.data.annotations import load
from ovdet.evaluation.coco import format_table
from ovdet.precision import choose_precision
from ovdet.results import claim
from ovdet.sections import TrainConfig
from ovdet.task import FLAGS
from ovdet.testing import test
from ovdet.vild.assemble import learned, load_into, load_teacher, make_detector, read_config, vocabulary_table
from ovdet.vild.crop_rows import ROWS, CropJudge, test_crops
from ovdet.vild.embed import Embedder
from ovdet.vocabulary import make_vocabulary
from training.engine.distributed import init_distributed, together
from training.engine.errors import UserError, run_program
from training.engine.journal import setup_logging


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, detect and print AP. UserError for faulty input."""
    args, kinds, config = parse_test(
        argv, read_config,
        lambda parser: parser.add_argument("--crops", choices=tuple(ROWS), help="the teacher judges crops of boxes"),
    )  # fmt: skip
    if config.data.single_class and not args.crops:
        raise UserError(
            f"{args.config} is of a network that proposes regions: test it with --crops, or see its recall by "
            "make_proposals.py --split val"
        )
    if config.model.variant == "supervised" and args.crops == "text-clip":
        raise UserError("--crops text-clip needs a detector with text embeddings: give one, or --crops clip")
    dist = init_distributed(args.device)
    setup_logging(dist.rank)
    with together():
        annotations = load(config, "val", masks="segm" in kinds, images=True)
        vocabulary = make_vocabulary(config, annotations)
        teacher = load_teacher(config)
    detector = make_detector(
        config, teacher, learned(config, vocabulary), device=dist.device, trained=True, progress=dist.is_master
    )
    content = load_into(args.checkpoint, detector, config, teacher)
    if args.crops:
        teacher = teacher or load_teacher(config, needed=True)
    whose = teacher.identity["hash"] if teacher is not None else ""
    claim(args.out, config, content["detector"], teacher=whose, crops=args.crops or "")
    settings = {
        "dist": dist, "kinds": kinds, "folder": args.out, "about": about_test(args, config), "level": logging.DEBUG
    }  # fmt: skip
    if args.crops:
        table = vocabulary_table(config, teacher, vocabulary.names, device=dist.device, progress=dist.is_master)
        precision = choose_precision(TrainConfig(precision=config.teacher.precision), dist.device, training=False)
        embedder = Embedder(teacher.model, config.teacher, device=dist.device, precision=precision)
        judge = CropJudge(embedder, table, vocabulary.base_mask, config, args.crops)
        metrics = test_crops(config, detector, judge, annotations, vocabulary, **settings)
    else:
        metrics = test(config, detector, annotations, vocabulary, **settings)
    if dist.is_master:
        print(format_table(metrics, config.data.protocol))


def run() -> int:
    """The command line of this process; gives its exit status."""
    return run_program(main, FLAGS)
