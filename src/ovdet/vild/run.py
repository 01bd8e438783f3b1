"""A training run of ViLD: everything is read and checked before anything is written."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from ovdet import files, run
from ovdet.clip import Clip
from ovdet.config import config_to_dict
from ovdet.data.annotations import check_image_root, load
from ovdet.data.dataset import ViewOptions
from ovdet.testing import test
from ovdet.vild.assemble import FORMAT, NOBODY, learned, learned_labels, load_teacher, make_detector
from ovdet.vild.config import VildConfig
from ovdet.vild.dataset import DistilDataset, Distilled
from ovdet.vild.embed import check_filled, check_rows, open_store
from ovdet.vild.proposals import ProposalList
from ovdet.vild.propose import recall_on_validation
from ovdet.vild.task import VildTask
from ovdet.vocabulary import Vocabulary, make_vocabulary
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
    data = config.data
    options = ViewOptions(
        image_size=data.image_size, jitter=tuple(data.jitter), flip=data.flip, whole_target=data.whole_target,
        resize=data.resize, exif=data.exif, mask_centres=data.mask_centres, min_box_side=data.min_box_side,
        replace_thin=data.replace_thin,
    )  # fmt: skip
    return DistilDataset(
        annotations, labels=learned_labels(config, annotations, vocabulary), root=config.locate(data.train_images),
        options=options, keep_empty=data.keep_empty, min_image_side=data.min_image_side,
        min_object_side=data.min_object_side, seed=config.train.seed, masks=config.model.masks,
        distilled=open_distilled(config, annotations, teacher) if config.model.distils else None,
    )  # fmt: skip


def make_task(config: VildConfig, dist: Dist, folder: Path) -> VildTask:
    """What a run trains, evaluates and writes; every process calls it. ``train.epochs`` follows from ``train.steps``.

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
        teacher = load_teacher(config)
        dataset = make_dataset(config, training, vocabulary, teacher)
    trained = learned(config, vocabulary)
    detector = make_detector(config, teacher, trained, device=dist.device, progress=dist.is_master)
    whose = NOBODY if teacher is None else teacher.identity
    values = config_to_dict(config)

    def content() -> dict[str, Any]:
        return files.detector_content(
            task.detector, vit=whose, config=values, names=trained.names, novel=trained.novel, kind=FORMAT
        )

    def validate(place: Path) -> dict[str, dict[str, float]]:
        if data.single_class:
            return recall_on_validation(config, task.detector, validation, vocabulary, dist=dist)
        kinds = ["bbox", "segm"] if config.model.masks else ["bbox"]
        return test(config, task.detector, validation, vocabulary, dist=dist, kinds=kinds, folder=place)

    identity = {
        "the teacher": whose["name"], "its weights": whose["hash"], "model.variant": config.model.variant,
        "model.trunk": config.model.trunk, "train.seed": config.train.seed,
    }  # fmt: skip
    if dataset.distilled is not None:
        identity["the proposals"] = dataset.distilled.proposals.hash
    task = VildTask(
        detector, dataset, data=data, train=config.train, dist=dist, content=content,
        validate=validate if validation is not None else None, folder=folder, identity=identity,
        options={f"{section}.{key}": value for section, part in values.items() for key, value in part.items()},
    )  # fmt: skip
    config.train.epochs = task.epochs
    return task


def train(config: VildConfig, dist: Dist, folder: Path, *, max_steps: int = 0, **options: Any) -> int:
    """One training run; see :func:`ovdet.run.train`.

    Args:
        max_steps: end after so many steps in all; 0: after ``train.steps`` or ``train.epochs``.
    """
    return run.train(make_task, config, dist, folder, max_steps=max_steps or config.train.steps, **options)
