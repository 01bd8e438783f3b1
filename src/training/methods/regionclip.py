"""RegionCLIP baseline: regions against noun embeddings, with a federated binary loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_clip import CLIP
from training.engine.flags import NOT_NEGATIVE, flag
from training.methods.base import RegionFlags, RegionMethod
from training.methods.registry import Entry, Setting


@dataclass(frozen=True)
class RegionCLIPFlags(RegionFlags):
    """Flags of RegionCLIP."""

    contrast_weight: float = flag(1.0, "weight of the binary loss over nouns", type=NOT_NEGATIVE)
    train_embed_path: str = flag(
        "", "noun embeddings [C, D] of the categories of --train-data; computed when empty", metavar="FILE"
    )


class RegionCLIP(RegionMethod):
    """Binary cross-entropy of region-noun logits over the classes of the step and as many random ones.

    Logits are ``exp(logit_scale) * cos(region, noun)``, without gradient to the scale. The classes are those present in
    the step on any process, filled up by uniform sampling without replacement (federated loss of Detic and RegionCLIP).
    Summed over classes, averaged over regions.

    Args:
        student: the model that trains.
        noun_embeddings: ``[C, D]``; normalised here.
        contrast_weight: factor of the loss.
        num_classes: size of the class subset (all classes when there are fewer).
        more: see :class:`~training.methods.base.RegionMethod`.

    Attributes:
        classes: ids of the step's classes ``[min(num_classes, C)]`` or more, set by :meth:`begin_step`; assign to it
            to impose a subset.
    """

    logs = ("correct",)

    def __init__(
        self, *, student: CLIP, noun_embeddings: Tensor, contrast_weight: float = 1.0, num_classes: int = 100,
        **more: Any,
    ) -> None:  # fmt: skip
        super().__init__(student=student, weights={"contrast": contrast_weight}, **more)
        self.register_buffer("nouns", F.normalize(noun_embeddings.float(), dim=-1), persistent=False)
        self.num_classes = min(num_classes, len(noun_embeddings))
        self.classes: Tensor | None = None

    def prepare(self, batches: list[dict], *, seed: int) -> None:
        """Choose the step's classes: the same on every process."""
        super().prepare(batches, seed=seed)
        present = torch.zeros(len(self.nouns), device=self.nouns.device)
        for batch in batches:
            present[batch["labels"]] = 1
        present = self.sum_over_processes(present) > 0
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

    def losses(self, batch: dict) -> dict[str, Tensor]:
        """The loss, and how many regions rank their class first, summed over regions."""
        regions, labels = self.embed_regions(batch), batch["labels"]
        with torch.autocast(regions.device.type, enabled=False):
            logits = regions @ self.nouns[self.classes].T * self.student.logit_scale.detach().float().exp()
            target = (labels[:, None] == self.classes[None]).float()
            loss = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        correct = (self.classes[logits.detach().argmax(1)] == labels).sum().float()
        return {"contrast": loss, "correct": correct}


def build(options: RegionCLIPFlags, setting: Setting) -> RegionCLIP:
    """RegionCLIP as the flags say."""
    return RegionCLIP(
        **setting.common(), noun_embeddings=setting.embed(None), contrast_weight=options.contrast_weight,
        extract_type=options.extract_type, multiscale=options.multiscale,
    )  # fmt: skip


METHOD = Entry(
    name="regionclip",
    summary="region embeddings against nouns, from region-text pairs (RegionCLIP, CVPR 2022)",
    options=RegionCLIPFlags,
    build=build,
    sources=("region_clip",),
    losses=("contrast",),
    fields=lambda options: ("labels",),
    learns_from=lambda options: ("class names",),
    recipes={
        "regionclip-b16": "--model EVA02-CLIP-B-16 --lock-image --lock-image-unlocked-groups 12 --alpha 0.7",
        "regionclip-l14": "--model EVA02-CLIP-L-14-336 --det-image-size 896 --lock-image "
        "--lock-image-unlocked-groups 24 --alpha 0.95",
    },
)
