"""Plain image-text contrastive training (CLIP)."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from open_clip import CLIP

from .base import Method


class Contrastive(Method):
    """Symmetric cross-entropy over the cosines of all image-text pairs of the batch, over all processes (CLIP, 2021).

    With gradient accumulation each micro-batch contrasts within itself.
    """

    def __init__(self, *, student: CLIP, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(student=student, world_size=world_size)
        self.rank = rank

    def count(self, batch: dict) -> int:
        """Pairs of a batch."""
        return len(batch["texts"])

    def _gather(self, features: Tensor) -> tuple[Tensor, int]:
        """(features of all processes in rank order, row at which this process's begin); gradients flow back to all."""
        if self.world_size == 1:
            return features, 0
        counts = [torch.zeros(1, dtype=torch.long, device=features.device) for _ in range(self.world_size)]
        dist.all_gather(counts, torch.tensor([len(features)], device=features.device))
        counts = [int(c) for c in counts]
        # Processes may hold different numbers of pairs (unreadable images are left out); collectives need equal shapes.
        padded = F.pad(features, (0, 0, 0, max(counts) - len(features)))
        parts = [part[:n] for part, n in zip(all_gather(padded), counts, strict=True)]
        return torch.cat(parts), sum(counts[: self.rank])

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """``loss`` (see :class:`Method`) and, detached, ``correct_sum`` (image-to-text top-1) and ``regions`` (pairs).

        Args:
            batch: ``images [B, 3, n, n]``, ``texts [B, L]``.
        """
        images = self.student.encode_image(batch["images"], normalize=True).float()
        texts = self.student.encode_text(batch["texts"], normalize=True).float()
        all_images, start = self._gather(images)
        all_texts, _ = self._gather(texts)
        with torch.autocast(images.device.type, enabled=False):
            scale = self.student.logit_scale.float().exp()
            image_logits, text_logits = scale * images @ all_texts.T, scale * texts @ all_images.T
            target = torch.arange(start, start + len(images), device=images.device)
            loss = F.cross_entropy(image_logits, target, reduction="sum")
            loss = (loss + F.cross_entropy(text_logits, target, reduction="sum")) / 2
        return {
            "loss": loss * self.scale,
            "correct_sum": (image_logits.argmax(1) == target).sum().float(),
            "regions": torch.tensor(float(len(images)), device=images.device),
        }
