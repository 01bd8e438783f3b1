"""Order of the data, batches and loaders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from ovdet.data.dataset import Skipped, TestDataset, TrainDataset


class TrainSampler(Sampler):
    """Batches of keys (epoch, index) for one process.

    An epoch is a permutation drawn from (seed, epoch). Step s takes the next ``world_size * batch_size`` samples, of
    which process r gets the r-th run: all processes together see what one with the larger batch would. What does not
    fill the last step is left out; a set smaller than one step is repeated.
    """

    def __init__(self, *, size: int, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        self.size, self.batch_size, self.rank, self.world_size, self.seed = size, batch_size, rank, world_size, seed
        self.epoch, self.start = 0, 0

    @property
    def steps(self) -> int:
        """Steps of a whole epoch."""
        return max(self.size // (self.batch_size * self.world_size), 1)

    def set_position(self, epoch: int, step: int) -> None:
        """Where the next iteration begins."""
        self.epoch, self.start = epoch, step

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, per_step = self.epoch, self.batch_size * self.world_size
        order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
        order = np.resize(order, max(self.size, per_step))
        for step in range(self.start, self.steps):
            first = step * per_step + self.rank * self.batch_size
            yield [(epoch, int(i)) for i in order[first : first + self.batch_size]]


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
    """``images`` uint8 ``[B, 3, S, S]`` or None, ``sizes``, ``targets``, ``image_ids``, ``skipped`` (file, reason).

    ``targets`` are dicts of boxes, labels and, where samples have them, masks.
    """
    good = [s for s in samples if not isinstance(s, Skipped)]
    keys = ("boxes", "labels", "masks")
    return {
        "images": torch.stack([s["image"] for s in good]) if good else None,
        "sizes": [s["size"] for s in good],
        "targets": [{k: s[k] for k in keys if k in s} for s in good],
        "image_ids": [s["image_id"] for s in good],
        "skipped": [(s.file, s.reason) for s in samples if isinstance(s, Skipped)],
    }


def collate_test(samples: list[dict[str, Any] | Skipped]) -> dict[str, Any]:
    """``images`` uint8 ``[B, 3, S, S]`` or None, ``sizes``, ``originals``, ``indices``, ``skipped``."""
    good = [s for s in samples if not isinstance(s, Skipped)]
    return {
        "images": torch.stack([s["image"] for s in good]) if good else None,
        "sizes": [s["size"] for s in good],
        "originals": [s["original"] for s in good],
        "indices": [s["index"] for s in good],
        "skipped": [(s.file, s.reason) for s in samples if isinstance(s, Skipped)],
    }


def train_loader(dataset: TrainDataset, sampler: TrainSampler, *, workers: int, pin: bool) -> DataLoader:
    """Loader over a sampler whose position is set before each epoch."""
    return DataLoader(
        dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate_train, pin_memory=pin,
        persistent_workers=workers > 0,
    )  # fmt: skip


def test_loader(
    dataset: TestDataset, *, batch_size: int, workers: int, rank: int, world_size: int, pin: bool
) -> DataLoader:
    """Loader of this process's share of the images."""
    sampler = TestSampler(size=len(dataset), batch_size=batch_size, rank=rank, world_size=world_size)
    return DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate_test, pin_memory=pin)


test_loader.__test__ = False
