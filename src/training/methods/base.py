"""What every training method has in common: it is the module that data parallelism wraps."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from open_clip import CLIP


class Method(nn.Module):
    """Student, frozen teacher and loss in one module, so that gradients are exchanged by construction.

    The training loop knows three calls: :meth:`begin_step` once per optimizer step, ``forward(batch)`` per micro-batch,
    :meth:`end_step` after the optimizer. ``forward`` returns a dict whose ``loss`` is this process's *sum* over regions
    times ``world_size / global count``: data parallelism averages over processes, micro-batches add up, and the result
    is the mean over all regions of the step, however unevenly they are spread.

    Args:
        student: the model that trains.
        teacher: frozen model, or None for a method without one.
        world_size: number of processes that average their gradients.
    """

    def __init__(self, *, student: CLIP, teacher: CLIP | None = None, world_size: int = 1) -> None:
        super().__init__()
        self.student = student
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        self.world_size = world_size
        self.scale = 1.0  # world_size / number of regions of the step, over all processes and micro-batches

    def train(self, mode: bool = True) -> Method:
        """Training mode for the student only: the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def count(self, batch: dict) -> int:
        """Number of items of a prepared batch that the loss is averaged over."""
        return sum(len(b) for b in batch["boxes"])

    def begin_step(self, batches: list[dict], *, seed: int) -> None:
        """Collective preparation of one optimizer step.

        Args:
            batches: this process's prepared micro-batches.
            seed: the same on every process, another one each step; source of the step's random choices.
        """
        device = batches[0]["images"].device
        total = torch.tensor([sum(self.count(b) for b in batches)], dtype=torch.float64, device=device)
        self.scale = self.world_size / max(self._sum_over_processes(total).item(), 1.0)

    def end_step(self) -> None:
        """Keep the temperature in CLIP's range: ``logit_scale`` in [0, ln 100]."""
        with torch.no_grad():
            self.student.logit_scale.clamp_(0, math.log(100))

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def freeze_for_regions(self) -> None:
        """Freeze what a loss on region embeddings never reaches; a data-parallel wrapper would wait for it forever."""
        self.student.lock_text_tower()
        self.student.logit_scale.requires_grad_(False)
        if self.student.logit_bias is not None:
            self.student.logit_bias.requires_grad_(False)
        for parameter in self.student.visual.unreached_by_dense():
            parameter.requires_grad_(False)
