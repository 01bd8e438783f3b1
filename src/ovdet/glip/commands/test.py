"""Test a GLIP: python test.py CHECKPOINT [--config CONFIG] [section.key=value ...]."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ovdet.commands.test import about_test
from ovdet.glip.assemble import config_for, load_model
from ovdet.glip.task import FLAGS
from ovdet.glip.testing import format_metrics, open_test
from ovdet.precision import choose_precision
from ovdet.results import claim, default_folder
from training.engine.distributed import init_distributed, together
from training.engine.errors import run_program
from training.engine.flags import PATH, Parser
from training.engine.journal import setup_logging


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="test.py", description="Detect on a validation set, and say how well.")
    parser.add_argument("checkpoint", help="a file of this program, of the published code, or of MMDetection")
    parser.add_argument("overrides", nargs="*", help="config values: section.key=value")
    parser.add_argument("--config", help="the variant and the data; default: the config in the checkpoint")
    parser.add_argument("--ema", action="store_true", help="the averaged weights in the checkpoint")
    parser.add_argument("--out", type=PATH, help="folder of results; default: by CHECKPOINT and CONFIG")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says; gives the exit status. UserError for faulty input."""
    args = parse_args(argv)
    config = config_for(args.checkpoint, args.config, args.overrides)
    dist = init_distributed(args.device)
    setup_logging(dist.rank)
    precision = choose_precision(config.train, dist.device, training=False)
    with together():
        model = load_model(config, args.checkpoint, ema=args.ema).to(dist.device)
        test = open_test(config, model.tokenizer, model.image.divisor, dist)
    named = Path(args.config).stem if args.config else None
    out = args.out or default_folder(args.checkpoint, named, "ema" if args.ema else None)
    claim(out, config, model.state_dict())
    metrics = test(model, precision, out, about_test(args, config))
    if dist.is_master:
        print(format_metrics(metrics))
    return 0


def run(argv: Sequence[str] | None = None) -> int:
    """:func:`main`, with its errors as an exit status, see :func:`~training.engine.errors.run_program`."""
    return run_program(lambda: main(argv), FLAGS)
