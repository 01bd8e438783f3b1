"""A training run of F-ViT: everything is read and checked before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ovdet import files, run
from ovdet.config import config_to_dict
from ovdet.data.annotations import check_image_root, load
from ovdet.data.dataset import TrainDataset, ViewOptions
from ovdet.fvit.assemble import load_vit, make_detector
from ovdet.fvit.config import FViTConfig
from ovdet.task import DetectionTask
from ovdet.testing import test
from ovdet.vocabulary import Vocabulary, make_vocabulary, training_labels
from training.engine.data.records import Annotations
from training.engine.distributed import Dist, together


def make_dataset(config: FViTConfig, annotations: Annotations, vocabulary: Vocabulary) -> TrainDataset:
    """Training samples of a config. UserError where nothing is left to train on."""
    data = config.data
    options = ViewOptions(
        image_size=data.image_size, jitter=tuple(data.jitter), flip=data.flip, whole_target=data.whole_target,
        resize=data.resize, exif=data.exif, mask_centres=data.mask_centres, min_box_side=data.min_box_side,
        replace_thin=data.replace_thin,
    )  # fmt: skip
    return TrainDataset(
        annotations, labels=training_labels(annotations, vocabulary), root=config.locate(data.train_images),
        options=options, keep_empty=data.keep_empty, min_image_side=data.min_image_side,
        min_object_side=data.min_object_side, seed=config.train.seed, masks=config.model.masks,
    )  # fmt: skip


def make_task(config: FViTConfig, dist: Dist, folder: Path) -> DetectionTask:
    """What a run trains, evaluates and writes; every process calls it.

    Raises:
        UserError: whatever is missing or does not fit.
    """
    data = config.data
    with together():
        training = load(config, "train", masks=config.model.masks)
        check_image_root(training, config.locate(data.train_images), key="data.train_images")
        validation = load(config, "val", masks=config.model.masks) if data.val_annotations else None
        if validation is not None and config.train.eval_every:
            check_image_root(validation, config.locate(data.val_images), key="data.val_images")
        vocabulary = make_vocabulary(config, validation or training)
        dataset = make_dataset(config, training, vocabulary)
        vit = load_vit(config)
    detector = make_detector(config, vit, vocabulary, device=dist.device, progress=dist.is_master)
    values = config_to_dict(config)

    def content() -> dict:
        return files.detector_content(
            task.detector, vit=vit.identity, config=values, names=vocabulary.names, novel=vocabulary.novel
        )

    def validate(place: Path) -> dict[str, dict[str, float]]:
        kinds = ["bbox", "segm"] if config.model.masks else ["bbox"]
        return test(config, task.detector, validation, vocabulary, dist=dist, kinds=kinds, folder=place)

    identity = {
        "the ViT": vit.identity["name"], "its weights": vit.identity["hash"],
        "its architecture": vit.identity["architecture"], "train.seed": config.train.seed,
    }  # fmt: skip
    task = DetectionTask(
        detector, dataset, data=data, train=config.train, dist=dist, content=content,
        validate=validate if validation is not None else None, folder=folder, identity=identity,
        options={f"{section}.{key}": value for section, part in values.items() for key, value in part.items()},
    )  # fmt: skip
    del vit.model.text  # it has done its work
    return task


def train(config: FViTConfig, dist: Dist, folder: Path, **options: Any) -> int:
    """One training run; see :func:`ovdet.run.train`."""
    return run.train(make_task, config, dist, folder, **options)
