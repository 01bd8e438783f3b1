"""Order of the data: a function of seed and epoch, whatever the number of processes and workers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class EpochBatchSampler(Sampler):
    """Batches of keys ``(epoch, index)`` for one process.

    An epoch is one permutation of the samples, drawn from ``(seed, epoch)``. Its step s takes the samples
    ``s * world_size * batch_size`` onward; process r gets the r-th run of ``batch_size`` among them. So the processes
    together see at each step what one process with ``world_size * batch_size`` would see, and a run resumed on another
    number of processes with the same global batch goes through the same steps. Samples that do not fill a last global
    batch are left out; a set smaller than one global batch is repeated to fill it.

    Args:
        size: number of samples.
        batch_size: samples per process and step.
        rank, world_size: this process.
        seed: of the permutations.
    """

    def __init__(self, *, size: int, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0) -> None:
        self.size, self.batch_size, self.rank, self.world_size, self.seed = size, batch_size, rank, world_size, seed
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch and the first batch of the next iteration."""
        self.epoch, self.start = epoch, start_batch

    @property
    def batches_per_epoch(self) -> int:
        """Batches of a whole epoch, for each process."""
        return max(self.size // (self.batch_size * self.world_size), 1)

    def __len__(self) -> int:
        return self.batches_per_epoch - self.start

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """The samples of an epoch in their order."""
        return rng.permutation(self.size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, step = self.epoch, self.batch_size * self.world_size
        order = self.order(np.random.default_rng([self.seed, epoch]))
        order = np.resize(order, max(len(order), step))
        for batch in range(self.start, self.batches_per_epoch):
            first = batch * step + self.rank * self.batch_size
            yield [(epoch, int(i)) for i in order[first : first + self.batch_size]]
