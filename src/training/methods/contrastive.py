"""Plain image-text contrastive training (CLIP)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from open_clip import CLIP
from training.methods.base import Method
from training.methods.contrast import contrast, rows_of_processes
from training.methods.registry import Entry, Setting


@dataclass(frozen=True)
class ContrastiveFlags:
    """Contrastive training has no flags of its own."""


class Contrastive(Method):
    """Symmetric cross-entropy over the cosines of all image-text pairs of the batch, over all processes (CLIP, 2021).

    Everything trains: both towers and the temperature. With gradient accumulation each micro-batch (of all processes)
    contrasts within itself: its negatives are fewer than those of one large batch.

    Args:
        student: the model that trains. A logit bias (SigLIP) has no effect on a softmax and is frozen.
        rank, world_size: this process among all.
    """

    groups = {"contrast": "pairs", "correct": "pairs"}
    logs = ("correct",)

    def __init__(self, *, student: CLIP, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(student=student, weights={"contrast": 1.0}, world_size=world_size)
        self.rank = rank
        if student.logit_bias is not None:
            student.logit_bias.requires_grad_(False)

    def counts(self, batch: dict) -> dict[str, float]:
        """Pairs of a batch."""
        return {"pairs": len(batch["texts"])}

    def _embed(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Image and text embeddings ``[B, D]``, float32, unit length."""
        images = self.embed_rows(self.student.encode_image, batch["images"])
        return images.float(), self.embed_rows(self.student.encode_text, batch["texts"]).float()

    def losses(self, batch: dict) -> dict[str, Tensor]:
        """The loss, and how many images find their text, summed over pairs."""
        counts = rows_of_processes(len(batch["texts"]), batch["images"].device, self.rank, self.world_size)
        loss, correct = contrast(*self._embed(batch), self.student.logit_scale, counts, self.rank)
        return {"contrast": loss, "correct": correct}

    def has_items(self, counts: dict[str, float]) -> bool:
        """Every process gathers, also one without pairs."""
        return True


def build(options: ContrastiveFlags, setting: Setting) -> Contrastive:
    """Contrastive training."""
    return Contrastive(student=setting.student, rank=setting.rank, world_size=setting.world_size)


METHOD = Entry(
    name="contrastive",
    summary="both towers from image-text pairs (CLIP, 2021)",
    options=ContrastiveFlags,
    build=build,
    sources=("contrastive",),
    losses=("contrast",),
    texts=True,
    trains_texts=True,
    learns_from=lambda options: ("captions",),
)
