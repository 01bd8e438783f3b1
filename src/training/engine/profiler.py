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
    """Wrap an epoch's iterator so that the work on ``count`` micro-batches of the first epoch is traced.

    The trace (``trace.json``, for chrome://tracing or Perfetto) and a table of the costliest operators
    (``operators.txt``) are written to ``folder``.
    """
    done = False

    def traced(epoch: int, start: int) -> Iterator[dict]:
        nonlocal done
        iterator = batches(epoch, start)
        if done:
            yield from iterator
            return
        done = True
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        profiler = profile(activities=activities)
        running = False
        for i, batch in enumerate(iterator):
            if i == WARM_UP:
                profiler.start()
                running = True
            if running and i == WARM_UP + count:
                running = False
                _write(profiler, folder)
            yield batch
        if running:
            _write(profiler, folder)

    return traced


def _write(profiler: profile, folder: Path) -> None:
    profiler.stop()
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    (folder / "operators.txt").write_text(profiler.key_averages().table(sort_by=key, row_limit=40) + "\n")
    log.info("profile written to %s", folder)
