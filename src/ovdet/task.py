"""What the engine's loop runs to train a detector."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from ovdet.data.dataset import TrainDataset
from ovdet.data.loader import OrientedSampler, nothing_batch, targets_to, train_loader
from ovdet.sections import DataConfig, TrainConfig
from training.engine.data.records import log_left_out
from training.engine.data.sampler import EpochBatchSampler
from training.engine.data.workers import check_shared_memory
from training.engine.distributed import Dist, average_batch_norm, many
from training.engine.errors import Flags
from training.engine.journal import Journal
from training.engine.loop import Batch, LoopOptions, Progress, Rate, Task
from training.engine.optim import adamw, decay_groups
from training.engine.schedule import process_seed, scaled_lr, step_decay_lr

log = logging.getLogger(__name__)

FLAGS = Flags(
    resume="--resume",
    name="--work-dir",
    folder="--work-dir",
    batch_size="train.batch_size",
    workers="data.workers",
    checkpointing="a smaller data.image_size",
    lr="train.lr",
    warmup="train.warmup_steps",
    max_skipped="data.max_skipped",
    precision="train.precision",
)


class Trainable(Protocol):
    """What a detector must have to be trained by :class:`DetectionTask`, besides being a module."""

    def prepare(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Input of the detector from uint8 images ``[B, 3, S, S]``, of which (height, width) is their own area."""

    def check_targets(self, targets: Sequence[dict[str, Any]]) -> None:
        """ValueError for targets, on the host, that cannot be trained on."""

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """State of what is trained, and no more."""

    def load_trainable_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put it back; ValueError where it does not fit."""


class _Step(nn.Module):
    """A detector's losses, and their sum."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        losses = self.detector(batch["images"], batch["sizes"], batch["targets"])
        return {"loss": sum(losses.values()), **losses}


