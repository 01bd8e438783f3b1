"""Class scores of regions, the geometric mean of two judges, and the detections that are left of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from ovdet.parts.numbers import widened


def class_probabilities(logits: Tensor) -> Tensor:
    """Softmax of ``[K, C+1]`` over all classes and background, without the background's column: ``[K, C]``.

    Background competes with the classes (a region that looks like none of them gets small probabilities) but is no
    answer, and is not fused.
    """
    return widened(logits).softmax(dim=-1)[:, :-1]


def fuse(detector: Tensor, vlm: Tensor, base_mask: Tensor, *, weight_base: float, weight_novel: float) -> Tensor:
    """``p_det^(1-w) * p_vlm^w`` with w = ``weight_base`` (a) for base and ``weight_novel`` (b) for novel classes.

    Args:
        detector, vlm: probabilities ``[K, C]``.
        base_mask: bool ``[C]``.

    Returns:
        ``[K, C]`` in 0..1 (F-VLM, Kuo et al. 2023, eq. 4).
    """
    weight = torch.where(base_mask, detector.new_full((), weight_base), detector.new_full((), weight_novel))
    return detector.pow(1 - weight) * vlm.to(detector.dtype).pow(weight)


def select_detections(boxes: Tensor, scores: Tensor, *, score: float, iou: float, most: int) -> dict[str, Tensor]:
    """Class-wise NMS over boxes that all classes share: ``boxes``, ``scores``, ``labels`` by falling score, and
    ``rows``, of which box each is.

    Args:
        boxes: ``[K, 4]``; scores: ``[K, C]``.
        score: smaller or equal ones are dropped; iou: NMS threshold; most: kept at most.
    """
    row, label = (scores > score).nonzero().unbind(1)
    value, order = scores[row, label].sort(descending=True, stable=True)
    row, label = row[order], label[order]
    # Greedy NMS never looks down: what it keeps of the best n is what it keeps among them of all. With 1203 classes
    # there are a hundred thousand candidates, of which the first few thousand are enough.
    number = max(4 * most, 1000)
    while True:
        best = batched_nms(boxes[row[:number]], value[:number], label[:number], iou)[:most]
        if len(best) == most or number >= len(value):
            return {"boxes": boxes[row[best]], "scores": value[best], "labels": label[best], "rows": row[best]}
        number *= 4
