"""Sizes, resizing and mirroring of images with their boxes."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from open_clip.transform import resize
from ovdet.glip import boxes as ops

_SIDES = re.compile(r"\b(left|right)(most|hand|ward|wards)?\b", re.IGNORECASE)


def target_size(height: int, width: int, shorter: int, longest: int) -> tuple[int, int]:
    """(height, width) after resizing: the shorter side as asked, or less where the longer would exceed ``longest``."""
    low, high = min(height, width), max(height, width)
    if high / low * shorter > longest:
        shorter = max(round(longest * low / high), 1)
    if low == shorter:
        return height, width
    if width < height:
        return int(shorter * height / width), shorter
    return shorter, int(shorter * width / height)


def names_a_side(text: str) -> bool:
    """Whether a text speaks of left or right, which a mirrored image would turn into a lie."""
    return _SIDES.search(text) is not None


def resized_view(image: Tensor, boxes: Tensor, size: tuple[int, int], *, flip: bool) -> tuple[Tensor, Tensor]:
    """An image uint8 ``[3, H, W]`` and boxes ``[N, 4]`` (inclusive ends) at another size, mirrored if asked."""
    old = (image.shape[-2], image.shape[-1])
    image, boxes = resize(image, *size, interpolation="bilinear"), ops.rescale(boxes, old, size)
    if flip:
        image, boxes = image.flip(-1), ops.mirror(boxes, size[1])
    return image, boxes


def usable_boxes(boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(boxes cut off at the image, which of them keep an extent); ``boxes`` ``[N, 4]`` xyxy as annotated.

    The result has inclusive ends, as published training reads COCO's boxes.
    """
    clipped = ops.clip(ops.to_inclusive(boxes), size)
    good = ((clipped[:, 2:] - clipped[:, :2]) > 0).all(1) if len(clipped) else torch.zeros(0, dtype=torch.bool)
    return clipped, good