class DetectionTask(Task):
    """A detector on a data set.

    Args:
        detector: a :class:`Trainable` module on its device. In training mode ``detector(input, sizes, targets)`` gives
            a dict of losses, whose sum is the objective; what it draws comes from torch's default generators.
        dataset: training samples.
        data, train: sections of its config.
        dist: where.
        content: makes the detector file, a dict.
        validate: (folder for results) -> metrics by kind; None where there is no validation set.
        folder: of the run.
        identity, options: see :class:`~training.engine.task.Task`.
    """

    name = "detection"

    def __init__(
        self,
        detector: nn.Module,
        dataset: TrainDataset,
        *,
        data: DataConfig,
        train: TrainConfig,
        dist: Dist,
        content: Callable[[], dict[str, Any]],
        validate: Callable[[Path], dict[str, dict[str, float]]] | None,
        folder: Path,
        identity: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        if train.sync_batch_norm and many() and dist.device.type == "cuda":
            # Not torch's conversion, which drops the activation that many of timm's batch norms end with.
            detector = convert_sync_batchnorm(detector)
        self.detector, self.module = detector, _Step(detector)
        self.dataset, self.data, self.train, self.dist = dataset, data, train, dist
        self.content, self.validate, self.folder = content, validate, folder
        self._identity, self._options = identity, options
        self.warmup = train.warmup_steps
        self.source = f"data.train_annotations {dataset.annotations.file}"
        self.metrics: dict[str, dict[str, float]] = {}
        self.sampler = self.make_sampler(
            batch_size=train.batch_size, rank=dist.rank, world_size=dist.world_size, seed=train.seed
        )
        check_shared_memory(
            train.batch_size * 3 * data.image_size**2, workers=data.workers, world_size=dist.world_size,
            flags="data.workers or train.batch_size",
        )  # fmt: skip
        self.loader = train_loader(
            dataset, self.sampler, workers=data.workers, pin=dist.device.type == "cuda", seed=train.seed + dist.rank
        )
        if many() and dist.device.type != "cuda":
            log.info("batch norm is not synchronised on CPUs: each process normalises by its own images")

    # -- data ---------------------------------------------------------------------------------------------------------

    def prepare(self, progress: Progress) -> None:
        """Say what the data lacks."""
        log_left_out(self.source, self.dataset.annotations.skipped)
        log_left_out(self.source, self.dataset.lost)

    def make_sampler(self, **where: int) -> EpochBatchSampler:
        """The order of the data, for this process.

        Args:
            where: ``batch_size``, ``rank``, ``world_size`` and ``seed``.
        """
        if self.data.by_orientation:
            return OrientedSampler(self.dataset.higher_than_wide(), **where)
        return EpochBatchSampler(size=len(self.dataset), **where)

    @property
    def batches_per_epoch(self) -> int:
        return self.sampler.batches_per_epoch

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        self.sampler.set_epoch(epoch, start)
        for batch in self.loader:
            yield self.to_device(batch)

    def to_device(self, batch: Batch) -> Batch:
        """A collated batch on the device: normalised images, and targets with whole masks."""
        device, size = self.dist.device, self.data.image_size
        if batch["images"] is None:  # nothing could be read: every process takes its step all the same
            batch = {**batch, **nothing_batch(size, masks=self.dataset.masks)}
        self.detector.check_targets(batch["targets"])
        images = batch["images"].to(device, non_blocking=True)
        return {
            **batch,
            "images": self.detector.prepare(images, batch["sizes"]),
            "targets": targets_to(batch["targets"], size, device),
        }

    # -- a step -------------------------------------------------------------------------------------------------------

    def optimizer(self) -> torch.optim.Optimizer:
        train, named = self.train, list(self.module.named_parameters())
        if train.decay_all:
            trained = [p for _, p in named if p.requires_grad]
            return adamw([{"params": trained, "weight_decay": train.weight_decay}], lr=train.lr)
        return adamw(decay_groups(named, train.weight_decay), lr=train.lr)

    def decay_steps(self, steps_per_epoch: int) -> Sequence[int]:
        """Steps from each of which on the rate falls, besides ``train.decay_epochs``."""
        return ()

    def schedule(self, total_steps: int, steps_per_epoch: int) -> Rate:
        train, images = self.train, self.train.batch_size * self.dist.world_size
        steps = self.decay_steps(steps_per_epoch)
        base = scaled_lr(train.lr, images, train.base_batch) if train.scale_lr else train.lr

        def rate(step: int, epoch: int) -> float:
            return step_decay_lr(
                step, epoch, base=base, decay_epochs=train.decay_epochs, decay_factor=train.decay_factor,
                decay_steps=steps, warmup=train.warmup_steps, warmup_factor=train.warmup_factor,
            )  # fmt: skip

        return rate

    def begin_step(self, micro: list[Batch], step: int) -> None:
        torch.manual_seed(process_seed(self.train.seed, step, self.dist.rank))

    # -- records ------------------------------------------------------------------------------------------------------

    def scalars(self, totals: dict[str, float]) -> dict[str, float]:
        return {k: v / self.dist.world_size for k, v in totals.items() if k.startswith("loss_")}

    def evaluate(self, progress: Progress, journal: Journal, *, start: bool = False) -> None:
        if self.validate is None:
            return
        average_batch_norm(self.detector)
        self.metrics = self.validate(self.folder / f"epoch_{progress.begun}")
        for kind, values in self.metrics.items():
            known = {k: v for k, v in values.items() if v >= 0}
            journal.scalars({f"val/{kind}_{k}": v for k, v in known.items()}, progress.step)
            journal.result({"epoch": progress.begun, "step": progress.step, "kind": kind, **known})

    # -- state --------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {"state_dict": self.detector.trainable_state_dict()}

    def load_state(self, content: dict[str, Any]) -> None:
        self.detector.load_trainable_state_dict(content["state_dict"])

    def identity(self) -> dict[str, Any]:
        return self._identity

    def options(self) -> dict[str, Any]:
        return self._options

    def before_saving(self) -> None:
        average_batch_norm(self.detector)

    def releases(self, progress: Progress) -> dict[str, dict[str, Any]]:
        content = self.content()
        whole = {} if progress.step_in_epoch else {f"epoch_{progress.epoch}.pt": content}
        return {"latest.pt": content, **whole}


def loop_options(
    train: TrainConfig, data: DataConfig, *, max_steps: int = 0, save_every_steps: int = 0, flags: Flags = FLAGS
) -> LoopOptions:
    """How the loop runs a detector's training.

    Args:
        train, data: sections of its config.
        max_steps: end after so many steps in all; 0: after ``train.epochs``.
        save_every_steps: save inside epochs as well; 0: never.
    """
    return LoopOptions(
        epochs=train.epochs,
        batch_size=train.batch_size,
        max_steps=max_steps,
        clip_norm=train.clip or None,
        max_skipped=data.max_skipped,
        log_every=train.log_every,
        save_every_steps=save_every_steps,
        save_every_epochs=train.save_every,
        keep=2,
        evaluate_first=False,
        evaluate_every=train.eval_every,
        evaluate_last=train.eval_every > 0,
        flags=flags,
    )
