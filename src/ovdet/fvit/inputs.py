"""What a training run reads before it writes anything."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovdet import files as checkpoint
from ovdet.data.annotations import Annotations, check_image_root, load_annotations
from ovdet.data.dataset import TrainDataset
from ovdet.errors import UserError
from ovdet.fvit.assemble import Vit, load_vit
from ovdet.fvit.config import FViTConfig
from ovdet.vocabulary import Vocabulary, make_vocabulary, training_labels

log = logging.getLogger(__name__)


@dataclass
class Inputs:
    """Data, vocabulary, ViT and, when resuming, the content of ``latest.pt``."""

    dataset: TrainDataset
    validation: Annotations | None
    vocabulary: Vocabulary
    vit: Vit
    resumed: dict[str, Any] | None


def read_inputs(config: FViTConfig, work_dir: Path, *, resume: bool) -> Inputs:
    """Read annotations, weights and the checkpoint to resume from.

    Raises:
        UserError: whatever is missing or does not fit.
    """
    data, latest = config.data, work_dir / checkpoint.LATEST
    if latest.exists() and not resume:
        raise UserError(f"--work-dir {work_dir} holds a run already: give --resume to go on with it, or another folder")
    resumed = checkpoint.load(latest) if resume and latest.exists() else None
    if resume and resumed is None:
        log.warning("nothing to resume in %s: a new run begins", work_dir)
    training = load_annotations(
        config.locate(data.train_annotations), key="data.train_annotations", masks=config.model.masks
    )
    check_image_root(training, config.locate(data.train_images), key="data.train_images")
    validation = None
    if data.val_annotations:
        validation = load_annotations(config.locate(data.val_annotations), key="data.val_annotations")
        if config.train.eval_every:
            check_image_root(validation, config.locate(data.val_images), key="data.val_images")
    vocabulary = make_vocabulary(config, validation or training)
    dataset = TrainDataset(
        training,
        labels=training_labels(training, vocabulary),
        root=config.locate(data.train_images),
        image_size=data.image_size,
        jitter=data.jitter,
        flip=data.flip,
        min_box_side=data.min_box_side,
        keep_empty=data.keep_empty,
        seed=config.train.seed,
        masks=config.model.masks,
    )
    vit = load_vit(config)
    if resumed is not None:
        checkpoint.check_vit(resumed, vit.identity, latest)
    return Inputs(dataset, validation, vocabulary, vit, resumed)
