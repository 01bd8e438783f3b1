"""Loader processes that a signal to the whole process group does not take from a run that is about to save."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from training.engine.errors import UserError
from training.engine.signals import held_back, let_through

GRACE = 120  # seconds that a worker lives on after SIGTERM
PREFETCH = 4  # batches that a worker makes ahead
_SHARED_MEMORY = Path("/dev/shm")


class Loader(DataLoader):
    """A DataLoader whose workers have one thread, leave signals to the training process and serve all epochs.

    Args:
        workers: processes; 0 for none.
        seed: of the generator that the loader draws from. It is the loader's own: each pass draws a seed, and a resumed
            run makes a pass more than the one it continues.
        settings: see :class:`torch.utils.data.DataLoader`.
    """

    def __init__(self, dataset: Any, *, workers: int, seed: int = 0, **settings: Any) -> None:
        if workers:
            # Forked, whatever Python's default is: they share the annotations, and begin in a few milliseconds.
            own = {"prefetch_factor": PREFETCH, "persistent_workers": True, "multiprocessing_context": "fork"}
            settings = own | settings
        super().__init__(
            dataset,
            num_workers=workers,
            worker_init_fn=start_worker,
            generator=torch.Generator().manual_seed(seed),
            **settings,
        )

    def __iter__(self) -> Iterator[Any]:
        with held_back():  # workers are forked here
            return super().__iter__()


def start_worker(_: int) -> None:
    """Set up a loader process: one thread, and signals left to the training process."""
    torch.set_num_threads(1)  # workers share the cores with each other and with the model
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
    let_through()


def check_shared_memory(
    batch_bytes: float, *, workers: int, flags: str, world_size: int = 1, batches: int = PREFETCH,
    in_all: int | None = None,
) -> None:  # fmt: skip
    """See that the batches which workers hold ready fit into shared memory; a worker dies of a bus error otherwise.

    Args:
        batch_bytes: size of one batch.
        workers: processes of one loader.
        flags: the options to lower, for messages.
        world_size: training processes with such a loader; those of this machine share its memory.
        batches: that each worker holds; one more is being made.
        in_all: batches that a loader makes in a pass, where they may be fewer than its workers could hold.

    Raises:
        UserError: they do not fit.
    """
    if not workers or not _SHARED_MEMORY.is_dir() or not os.access(_SHARED_MEMORY, os.W_OK):
        return
    held, here = workers * (batches + 1), min(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    needed = batch_bytes * here * (held if in_all is None else min(held, in_all))
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if needed > free:
        raise UserError(
            f"batches of {_size(batch_bytes)} from {workers * here} loader workers need {_size(needed)} of shared "
            f"memory, and {_SHARED_MEMORY} has {_size(free)} free: lower {flags}, or give the container more "
            "(docker run --shm-size)"
        )


def _size(number: float) -> str:
    return f"{number / 2**30:.1f} GB" if number >= 2**30 else f"{number / 2**20:.0f} MB"
