"""A training run of ViLD: everything is read and checked before anything is written."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ovdet import run
from ovdet.clip import Clip
from ovdet.vild.assemble import FORMAT, NOBODY, learned, learned_labels, load_teacher, make_detector
from ovdet.vild.config import VildConfig
from ovdet.vild.dataset import DistilDataset, Distilled
from ovdet.vild.embed import check_filled, check_rows, open_store
from ovdet.vild.proposals import ProposalList
from ovdet.vild.propose import recall_on_validation
from ovdet.vild.task import VildTask
from ovdet.vocabulary import Vocabulary
from training.engine.data.records import Annotations
from training.engine.distributed import Dist, together
from training.engine.errors import UserError

log = logging.getLogger(__name__)


def open_distilled(config: VildConfig, annotations: Annotations, teacher: Clip) -> Distilled:
    """Proposals of the training images with the teacher's embeddings.

    Raises:
        UserError: either is missing, incomplete, empty, or of other images, another teacher or other crops.
    """
    data = config.data
    proposals = ProposalList.open(config.locate(data.proposals))
    rows = proposals.rows_of(annotations)
    store = open_store(config.locate(data.store), config, proposals, teacher.model)
    check_filled(store)
    bare = int((np.diff(proposals.offsets)[rows] == 0).sum())
    if bare == len(rows):
        raise UserError(f"data.proposals {data.proposals}: no image has any; train the network that makes them longer")
    if bare:
        log.warning("data.proposals %s: %d of %d images have none, and distil nothing", data.proposals, bare, len(rows))
    check_rows(store, rows)
    return Distilled(
        proposals, store, rows, most=data.distil_most, min_side=data.distil_min_side, min_share=data.distil_min_share
    )


def make_dataset(
    config: VildConfig, annotations: Annotations, vocabulary: Vocabulary, teacher: Clip | None
) -> DistilDataset:
    """Training samples of a config. UserError where nothing is left to train on, or nothing to distil."""
    return DistilDataset(
        annotations, labels=learned_labels(config, annotations, vocabulary), **run.sample_settings(config),
        distilled=open_distilled(config, annotations, teacher) if config.model.distils else None,
    )  # fmt: skip


def make_task(config: VildConfig, dist: Dist, folder: Path) -> VildTask:
    """What a run trains, evaluates and writes; every process calls it. ``train.epochs`` follows from ``train.steps``.

    Raises:
        UserError: whatever is missing or does not fit.
    """
    with together():
        data = run.open_data(config)
        teacher = load_teacher(config)
        dataset = make_dataset(config, data.training, data.vocabulary, teacher)
    trained = learned(config, data.vocabulary)
    detector = make_detector(config, teacher, trained, device=dist.device, progress=dist.is_master)
    whose = NOBODY if teacher is None else teacher.identity

    def recall(detector: nn.Module, _: Path) -> dict[str, dict[str, float]]:
        return recall_on_validation(config, detector, data.validation, data.vocabulary, dist=dist)

    validate = recall if config.data.single_class else run.ap_on_validation(config, data, dist)
    identity = {
        "the teacher": whose["name"], "its weights": whose["hash"], "model.variant": config.model.variant,
        "model.trunk": config.model.trunk, "train.seed": config.train.seed,
    }  # fmt: skip
    if dataset.distilled is not None:
        identity["the proposals"] = dataset.distilled.proposals.hash
    task = run.build_task(
        VildTask, detector, dataset, config, dist, folder, identity=identity, vit=whose, vocabulary=trained,
        form=FORMAT, validate=validate if data.validation is not None else None,
    )  # fmt: skip
    config.train.epochs = task.epochs
    return task


def train(config: VildConfig, dist: Dist, folder: Path, *, max_steps: int = 0, **options: Any) -> int:
    """One training run; see :func:`ovdet.run.train`.

    Args:
        max_steps: end after so many steps in all; 0: after ``train.steps`` or ``train.epochs``.
    """
    return run.train(make_task, config, dist, folder, max_steps=max_steps or config.train.steps, **options)
