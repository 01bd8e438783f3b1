"""RegionCLIP baseline: regions against noun embeddings, with a federated binary loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from open_clip import CLIP

from .base import RegionMethod


class RegionCLIP(RegionMethod):
    """Binary cross-entropy of region-noun logits over the classes of the step and as many random ones.

    Logits are ``exp(logit_scale) * cos(region, noun)``, without gradient to the scale. The classes are those present in
    the step on any process, filled up by uniform sampling without replacement (federated loss of Detic and RegionCLIP).
    Summed over classes, averaged over regions.

    Args:
        student: the model that trains.
        noun_embeddings: ``[C, D]``; normalised here.
        contrast_weight: factor of the loss.
        extract_type, multiscale: see :class:`~training.methods.base.RegionMethod`.
        num_classes: size of the class subset (all classes when there are fewer).
        world_size: number of processes.

    Attributes:
        classes: ids of the step's classes ``[min(num_classes, C)]`` or more, set by :meth:`begin_step`; assign to it
            to impose a subset.
    """

    def __init__(
        self,
        *,
        student: CLIP,
        noun_embeddings: Tensor,
        contrast_weight: float = 1.0,
        extract_type: str = "v2",
        multiscale: bool = False,
        num_classes: int = 100,
        world_size: int = 1,
    ) -> None:
        super().__init__(student=student, extract_type=extract_type, multiscale=multiscale, world_size=world_size)
        self.register_buffer("nouns", F.normalize(noun_embeddings.float(), dim=-1), persistent=False)
        self.contrast_weight = contrast_weight
        self.num_classes = min(num_classes, len(noun_embeddings))
        self.classes: Tensor | None = None

    def begin_step(self, batches: list[dict], *, seed: int) -> None:
        """Count regions, and choose the step's classes: the same on every process."""
        super().begin_step(batches, seed=seed)
        present = torch.zeros(len(self.nouns), device=self.nouns.device)
        for batch in batches:
            present[batch["labels"]] = 1
        present = self._sum_over_processes(present) > 0
        self.classes = self.choose_classes(present, seed)

    def choose_classes(self, present: Tensor, seed: int) -> Tensor:
        """Ids of the classes marked in ``present [C]`` (bool), filled up to ``num_classes`` with random others."""
        chosen = present.nonzero()[:, 0]
        missing = self.num_classes - len(chosen)
        if missing > 0:
            others = (~present).nonzero()[:, 0]
            # Drawn on the CPU so that every device draws alike.
            order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
            chosen = torch.cat([chosen, others[order[:missing].to(others.device)]])
        return chosen

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """``loss`` (see :class:`Method`) and, detached, ``correct_sum`` (top-1 among the classes) and ``regions``.

        Args:
            batch: ``images [B, 3, S, S]``, ``boxes`` list of ``[K_i, 4]``, ``labels [K]`` (noun rows).
        """
        if not self.count(batch):
            loss = self.zero_loss()
            return {"loss": loss, "correct_sum": torch.zeros_like(loss), "regions": torch.zeros_like(loss)}
        regions, labels = self.embed_regions(batch), batch["labels"]
        with torch.autocast(regions.device.type, enabled=False):
            logits = regions @ self.nouns[self.classes].T * self.student.logit_scale.detach().float().exp()
            target = (labels[:, None] == self.classes[None]).float()
            loss = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        return {
            "loss": self.contrast_weight * loss * self.scale,
            "correct_sum": (self.classes[logits.detach().argmax(1)] == labels).sum().float(),
            "regions": logits.new_tensor(float(len(labels))),
        }
