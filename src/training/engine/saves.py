"""A run on disk: its checkpoints and files for users, written and gone on from by all processes together."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from training.engine.checkpoint import Checkpoints
from training.engine.distributed import Dist, together
from training.engine.resume import general_state, restore
from training.engine.shards import tensors_of
from training.engine.task import LoopOptions, Progress, Task

log = logging.getLogger(__name__)


class Saves:
    """Saves a run, and puts it back; every process calls each method.

    Args:
        checkpoints: of the run's folder.
        task, progress, optimizer, scaler: what is saved and put back.
        options: the loop's.
        dist: where.
        global_batch: samples of an optimizer step, of all processes.

    Attributes:
        released: whether the files for users have been written.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        task: Task,
        progress: Progress,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        *,
        options: LoopOptions,
        dist: Dist,
        global_batch: int,
    ) -> None:
        self.checkpoints, self.task, self.progress = checkpoints, task, progress
        self.optimizer, self.scaler = optimizer, scaler
        self.options, self.dist, self.global_batch = options, dist, global_batch
        self.released = False

    def save(self, name: str) -> None:
        """Write a checkpoint, then the files for users."""
        task, sharded = self.task, self.options.fsdp
        task.before_saving()
        content = task.state() | general_state(
            task, self.progress, None if sharded else self.optimizer, self.scaler, device=self.dist.device,
            global_batch=self.global_batch,
        )  # fmt: skip
        if sharded:
            tensors = tensors_of(content["state_dict"], self.optimizer, task.module)
            self.checkpoints.write_shards(name, content | {"state_dict": {}}, tensors, rank=self.dist.rank)
        else:
            with together():
                self.checkpoints.write(name, content, write=self.dist.is_master)
        self.release()

    def release(self) -> None:
        """Write the files for users."""
        releases = self.task.releases(self.progress) if self.options.fsdp or self.dist.is_master else {}
        with together():
            self.checkpoints.release(releases if self.dist.is_master else {})
        self.released = True

    def resume(self, resume: str | Path) -> None:
        """Put the state of a checkpoint back, see :meth:`~training.engine.checkpoint.Checkpoints.find`.

        Raises:
            UserError: it is missing or damaged, or does not fit this run.
        """
        with together():
            found = self.checkpoints.find(resume)
            if found is None:
                return
            path, content = found
            restore(
                content, path, self.task, self.progress, self.optimizer, self.scaler, dist=self.dist,
                global_batch=self.global_batch, flags=self.options.flags,
            )  # fmt: skip
        log.info("resumed %s: epoch %d, step %d", path, self.progress.epoch + 1, self.progress.step_in_epoch)
