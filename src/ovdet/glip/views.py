"""Tests at several sizes, and mirrored: the detections of an image's views put together.

Published figures of GLIP-L "multi-scale" are of such tests (twelve sizes from 400 to 1800 pixels, each mirrored too).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from ovdet.glip import boxes as ops
from ovdet.glip.data.dataset import pad_images
from ovdet.glip.data.transforms import resized_view, target_size
from ovdet.glip.decode import MERGES, Selection, at_most

Found = dict[str, Tensor]


@dataclass(frozen=True)
class Views:
    """What is looked at in place of an image at one size.

    Attributes:
        sides: shorter sides in pixels, a view for each; longest: largest longer side.
        mirror: each view also mirrored. Texts that speak of left or right are not asked of mirrored views.
        ranges: for each of ``sides`` the (least, largest) root of a box's area, in pixels of the file, that its view
            may find; empty for any. Large views are for small objects, small views for large ones.
        merge: ``"nms"`` keeps the best box of those that overlap; ``"vote"`` replaces it by the mean of all boxes of
            its class with at least the IoU of NMS, weighted by their scores (Gidaris and Komodakis, 2015).
    """

    sides: tuple[int, ...]
    longest: int = 2500
    mirror: bool = False
    ranges: tuple[tuple[float, float], ...] = ()
    merge: str = "nms"

    def __post_init__(self) -> None:
        if self.merge not in MERGES:
            raise ValueError(f'detections of several views are merged by "{self.merge}": use {" or ".join(MERGES)}')
        if self.ranges and len(self.ranges) != len(self.sides):
            raise ValueError(f"{len(self.ranges)} ranges for {len(self.sides)} sizes: give one for each, or none")

    def __iter__(self) -> Iterator[tuple[int, tuple[float, float], bool]]:
        """(shorter side, range of box sides, whether mirrored) of each view."""
        ranges = self.ranges or [(0.0, math.inf)] * len(self.sides)
        for side, limits in zip(self.sides, ranges, strict=True):
            for mirrored in (False, True) if self.mirror else (False,):
                yield side, limits, mirrored


def detect_views(
    detect: Callable[[Tensor, list[tuple[int, int]], bool], Sequence[Found | None]],
    images: Tensor,
    sizes: Sequence[tuple[int, int]],
    views: Views,
    groups: Sequence[Sequence[Sequence[int]]],
    options: Selection,
    divisor: int,
) -> list[Found]:
    """Detections of images from all their views, by falling score.

    Args:
        detect: called as ``detect(batch, sizes, mirrored)`` with the views of all images, uint8 ``[B, 3, h, w]``; gives
            ``boxes`` (in pixels of the file, mirrored where the view is), ``scores`` and ``labels`` of each, or None.
        images: those of the files, uint8 ``[B, 3, H, W]``, padded right and bottom; sizes: (height, width) of each.
        groups: per image the labels of each prompt; ``options.per_image`` counts for a prompt.
        divisor: of a batch's padded sides.
    """
    parts: list[list[Found]] = [[] for _ in sizes]
    nothing = images.new_zeros(0, 4, dtype=torch.float32)
    for side, limits, mirrored in views:
        scaled = [
            resized_view(image[:, :h, :w], nothing, target_size(h, w, side, views.longest), flip=mirrored)[0]
            for image, (h, w) in zip(images, sizes, strict=True)
        ]
        for part, found, (_, width) in zip(parts, detect(*pad_images(scaled, divisor), mirrored), sizes, strict=True):
            if found is not None:
                part.append(_of_view(found, limits, width if mirrored else None))
    return [merge_views(part, of, options, views.merge) for part, of in zip(parts, groups, strict=True)]


def _of_view(found: Found, limits: tuple[float, float], width: int | None) -> Found:
    """Detections of a size that the view is for, on the image as it is; ``width`` of the image if it was mirrored."""
    boxes = found["boxes"]
    side = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1).sqrt()
    keep = (side >= limits[0]) & (side <= limits[1])
    if width is not None:
        boxes = ops.to_exclusive(ops.mirror(ops.to_inclusive(boxes), width))
    return {"boxes": boxes[keep], "scores": found["scores"][keep], "labels": found["labels"][keep]}


def merge_views(parts: Sequence[Found], groups: Sequence[Sequence[int]], options: Selection, merge: str) -> Found:
    """Detections of one image from several views.

    Args:
        parts: of the views; groups: the labels of each prompt.
        options: ``nms`` and, for each prompt, ``per_image`` count; merge: see :class:`Views`.
    """
    boxes, scores, labels = (torch.cat([part[key] for part in parts]) for key in ("boxes", "scores", "labels"))
    kept = batched_nms(boxes, scores, labels, options.nms)
    chosen = []
    for group in groups:
        mine = kept[torch.isin(labels[kept], torch.tensor(list(group), device=labels.device))]
        chosen.append(at_most(scores[mine], mine, options.per_image))
    kept = torch.cat(chosen) if chosen else kept[:0]
    kept = kept[scores[kept].argsort(descending=True, stable=True)]
    found = boxes[kept]
    if merge == "vote" and len(kept):
        # In parts: 1203 classes in many views are tens of thousands of boxes.
        found = torch.cat([_votes(part, boxes, scores, labels, options.nms) for part in kept.split(256)])
    return {"boxes": found, "scores": scores[kept], "labels": labels[kept]}


def _votes(kept: Tensor, boxes: Tensor, scores: Tensor, labels: Tensor, iou: float) -> Tensor:
    """Mean boxes ``[K, 4]`` of those kept (rows of ``boxes``) and all others of their class that overlap so much."""
    weights = scores * (labels[kept][:, None] == labels) * (box_iou(boxes[kept], boxes) >= iou)
    total = weights.sum(1, keepdim=True)
    return torch.where(total > 0, weights @ boxes / total.clamp(min=1e-12), boxes[kept])
