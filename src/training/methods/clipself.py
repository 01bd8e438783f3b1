"""CLIPSelf: dense region embeddings of the student match the teacher's embeddings of the region's crop."""

from __future__ import annotations

import torch
from torch import Tensor

from open_clip import CLIP

from .base import RegionMethod


class CLIPSelf(RegionMethod):
    """Loss ``1 - mean cos(student RoI embedding, teacher embedding of the crop)`` (CLIPSelf, ICLR 2024, equation 2).

    Args:
        student, teacher: models of one architecture; the teacher is the frozen start model. It may be None when every
            batch carries ``teacher_features``.
        cosine_weight: factor of the loss.
        extract_type, multiscale: see :class:`~training.methods.base.RegionMethod`.
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
        super().__init__(
            student=student, teacher=teacher, extract_type=extract_type, multiscale=multiscale, world_size=world_size
        )
        self.cosine_weight, self.teacher_chunk = cosine_weight, teacher_chunk

    def teach(self, batch: dict) -> Tensor:
        """Teacher embeddings ``[K, D]`` of the crops, unit length; those of the batch when it carries them."""
        if batch.get("teacher_features") is not None:
            return batch["teacher_features"]
        crops = batch["crops"]
        if len(crops) == 0:
            return crops.new_zeros(0, self.student.embed_dim)
        with torch.inference_mode():
            parts = [self.teacher.encode_image(c, normalize=True) for c in crops.split(self.teacher_chunk)]
        return torch.cat(parts)  # outside: the student's backward pass keeps it

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """``loss`` (see :class:`Method`) and, detached, ``cosine_sum`` and ``regions`` of this process.

        Args:
            batch: ``images [B, 3, S, S]``, ``boxes`` list of ``[K_i, 4]``, ``crops [K, 3, n, n]`` (or
                ``teacher_features [K, D]``).
        """
        if not self.count(batch):
            loss = self.zero_loss()
            return {"loss": loss, "cosine_sum": torch.zeros_like(loss), "regions": torch.zeros_like(loss)}
        target = self.teach(batch)
        cosine = (self.embed_regions(batch) * target.float()).sum(-1)
        return {
            "loss": self.cosine_weight * (1 - cosine).sum() * self.scale,
            "cosine_sum": cosine.detach().sum(),
            "regions": cosine.new_tensor(float(len(cosine))),
        }
