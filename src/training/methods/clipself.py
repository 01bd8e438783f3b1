"""CLIPSelf: dense region embeddings of the student match the teacher's embeddings of the region's crop."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from open_clip import CLIP

from .base import Method

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


class CLIPSelf(Method):
    """Loss ``1 - mean cos(student RoI embedding, teacher embedding of the crop)`` (CLIPSelf, ICLR 2024, equation 2).

    Args:
        student, teacher: models of one architecture; the teacher is the frozen start model.
        cosine_weight: factor of the loss.
        extract_type: ``"v2"`` (RoIAlign) or ``"v1"`` (masked tokens, CLIP ViT only).
        multiscale: resize each step's images to a random size, bilinearly.
        world_size: number of processes.
        teacher_chunk: crops that the teacher embeds at a time; bounds memory, changes nothing else.
    """

    def __init__(
        self,
        *,
        student: CLIP,
        teacher: CLIP | None,
        cosine_weight: float = 1.0,
        extract_type: str = "v2",
        multiscale: bool = False,
        world_size: int = 1,
        teacher_chunk: int = 256,
    ) -> None:
        super().__init__(student=student, teacher=teacher, world_size=world_size)
        self.cosine_weight, self.extract_type, self.multiscale = cosine_weight, extract_type, multiscale
        self.teacher_chunk = teacher_chunk
        self.size: int | None = None
        if extract_type == "v2":
            self.freeze_for_regions()
        else:  # every block attends; only the text side and the temperature are out of reach
            student.lock_text_tower()
            student.logit_scale.requires_grad_(False)

    def begin_step(self, batches: list[dict], *, seed: int) -> None:
        """Count regions over all processes and draw the step's input size (the same everywhere)."""
        super().begin_step(batches, seed=seed)
        if self.multiscale:
            side = batches[0]["images"].shape[-1]
            self.size = random.Random(seed).choice(multiscale_sizes(side, self.student.visual.patch_size))

    @torch.no_grad()
    def teach(self, batch: dict) -> Tensor:
        """Teacher embeddings ``[K, D]`` of the crops, unit length; those of the batch when it carries them."""
        if batch.get("teacher_features") is not None:
            return batch["teacher_features"]
        crops = batch["crops"]
        if len(crops) == 0:
            return crops.new_zeros(0, self.student.embed_dim)
        return torch.cat([self.teacher.encode_image(c, normalize=True) for c in crops.split(self.teacher_chunk)])

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """``loss`` (see :class:`Method`) and, detached, ``cosine_sum`` and ``regions`` of this process.

        Args:
            batch: ``images [B, 3, S, S]``, ``boxes`` list of ``[K_i, 4]``, ``crops [K, 3, n, n]`` (or
                ``teacher_features [K, D]``).
        """
        images = batch["images"]
        if self.multiscale and self.size is not None and images.shape[-1] != self.size:
            images = F.interpolate(images, size=(self.size, self.size), mode="bilinear", align_corners=False)
        target = self.teach(batch)
        regions = self.student.encode_pseudo_boxes(
            images, batch["boxes"], normalize=True, extract_type=self.extract_type
        )
        cosine = (regions.float() * target.float()).sum(-1)
        loss = self.cosine_weight * (1 - cosine).sum() * self.scale
        return {
            "loss": loss,
            "cosine_sum": cosine.detach().sum(),
            "regions": torch.tensor(float(len(cosine)), device=loss.device),
        }
