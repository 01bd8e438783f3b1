"""The command line that tests a detector, whichever it is."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ovdet.evaluation.coco import KINDS
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
        UserError: faulty input.
    """
    parser = Parser(description="Detect on the validation set and compute AP.")
    parser.add_argument("config", help="one of configs/*.toml, or your own")
    parser.add_argument("checkpoint", help="a detector file: epoch_N.pt or latest.pt")
    parser.add_argument("overrides", nargs="*", help="config values: section.key=value")
    parser.add_argument("--eval", nargs="+", default=["bbox"], metavar="KIND", help="bbox, segm, or both")
    parser.add_argument("--out", type=PATH, help="folder of results.*.json and metrics.json; default: by CHECKPOINT")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    if extend is not None:
        extend(parser)
    args = parser.parse_intermixed_args(argv)
    # "--eval bbox data.workers=0": what follows may be an override.
    kinds = [value for value in args.eval if "=" not in value]
    if not kinds or set(kinds) - set(KINDS):
        raise UserError(f"--eval {' '.join(args.eval)}: use {' or '.join(KINDS)}, or both")
    checkpoint = Path(args.checkpoint)
    if not checkpoint.is_file():
        raise UserError(f"checkpoint {checkpoint} does not exist: give a detector file that train.py wrote")
    args.out = args.out or checkpoint.parent / f"{checkpoint.stem}_test"
    return args, kinds, read_config(args.config, [*args.overrides, *(value for value in args.eval if "=" in value)])
