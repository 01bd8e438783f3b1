"""What every training method has in common: it is the module that data parallelism wraps."""

from __future__ import annotations

import math
import random

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip import CLIP

# Input sizes that --multiscale draws from, by the size of the loader. The published ones; other sizes use the ratios
# of the first row.
MULTISCALE = {1024: (320, 640, 896, 1024), 896: (336, 448, 672, 896)}


def multiscale_sizes(size: int, patch_size: int) -> tuple[int, ...]:
    """Sizes that a batch of ``size`` pixels may be resized to; each a multiple of the patch."""
    sizes = MULTISCALE.get(size)
    if sizes is None or any(s % patch_size for s in sizes):
        ratios = (0.3125, 0.625, 0.875, 1.0)
        sizes = tuple(sorted({max(round(size * r / patch_size), 1) * patch_size for r in ratios}))
    return sizes


class Method(nn.Module):
    """Student, frozen teacher and loss in one module, so that gradients are exchanged by construction.

    The training loop knows three calls: :meth:`begin_step` once per optimizer step, ``forward(batch)`` per micro-batch,
    :meth:`end_step` after the optimizer. ``forward`` returns a dict whose ``loss`` is this process's *sum* over items
    times ``world_size / global count``: data parallelism averages over processes, micro-batches add up, and the result
    is the mean over all items of the step, however unevenly they are spread. Every parameter that requires a gradient
    gets one in every backward pass (a zero one from a micro-batch without items), so no process waits for another.

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
        self.scale = 1.0  # world_size / number of items of the step, over all processes and micro-batches

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
        total = sum(self.count(b) for b in batches)
        if self.world_size > 1:
            device = batches[0]["images"].device
            total = self._sum_over_processes(torch.tensor([total], dtype=torch.float64, device=device)).item()
        self.scale = self.world_size / max(total, 1)

    def end_step(self) -> None:
        """Keep a temperature that trains in CLIP's range: ``logit_scale`` in [0, ln 100]."""
        if self.student.logit_scale.requires_grad:
            with torch.no_grad():
                self.student.logit_scale.clamp_(0, math.log(100))

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def zero_loss(self) -> Tensor:
        """0, with a zero gradient for everything that trains: the loss of a micro-batch without items."""
        return sum(p.sum().float() * 0 for p in self.student.parameters() if p.requires_grad)

    def freeze_scale(self) -> None:
        """Freeze the temperature and bias of the logits, for a loss without gradient to them."""
        self.student.logit_scale.requires_grad_(False)
        if self.student.logit_bias is not None:
            self.student.logit_bias.requires_grad_(False)


class RegionMethod(Method):
    """A method whose loss is on the student's region embeddings.

    What such a loss never reaches is frozen: the text tower, the temperature, and what the dense reading leaves out (a
    data-parallel wrapper would wait for it forever).

    Args:
        extract_type: ``"v2"`` (RoIAlign) or ``"v1"`` (masked tokens, CLIP ViT only).
        multiscale: resize each step's images to a random size of :func:`multiscale_sizes`, bilinearly.
    """

    def __init__(
        self,
        *,
        student: CLIP,
        teacher: CLIP | None = None,
        extract_type: str = "v2",
        multiscale: bool = False,
        world_size: int = 1,
    ) -> None:
        super().__init__(student=student, teacher=teacher, world_size=world_size)
        self.extract_type, self.multiscale = extract_type, multiscale
        self.size: int | None = None
        self.freeze_unreached()

    def freeze_unreached(self) -> None:
        """Freeze what a loss on region embeddings never reaches."""
        self.student.lock_text_tower()
        self.freeze_scale()
        # Of the reading "v1" all blocks are ordinary ones, and every parameter takes part.
        if self.extract_type == "v2":
            for parameter in self.student.visual.unreached_by_dense():
                parameter.requires_grad_(False)

    def begin_step(self, batches: list[dict], *, seed: int) -> None:
        """Count regions over all processes and draw the step's input size (the same everywhere)."""
        super().begin_step(batches, seed=seed)
        if self.multiscale:
            side = batches[0]["images"].shape[-1]
            self.size = random.Random(seed).choice(multiscale_sizes(side, self.student.visual.patch_size))

    def embed_regions(self, batch: dict) -> Tensor:
        """The student's embeddings ``[K, D]`` of a batch's boxes, float32, unit length."""
        images = batch["images"]
        if self.multiscale and images.shape[-1] != self.size:
            images = F.interpolate(images, size=(self.size, self.size), mode="bilinear", align_corners=False)
        regions = self.student.encode_pseudo_boxes(
            images, batch["boxes"], normalize=True, extract_type=self.extract_type
        )
        return regions.float()
