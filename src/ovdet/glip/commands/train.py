"""Train or tune a GLIP: python train.py CONFIG --work-dir DIR [--resume] [section.key=value ...]."""

from __future__ import annotations

from collections.abc import Sequence

from ovdet.commands.train import train_command
from ovdet.glip.assemble import read_config
from ovdet.glip.run import train
from ovdet.glip.task import FLAGS
from training.engine.errors import run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and train; gives the exit status. UserError for faulty input."""
    return train_command(argv, "Train or tune a GLIP.", read_config, train)


def run(argv: Sequence[str] | None = None) -> int:
    """:func:`main`, with its errors as an exit status, see :func:`~training.engine.errors.run_program`."""
    return run_program(lambda: main(argv), FLAGS)
