"""A training run of GLIP: everything is read and checked before anything is written."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ovdet import run
from ovdet.glip.assemble import start_model
from ovdet.glip.config import GlipConfig
from ovdet.glip.task import BEST, FLAGS, LAST, Grounding
from ovdet.glip.testing import open_test
from ovdet.precision import choose_precision
from training.engine.distributed import Dist, together
from training.engine.errors import UserError

log = logging.getLogger(__name__)


def make_task(config: GlipConfig, dist: Dist, folder: Path) -> Grounding:
    """What a run trains, evaluates and writes; every process calls it. UserError for whatever does not fit."""
    with together():
        model = start_model(config)
    test = None
    if config.data.val_annotations and config.train.eval_every:
        test = open_test(config, model.tokenizer, model.image.divisor, dist)
    return Grounding(config, model, test, dist, choose_precision(config.train, dist.device, training=True), folder)


def check_folder(folder: Path, start: str | None) -> None:
    """See that the folder of a new run (``start`` is None) holds nothing. UserError where it does."""
    if start is None and folder.exists() and any(folder.iterdir()):
        raise UserError(f"--work-dir {folder} is not empty: give --resume to go on there, or another folder")


def train(config: GlipConfig, dist: Dist, folder: Path, **options: Any) -> int:
    """One training run, whose files for users are the newest and the best model; see :func:`ovdet.run.train`."""
    status = run.train(make_task, config, dist, folder, check=check_folder, flags=FLAGS, **options)
    if status == 0 and dist.is_master:
        best = f", the best evaluated {folder / BEST}" if (folder / BEST).is_file() else ""
        log.info("the model is %s%s", folder / LAST, best)
    return status
