"""The command line that trains a detector, whichever it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from training.engine.distributed import init_distributed
from training.engine.flags import NATURAL, PATH, Parser
from training.engine.journal import setup_logging


def train_command(
    argv: Sequence[str] | None,
    description: str,
    read_config: Callable[[str, Sequence[str]], Any],
    train: Callable[..., int],
) -> int:
    """Parse the command line and train; gives the exit status.

    Args:
        read_config: (file, overrides) to a config.
        train: (config, dist, folder, resume=, max_steps=, save_every_steps=) to an exit status.

    Raises:
        UserError: faulty input.
    """
    parser = Parser(description=description)
    parser.add_argument("config", help="one of configs/*.toml, or your own")
    parser.add_argument("overrides", nargs="*", help="config values: section.key=value")
    parser.add_argument("--work-dir", type=PATH, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the work dir")
    parser.add_argument("--max-steps", type=NATURAL, default=0, help="end after so many steps in all (0: train.epochs)")
    parser.add_argument("--save-every-steps", type=NATURAL, default=1000, help="save inside epochs as well (0: never)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    args = parser.parse_intermixed_args(argv)
    config = read_config(args.config, args.overrides)
    dist = init_distributed(args.device)
    setup_logging(dist.rank)
    return train(
        config, dist, args.work_dir, resume=args.resume, max_steps=args.max_steps,
        save_every_steps=args.save_every_steps,
    )  # fmt: skip
