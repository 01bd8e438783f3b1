"""Train a detector: python train.py CONFIG --work-dir DIR [--resume] [section.key=value ...]."""

from __future__ import annotations

from collections.abc import Sequence

from ovdet.commands.train import train_command
from ovdet.task import FLAGS
from ovdet.vild.assemble import read_config
from ovdet.vild.run import train
from training.engine.errors import run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and train; gives the exit status. UserError for faulty input."""
    return train_command(argv, "Train a ViLD detector, or the network that proposes regions.", read_config, train)


def run() -> int:
    """The command line of this process; gives its exit status."""
    return run_program(main, FLAGS)
