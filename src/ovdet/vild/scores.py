"""What ViLD makes of regions, classes and a teacher: targets, the distillation loss, scores, expansion by attributes.

Golden numbers of all of it: tests/golden/vild. Equations are those of Gu et al. 2022 (arXiv 2104.13921).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ovdet.parts.classifier import CosineClassifier
from ovdet.parts.numbers import widened
from ovdet.parts.scores import class_probabilities


def teacher_target(*views: Tensor) -> Tensor:
    """Unit-length sum of a region's raw embeddings ``[M, D]``, such as those of its crop at 1 and 1.5 times the box.

    They are added as the teacher gives them: bringing each to unit length first is another target.
    """
    return F.normalize(sum(widened(view) for view in views), dim=-1)


def image_loss(student: Tensor, target: Tensor) -> Tensor:
    """Distillation loss (eq. 3): mean over regions of ``sum_d |unit(student) - target|``; 0 for none.

    Args:
        student: ``[M, D]``, of any length; target: ``[M, D]``, unit length.
    """
    distance = (F.normalize(widened(student), dim=-1) - target.to(widened(student).dtype)).abs().sum()
    return distance / max(len(student), 1)


def with_background(class_embeddings: Tensor, background: Tensor) -> Tensor:
    """Class embeddings ``[C, D]`` of unit length and, last, the learned background ``[D]`` brought to it."""
    unit = F.normalize(widened(background), dim=0).to(widened(class_embeddings).dtype)
    return torch.cat([widened(class_embeddings), unit[None]])


def cosine_logits(regions: Tensor, embeddings: Tensor, temperature: float) -> Tensor:
    """``cosine / temperature``, ``[N, C]``.

    Args:
        regions: ``[N, D]``, of any length; embeddings: ``[C, D]``, unit length.
        temperature: tau; 0.01 in ViLD.
    """
    return CosineClassifier(1 / temperature, "fixed")(regions, embeddings)


def plain_probabilities(logits: Tensor) -> Tensor:
    """Softmax over classes ``[N, C]``, with no background among them."""
    return widened(logits).softmax(dim=-1)


def scores_with_objectness(probabilities: Tensor, objectness: Tensor) -> Tensor:
    """Geometric mean of class probabilities ``[N, C]`` and objectness ``[N]`` in 0..1: CLIP on proposals."""
    return (probabilities * objectness.to(probabilities.dtype)[:, None]).sqrt()


class Expansion(NamedTuple):
    """A vocabulary of classes times attributes, for regions (section 4.4)."""

    classes: Tensor  # [N, p]
    attributes: Tensor  # [N, q]

    @property
    def joint(self) -> Tensor:
        """``Pr(class, attribute)``, ``[N, p, q]``: independent given the region."""
        return self.classes[:, :, None] * self.attributes[:, None]


def expand(
    regions: Tensor,
    classes: Tensor,
    attributes: Tensor,
    *,
    temperature: float,
    attribute_temperature: float = 0.0,
    background: Tensor | None = None,
) -> Expansion:
    """Probabilities of classes and of attributes of regions: p + q embeddings stand for p times q labels.

    Args:
        regions: ``[N, D]``; classes: ``[p, D]`` and attributes: ``[q, D]`` of unit length.
        attribute_temperature: tau of the attributes' softmax; 0: the same.
        background: ``[D]``, competes with the classes and is dropped after the softmax, so that a region's joint
            probabilities sum to 1 - p(background).
    """
    of_attributes = plain_probabilities(cosine_logits(regions, attributes, attribute_temperature or temperature))
    if background is None:
        return Expansion(plain_probabilities(cosine_logits(regions, classes, temperature)), of_attributes)
    logits = cosine_logits(regions, with_background(classes, background), temperature)
    return Expansion(class_probabilities(logits), of_attributes)
