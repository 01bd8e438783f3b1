"""Plain image-text contrastive training (CLIP)."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from open_clip import CLIP

from .base import Method


class _GatherRows(torch.autograd.Function):
    """Rows of all processes in rank order; the gradient of a row is the sum of what every process sends back."""

    @staticmethod
    def forward(ctx, rows: Tensor, counts: list[int], rank: int) -> Tensor:
        # Processes may hold different numbers of rows (unreadable images are left out); collectives need equal shapes.
        padded = F.pad(rows, (0, 0, 0, max(counts) - len(rows))).contiguous()
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        ctx.start, ctx.length = sum(counts[:rank]), len(rows)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[ctx.start : ctx.start + ctx.length], None, None


class Contrastive(Method):
    """Symmetric cross-entropy over the cosines of all image-text pairs of the batch, over all processes (CLIP, 2021).

    Everything trains: both towers and the temperature. With gradient accumulation each micro-batch (of all processes)
    contrasts within itself: its negatives are fewer than those of one large batch.

    Args:
        student: the model that trains. A logit bias (SigLIP) has no effect on a softmax and is frozen.
        rank, world_size: this process among all.
    """

    def __init__(self, *, student: CLIP, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(student=student, world_size=world_size)
        self.rank = rank
        if student.logit_bias is not None:
            student.logit_bias.requires_grad_(False)

    def count(self, batch: dict) -> int:
        """Pairs of a batch."""
        return len(batch["texts"])

    def _counts(self, pairs: int, device: torch.device) -> list[int]:
        """Pairs of this micro-batch on every process."""
        if self.world_size == 1:
            return [pairs]
        counts = torch.zeros(self.world_size, dtype=torch.long, device=device)
        counts[self.rank] = pairs
        return self._sum_over_processes(counts).tolist()

    def _embed(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Image and text embeddings ``[B, D]``, float32, unit length; for no pairs, empty ones with a gradient."""
        if not self.count(batch):
            none = self.zero_loss().expand(0, self.student.embed_dim)
            return none, none
        images = self.student.encode_image(batch["images"], normalize=True)
        return images.float(), self.student.encode_text(batch["texts"], normalize=True).float()

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """``loss`` (see :class:`Method`) and, detached, ``correct_sum`` (image-to-text top-1) and ``regions`` (pairs).

        Args:
            batch: ``images [B, 3, n, n]``, ``texts [B, L]``.
        """
        counts = self._counts(self.count(batch), batch["images"].device)
        images, texts = self._embed(batch)
        with torch.autocast(images.device.type, enabled=False):
            all_images, all_texts = images, texts
            if self.world_size > 1 and sum(counts):
                # One collective for both, so that no process can meet another's in a different order.
                both = _GatherRows.apply(torch.cat([images, texts], dim=1), counts, self.rank)
                all_images, all_texts = both.chunk(2, dim=1)
            scale = self.student.logit_scale.float().exp()
            image_logits, text_logits = scale * images @ all_texts.T, scale * texts @ all_images.T
            target = torch.arange(len(images), device=images.device) + sum(counts[: self.rank])
            loss = F.cross_entropy(image_logits, target, reduction="sum")
            loss = (loss + F.cross_entropy(text_logits, target, reduction="sum")) / 2
        correct = image_logits.detach().argmax(1) == target if sum(counts) else image_logits.detach()
        return {
            "loss": loss * self.scale,
            "correct_sum": correct.sum().float(),
            "regions": loss.detach().new_tensor(float(len(images))),
        }
