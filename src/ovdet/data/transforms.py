"""Large-scale jitter with crop and flip for training, longest side with padding for testing.

Images are uint8 RGB ``[3, H, W]``, boxes float32 ``[N, 4]`` xyxy in pixels. What is beyond an image in its padded
square is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from open_clip.transform import pad_to, resize

RESIZES = ("bilinear", "bicubic")


@dataclass(frozen=True)
class View:
    """One random view of an image: scaled to ``scaled``, then cut to the window, then mirrored; (height, width)."""

    scaled: tuple[int, int]
    top: int
    left: int
    size: tuple[int, int]
    flip: bool


def scaled_size(height: int, width: int, target: float) -> tuple[int, int]:
    """(height, width) of an image whose longest side becomes ``target``: halves are rounded up, at least 1 pixel."""
    factor = target / max(height, width)
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def draw_view(
    rng: Generator,
    height: int,
    width: int,
    *,
    size: int,
    jitter: Sequence[float],
    flip: float,
    whole_target: bool = True,
) -> View:
    """Large-scale jitter (Ghiasi et al. 2021).

    The image is scaled, with its aspect ratio, so that its longest side is ``size`` times a factor uniform in
    ``jitter``; of what is larger than ``size`` a random window is kept.

    Args:
        whole_target: whether the longest side is cut down to whole pixels before the other side follows from it, as in
            MMDetection; otherwise both sides are rounded, halves to even.
    """
    ratio = rng.uniform(*jitter)
    if whole_target:
        scaled = scaled_size(height, width, max(int(size * ratio), 1))
    else:
        scale = size * ratio / max(height, width)
        scaled = max(round(height * scale), 1), max(round(width * scale), 1)
    window = min(scaled[0], size), min(scaled[1], size)
    top, left = (int(rng.integers(0, full - part + 1)) for full, part in zip(scaled, window, strict=True))
    return View(scaled, top, left, window, bool(rng.random() < flip))


def resize_to(image: Tensor, size: tuple[int, int], how: str) -> Tensor:
    """Resize to (height, width).

    Args:
        how: ``"bilinear"``: without antialias, as OpenCV does; ``"bicubic"``: with antialias, as in CLIP's training.
    """
    if how == "bicubic":
        return resize(image, *size)
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return TF.resize(image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=False)


def apply_view(image: Tensor, view: View, size: int, how: str = "bilinear") -> Tensor:
    """The view of an image ``[3, size, size]``, padded right and bottom with 0."""
    image = resize_to(image, view.scaled, how)
    image = image[:, view.top : view.top + view.size[0], view.left : view.left + view.size[1]]
    return pad_to(image.flip(-1) if view.flip else image, size)


def apply_view_to_boxes(boxes: Tensor, view: View, original: tuple[int, int]) -> Tensor:
    """Boxes ``[N, 4]`` in pixels of the view, cut off at its window.

    Args:
        original: (height, width) of the image, which boxes must be in.
    """
    (rows, columns), (height, width) = view.scaled, view.size
    scale = torch.tensor([columns / original[1], rows / original[0]] * 2, dtype=torch.float32)
    full = torch.tensor([columns, rows] * 2, dtype=torch.float32)
    boxes = torch.minimum((boxes.reshape(-1, 4).float() * scale).clamp(min=0), full)
    boxes = boxes - torch.tensor([view.left, view.top] * 2, dtype=torch.float32)
    boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height] * 2, dtype=torch.float32))
    if view.flip:
        boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    return boxes


def source_pixels(start: int, count: int, scaled: int, original: int, *, centre: bool = False) -> np.ndarray:
    """Source index of each of ``count`` scaled pixels from ``start`` on, by nearest neighbour: int64, rising.

    Args:
        centre: that under the scaled pixel's centre; otherwise that at its beginning, as OpenCV and torch's "nearest"
            take it.
    """
    place = (np.arange(start, start + count) + (0.5 if centre else 0.0)) * (original / scaled)
    return np.clip(np.floor(place).astype(np.int64), 0, original - 1)


def test_view(image: Tensor, size: int, how: str = "bilinear") -> tuple[Tensor, tuple[int, int]]:
    """(image ``[3, size, size]``, longest side at ``size``, padded right and bottom; (height, width) of its area)."""
    image = resize_to(image, scaled_size(*image.shape[-2:], size), how)
    return pad_to(image, size), (image.shape[-2], image.shape[-1])


test_view.__test__ = False  # no test, though its name begins like one
