"""A training run of F-ViT: everything is read and checked before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ovdet import run
from ovdet.data.dataset import TrainDataset
from ovdet.fvit.assemble import load_vit, make_detector
from ovdet.fvit.config import FViTConfig
from ovdet.task import DetectionTask
from ovdet.vocabulary import Vocabulary, training_labels
from training.engine.data.records import Annotations
from training.engine.distributed import Dist, together


def make_dataset(config: FViTConfig, annotations: Annotations, vocabulary: Vocabulary) -> TrainDataset:
    """Training samples of a config. UserError where nothing is left to train on."""
    labels = training_labels(annotations, vocabulary)
    return TrainDataset(annotations, labels=labels, **run.sample_settings(config))


def make_task(config: FViTConfig, dist: Dist, folder: Path) -> DetectionTask:
    """What a run trains, evaluates and writes; every process calls it.

    Raises:
        UserError: whatever is missing or does not fit.
    """
    with together():
        data = run.open_data(config)
        dataset = make_dataset(config, data.training, data.vocabulary)
        vit = load_vit(config)
    detector = make_detector(config, vit, data.vocabulary, device=dist.device, progress=dist.is_master)
    identity = {
        "the ViT": vit.identity["name"], "its weights": vit.identity["hash"],
        "its architecture": vit.identity["architecture"], "train.seed": config.train.seed,
    }  # fmt: skip
    task = run.build_task(
        DetectionTask, detector, dataset, config, dist, folder, identity=identity, vit=vit.identity,
        vocabulary=data.vocabulary,
        validate=run.ap_on_validation(config, data, dist) if data.validation is not None else None,
    )  # fmt: skip
    del vit.model.text  # it has done its work
    return task


def train(config: FViTConfig, dist: Dist, folder: Path, **options: Any) -> int:
    """One training run; see :func:`ovdet.run.train`."""
    return run.train(make_task, config, dist, folder, **options)
