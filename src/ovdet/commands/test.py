"""The command line that tests a detector, whichever it is."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ovdet.evaluation.coco import KINDS, evaluator_classes
from ovdet.results import default_folder
from training.engine.errors import UserError
from training.engine.flags import PATH, Parser


def parse_test(
    argv: Sequence[str] | None,
    read_config: Callable[[str, Sequence[str]], Any],
    extend: Callable[[Parser], Any] | None = None,
) -> tuple[Namespace, list[str], Any]:
    """(arguments, kinds of AP, config) of the command line.

    Args:
        read_config: (file, overrides) to a config.
        extend: adds arguments of one's own.

    Raises:
        UserError: faulty input, or the package that computes AP is not installed.
    """
    parser = Parser(description="Detect on the validation set and compute AP.")
    parser.add_argument("config", help="one of configs/*.toml, or your own")
    parser.add_argument("checkpoint", help="a detector file: epoch_N.pt or latest.pt")
    parser.add_argument("overrides", nargs="*", help="config values: section.key=value")
    parser.add_argument("--eval", nargs="+", default=["bbox"], metavar="KIND", help="bbox, segm, or both")
    parser.add_argument("--out", type=PATH, help="folder of results; default: by CHECKPOINT and CONFIG")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    if extend is not None:
        extend(parser)
    args = parser.parse_intermixed_args(argv)
    # "--eval bbox data.workers=0": what follows may be an override.
    kinds = [value for value in args.eval if "=" not in value]
    if not kinds or set(kinds) - set(KINDS):
        raise UserError(f"--eval {' '.join(args.eval)}: use {' or '.join(KINDS)}, or both")
    evaluator_classes()
    checkpoint = Path(args.checkpoint)
    if not checkpoint.is_file():
        raise UserError(f"checkpoint {checkpoint} does not exist: give a detector file that train.py wrote")
    config = read_config(args.config, [*args.overrides, *(value for value in args.eval if "=" in value)])
    args.out = args.out or default_folder(checkpoint, Path(args.config).stem, getattr(args, "crops", None))
    return args, kinds, config


def about_test(args: Namespace, config: Any) -> dict[str, Any]:
    """What ``metrics.json`` says of a test besides its numbers: config, checkpoint and annotations by name."""
    crops = getattr(args, "crops", None)
    return {
        "config": Path(args.config).name if args.config else "", "checkpoint": args.checkpoint,
        "annotations": config.locate(config.data.val_annotations), **({"crops": crops} if crops else {}),
        **({"ema": True} if getattr(args, "ema", False) else {}),
    }  # fmt: skip
