"""What the engine's loop runs to train ViLD: its order of the data, optimizers and schedules."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from ovdet.data.dataset import TrainDataset
from ovdet.data.repeat import RepeatSampler, repeat_factors
from ovdet.task import DetectionTask
from ovdet.vild.config import TrainConfig
from training.engine.data.sampler import EpochBatchSampler
from training.engine.loop import Batch
from training.engine.optim import decay_groups, sgd


class VildTask(DetectionTask):
    """A ViLD detector, or a network that proposes regions, on a data set; see :class:`~ovdet.task.DetectionTask`."""

    train: TrainConfig

    def make_sampler(self, **where: int) -> EpochBatchSampler:
        if self.data.sampling == "repeat":
            return RepeatSampler(dataset_factors(self.dataset, self.data.repeat_threshold), **where)
        return super().make_sampler(**where)

    @property
    def epochs(self) -> int:
        """Epochs that ``train.steps`` need, or ``train.epochs``."""
        train = self.train
        return math.ceil(train.steps / self.batches_per_epoch) if train.steps else train.epochs

    def optimizer(self) -> torch.optim.Optimizer:
        train = self.train
        if train.optimizer == "adamw":
            return super().optimizer()
        named: list[tuple[str, nn.Parameter]] = list(self.module.named_parameters())
        groups = decay_groups(named, train.weight_decay, (lambda *_: False) if train.decay_all else None)
        return sgd([group for group in groups if group["params"]], lr=train.lr, momentum=train.momentum)

    def decay_steps(self, steps_per_epoch: int) -> list[int]:
        # Shares are of the whole run, wherever --max-steps may end it.
        whole = self.train.steps or self.train.epochs * steps_per_epoch
        return [*self.train.decay_steps, *(math.ceil(share * whole) for share in self.train.decay_at)]

    def begin_step(self, micro: list[Batch], step: int) -> None:
        super().begin_step(micro, step)
        warmup = self.train.image_warmup
        self.detector.image_share = min(step / warmup, 1.0) if warmup else 1.0


def dataset_factors(dataset: TrainDataset, threshold: float) -> np.ndarray:
    """Repeat factors of a data set's images, by the classes of the objects that are trained on."""
    annotations = dataset.annotations
    of_image = np.full(len(annotations), -1)
    of_image[dataset.images] = np.arange(len(dataset.images))
    image = of_image[np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))]
    used = dataset.wanted & (image >= 0)
    return repeat_factors(image[used], dataset.labels[used], len(dataset.images), threshold)
