"""Symmetric cross-entropy of paired embeddings over all processes (CLIP, 2021), with gradients through gathering."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


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


def rows_of_processes(rows: int, device: torch.device, rank: int, world_size: int) -> list[int]:
    """How many rows each process has in this micro-batch. Every process must call it."""
    if world_size == 1:
        return [rows]
    counts = torch.zeros(world_size, dtype=torch.long, device=device)
    counts[rank] = rows
    dist.all_reduce(counts)
    return counts.tolist()


def contrast(
    images: Tensor, texts: Tensor, log_scale: Tensor, counts: list[int], rank: int = 0
) -> tuple[Tensor, Tensor]:
    """(loss summed over this process's pairs, how many of its images find their text first).

    Args:
        images, texts: ``[n, D]`` of unit length; row i of one belongs to row i of the other. Negatives are the rows of
            all processes.
        log_scale: logarithm of the temperature's inverse.
        counts: of :func:`rows_of_processes`.
        rank: this process. Every process must call it, with or without rows, in the same order.
    """
    with torch.autocast(images.device.type, enabled=False):
        images, texts = images.float(), texts.float()
        all_images, all_texts = images, texts
        if len(counts) > 1 and sum(counts):
            # One collective for both, so that no process can meet another's in a different order.
            both = _GatherRows.apply(torch.cat([images, texts], dim=1), counts, rank)
            all_images, all_texts = both.chunk(2, dim=1)
        scale = log_scale.float().exp()
        image_logits, text_logits = scale * images @ all_texts.T, scale * texts @ all_images.T
        target = torch.arange(len(images), device=images.device) + sum(counts[:rank])
        loss = F.cross_entropy(image_logits, target, reduction="sum")
        loss = (loss + F.cross_entropy(text_logits, target, reduction="sum")) / 2
    correct = image_logits.detach().argmax(1) == target if sum(counts) else image_logits.detach()
    return loss, correct.sum().float()
