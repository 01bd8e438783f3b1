"""A training run of a detector: everything is read and checked before anything is written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ovdet.config import format_config
from ovdet.precision import choose_precision
from ovdet.task import FLAGS, DetectionTask, loop_options
from training.engine.checkpoint import read_file, seed_generators
from training.engine.distributed import Dist, together
from training.engine.errors import UserError
from training.engine.folder import open_folder, resume_after_restart
from training.engine.journal import setup_logging
from training.engine.loop import Loop

log = logging.getLogger(__name__)


def train(
    make_task: Callable[[Any, Dist, Path], DetectionTask],
    config: Any,
    dist: Dist,
    folder: Path,
    *,
    resume: bool = False,
    max_steps: int = 0,
    save_every_steps: int = 0,
) -> int:
    """One training run. Its folder holds ``config.toml``, ``train.log``, ``tensorboard/``, ``checkpoints/`` to resume
    from, and small detector files ``latest.pt`` and ``epoch_N.pt``.

    Args:
        make_task: (config, dist, folder) to what trains; every process calls it, and it may raise UserError.
        config: sections ``train`` and ``data`` are read.
        resume: go on from the newest checkpoint, where there is one.
        max_steps, save_every_steps: see :func:`ovdet.task.loop_options`.

    Returns:
        Exit status: 0 done, 75 interrupted and saved.

    Raises:
        UserError: faulty input, before anything is written.
    """
    start = resume_after_restart(folder, "latest" if resume else None, FLAGS)
    with together():
        check_former(folder, start)
    seed_generators(config.train.seed + dist.rank)
    precision = choose_precision(config.train, dist.device, training=True)
    loop = Loop(
        make_task(config, dist, folder),
        loop_options(config.train, config.data, max_steps=max_steps, save_every_steps=save_every_steps),
        dist=dist, precision=precision,
    )  # fmt: skip
    # A folder without a run in it is as good as none.
    with open_folder(folder, "auto", dist, FLAGS, {"config.toml": format_config(config)}):
        setup_logging(dist.rank, folder / "train.log" if dist.is_master else None)
        log.info("%s on %d process(es) on %s, precision %s", folder, dist.world_size, dist.device, precision.name)
        return loop.train(folder, start)


def check_former(folder: Path, start: str | None) -> None:
    """See that a folder holds no run that would be lost, or that cannot go on.

    Args:
        start: what to go on from; None for a new run.

    Raises:
        UserError: it does.
    """
    if start is None and any((folder / "checkpoints").glob("epoch_*.pt")):
        raise UserError(f"--work-dir {folder} holds a run already: give --resume to go on with it, or another folder")
    former = folder / "latest.pt"
    if former.is_file() and not (folder / "checkpoints").is_dir():
        content = read_file(former)
        if isinstance(content, dict) and "progress" in content:
            raise UserError(
                f"--work-dir {folder} holds a run of a former version, which cannot go on: its detector {former} can "
                "be tested and used; train in another folder"
            )
