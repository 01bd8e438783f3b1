"""What a run will take, found by a few real steps: nothing is written, and what they do to the weights is lost."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from training.engine.distributed import gather_objects
from training.engine.loop import Loop
from training.engine.memory import peak_memory


@dataclass(frozen=True)
class Forecast:
    """Figures of a run.

    Attributes:
        step_seconds: median of the steps after the first.
        total_steps: of the run.
        memory_gb: the largest of all processes: allocated on the GPU, or resident.
        checkpoint_gb: one checkpoint with the optimizer's state, and the files for users beside it.
        kept: checkpoints that will lie there at the end.
    """

    step_seconds: float
    total_steps: int
    memory_gb: float
    checkpoint_gb: float
    release_gb: float
    kept: int

    def text(self) -> str:
        """As lines for a terminal."""
        left = datetime.timedelta(seconds=round(self.step_seconds * self.total_steps))
        disk = self.kept * self.checkpoint_gb + self.release_gb
        return (
            f"time    {left} for {self.total_steps} steps of {self.step_seconds:.3f} s, without evaluation\n"
            f"memory  {self.memory_gb:.2f} GB a process\n"
            f"disk    {disk:.2f} GB: {self.kept} checkpoints of {self.checkpoint_gb:.2f} GB and "
            f"{self.release_gb:.2f} GB of released weights"
        )


def forecast(loop: Loop, steps: int = 3) -> Forecast:
    """Take ``steps`` steps and one to warm up; every process calls it.

    The loop's weights are spoilt afterwards: the program is expected to end.
    """
    task, accumulate, times = loop.task, loop.options.accum_freq, []
    loop.model.train()
    batches, rate = task.batches(0, 0), loop.schedule(0, 0)
    for group in loop.optimizer.param_groups:
        group["lr"] = rate
    for number in range(min(steps + 1, loop.steps_per_epoch)):
        start = time.perf_counter()
        loop.stepper([next(batches) for _ in range(accumulate)], number, stop=lambda: False).read()
        times.append(time.perf_counter() - start)
    held = sum(_bytes(part) for part in (task.state(), loop.optimizer.state_dict()))
    released = sum(_bytes(part) for part in task.releases(loop.progress).values())
    counted = sorted(times[1:] or times)
    epochs = -(-loop.total_steps // loop.steps_per_epoch)
    written = -(-epochs // loop.options.save_every_epochs) if loop.options.save_every_epochs else 1
    return Forecast(
        step_seconds=counted[len(counted) // 2],
        total_steps=loop.total_steps,
        memory_gb=max(gather_objects(peak_memory(loop.dist.device))) / 1e9,
        checkpoint_gb=held / 1e9,
        release_gb=released / 1e9,
        kept=min(written, loop.options.keep or written),
    )


def _bytes(content: object) -> int:
    return sum(t.numel() * t.element_size() for t in _tensors(content))


def _tensors(content: object) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _tensors(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from _tensors(value)
