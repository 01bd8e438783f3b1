"""A torch profiler trace of a few training steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

log = logging.getLogger(__name__)

WARM_UP = 3  # micro-batches before the trace: allocation and compilation are not what one wants to see


def profile_steps(
    batches: Callable[[int, int], Iterator[dict]], folder: Path, count: int
) -> Callable[[int, int], Iterator[dict]]:
    """Wrap an epoch's iterator so that the work on ``count`` micro-batches is traced, or on those left in the epoch.

    The trace (``trace.json``, for chrome://tracing or Perfetto) and a table of the costliest operators
    (``operators.txt``) are written to ``folder``; where the run ends before, when the iterator is closed.
    """
    seen = 0

    def traced(epoch: int, start: int) -> Iterator[dict]:
        nonlocal seen
        profiler: profile | None = None
        try:
            for batch in batches(epoch, start):
                if seen == WARM_UP:
                    profiler = _start()
                elif profiler is not None and seen == WARM_UP + count:
                    _write(profiler, folder)
                    profiler = None
                seen += 1
                yield batch
        finally:
            if profiler is not None:
                _write(profiler, folder)
            elif seen <= WARM_UP:
                log.warning("no profile yet: an epoch ended after %d of the first %d micro-batches, which warm up",
                            seen, WARM_UP)  # fmt: skip

    return traced


def _start() -> profile:
    profiler = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available())
    profiler.start()
    return profiler


def _write(profiler: profile, folder: Path) -> None:
    profiler.stop()
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    (folder / "operators.txt").write_text(profiler.key_averages().table(sort_by=key, row_limit=40) + "\n")
    log.info("profile written to %s", folder)
