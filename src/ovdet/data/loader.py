"""Order of the data, batches and loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ovdet.data.dataset import ImageFiles, Skipped, TrainDataset
from ovdet.data.masks import MaskWindows, unpack
from training.engine.data.sampler import EpochBatchSampler
from training.engine.data.workers import Loader


class OrientedSampler(EpochBatchSampler):
    """Batches of keys (epoch, index) whose images are all wide or all high, for one process.

    As in :class:`~training.engine.data.sampler.EpochBatchSampler`, the processes together see at each step what one
    with the larger batch would. The images of each kind are put in order by (seed, epoch) and filled up with
    repetitions to whole steps, and the steps of both kinds are mixed.

    Args:
        high: bool ``[size]``, images that are higher than wide.
    """

    def __init__(
        self, high: np.ndarray, *, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> None:
        super().__init__(size=len(high), batch_size=batch_size, rank=rank, world_size=world_size, seed=seed)
        self.kinds = [rows for rows in (np.flatnonzero(~high), np.flatnonzero(high)) if len(rows)]

    @property
    def batches_per_epoch(self) -> int:
        """Batches of a whole epoch, for each process."""
        step = self.batch_size * self.world_size
        return sum(-(-len(rows) // step) for rows in self.kinds)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, step = self.epoch, self.batch_size * self.world_size
        rng = np.random.default_rng([self.seed, epoch])
        steps = [
            part for rows in self.kinds for part in np.resize(rng.permutation(rows), (-(-len(rows) // step), step))
        ]
        for number in rng.permutation(len(steps))[self.start :]:
            mine = steps[number][self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
            yield [(epoch, int(i)) for i in mine]


class TestSampler(Sampler):
    """Batches of indices for one process: every world_size-th batch of the whole list, none repeated.

    Batches, not images, are dealt out, so that an image shares its batch with the same others on any number of
    processes and its detections are the same to the last bit.
    """

    __test__ = False

    def __init__(self, *, size: int, batch_size: int, rank: int, world_size: int) -> None:
        starts = range(rank * batch_size, size, world_size * batch_size)
        self.batches = [list(range(s, min(s + batch_size, size))) for s in starts]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def collate_train(samples: list[dict[str, Any] | Skipped]) -> dict[str, Any]:
    """``images`` uint8 ``[B, 3, S, S]`` or None, ``sizes`` int32 ``[B, 2]``, ``targets``, ``image_ids``, ``skipped``.

    ``targets`` are dicts of boxes, labels and what else samples have, such as masks
    (:class:`~ovdet.data.masks.MaskWindows`).
    """
    good = [s for s in samples if not isinstance(s, Skipped)]
    return {
        "images": stack([s["image"] for s in good]),
        "sizes": [s["size"] for s in good],
        "targets": [{k: v for k, v in s.items() if k not in ("image", "size", "image_id")} for s in good],
        "image_ids": [s["image_id"] for s in good],
        "skipped": [(s.file, s.reason) for s in samples if isinstance(s, Skipped)],
        "samples": len(good),
    }


def collate_test(samples: list[dict[str, Any] | Skipped]) -> dict[str, Any]:
    """``images`` uint8 ``[B, 3, S, S]`` or None, ``skipped``, and lists of what else samples hold."""
    good = [s for s in samples if not isinstance(s, Skipped)]
    names = {"size": "sizes", "original": "originals", "index": "indices", "pixels": "pixels", "crops": "crops"}
    return {
        "images": stack([s["image"] for s in good]),
        "skipped": [(s.file, s.reason) for s in samples if isinstance(s, Skipped)],
        **{many: [s[one] for s in good] for one, many in names.items() if not good or one in good[0]},
    }


def stack(images: Sequence[Tensor]) -> Tensor | None:
    """Images ``[3, S, S]`` as a batch in the memory layout that they have; None where there is none.

    Decoders and resizing leave the channel innermost; turning a batch round takes as long as resizing it.
    """
    if not images:
        return None
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def nothing_batch(size: int, *, masks: bool) -> dict[str, Any]:
    """A batch of one black image without objects, for a process whose images could not be read."""
    target: dict[str, Any] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    if masks:
        target["masks"] = MaskWindows.of([], [])
    return {"images": torch.zeros(1, 3, size, size, dtype=torch.uint8), "sizes": [(size, size)], "targets": [target]}


def targets_to(targets: Sequence[dict[str, Any]], size: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Targets on a device, with whole masks bool ``[N, size, size]`` made there."""
    return [
        {
            key: unpack(value, size, device) if key == "masks" else value.to(device, non_blocking=True)
            for key, value in target.items()
        }
        for target in targets
    ]


def train_loader(
    dataset: TrainDataset, sampler: EpochBatchSampler, *, workers: int, pin: bool, seed: int = 0
) -> Loader:
    """Loader over a sampler whose position is set before each epoch."""
    return Loader(
        dataset, workers=workers, seed=seed, batch_sampler=sampler, collate_fn=collate_train, pin_memory=pin
    )  # fmt: skip


def test_loader(
    dataset: ImageFiles,
    *,
    batch_size: int,
    workers: int,
    rank: int,
    world_size: int,
    pin: bool,
    collate: Callable[[list[dict[str, Any] | Skipped]], dict[str, Any]] = collate_test,
    batches: Sequence[list[int]] | None = None,
) -> Loader:
    """Loader of this process's share of the images; its workers end with each pass.

    Args:
        collate: samples to a batch.
        batches: in place of the share, the images of each batch.
    """
    if batches is None:
        batches = TestSampler(size=len(dataset), batch_size=batch_size, rank=rank, world_size=world_size)
    return Loader(
        dataset, workers=workers, batch_sampler=batches, collate_fn=collate, pin_memory=pin,
        **({"persistent_workers": False} if workers else {}),
    )  # fmt: skip


test_loader.__test__ = False
