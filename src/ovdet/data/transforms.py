"""Large-scale jitter with crop and flip for training, longest side with padding for testing.

Images are uint8 RGB ``[3, H, W]``, boxes float32 ``[N, 4]`` xyxy in pixels, masks bool ``[N, H, W]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from numpy.random import Generator
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from open_clip.transform import pad_to, resize_longest


@dataclass(frozen=True)
class View:
    """One random view of an image: scaled to ``scaled``, then cut to the window, then mirrored; (height, width)."""

    scaled: tuple[int, int]
    top: int
    left: int
    size: tuple[int, int]
    flip: bool


def draw_view(rng: Generator, height: int, width: int, *, size: int, jitter: Sequence[float], flip: float) -> View:
    """Large-scale jitter (Ghiasi et al. 2021).

    The image is scaled, with its aspect ratio, so that its longest side is ``size`` times a factor uniform in
    ``jitter``; of what is larger than ``size`` a random window is kept.
    """
    scale = size * rng.uniform(*jitter) / max(height, width)
    h, w = max(round(height * scale), 1), max(round(width * scale), 1)
    window = min(h, size), min(w, size)
    top, left = (int(rng.integers(0, full - part + 1)) for full, part in zip((h, w), window, strict=True))
    return View((h, w), top, left, window, bool(rng.random() < flip))


def apply_view(image: Tensor, boxes: Tensor, view: View, size: int) -> tuple[Tensor, Tensor]:
    """(image ``[3, size, size]``, padded right and bottom with black; boxes ``[N, 4]``, cut off at the window)."""
    pair = (
        tv_tensors.Image(image),
        tv_tensors.BoundingBoxes(boxes.reshape(-1, 4), format="XYXY", canvas_size=tuple(image.shape[-2:])),
    )
    done = []
    for value in pair:
        value = TF.resize(value, list(view.scaled), interpolation=InterpolationMode.BICUBIC, antialias=True)
        value = TF.crop(value, view.top, view.left, *view.size)
        done.append(TF.horizontal_flip(value) if view.flip else value)
    return pad_to(done[0].as_subclass(Tensor), size), done[1].as_subclass(Tensor)


def apply_view_to_masks(masks: Tensor, view: View, size: int) -> Tensor:
    """Masks ``[N, H, W]`` to bool ``[N, size, size]``: nearest neighbour, the same window and mirroring.

    Rows and columns are gathered directly, so that the scaled masks, up to four times the crop's area each, never
    exist.
    """
    rows = _source(view.top, view.size[0], view.scaled[0], masks.shape[-2])
    columns = _source(view.left, view.size[1], view.scaled[1], masks.shape[-1])
    if view.flip:
        columns = columns.flip(0)
    out = torch.zeros(len(masks), size, size, dtype=torch.bool)
    out[:, : view.size[0], : view.size[1]] = masks[:, rows][:, :, columns]
    return out


def _source(start: int, count: int, scaled: int, original: int) -> Tensor:
    """Source index of each of ``count`` scaled pixels from ``start`` on: that under the pixel's centre."""
    centres = (torch.arange(start, start + count, dtype=torch.float64) + 0.5) * (original / scaled)
    return centres.floor().long().clamp(0, original - 1)


def boxes_of_masks(masks: Tensor) -> Tensor:
    """Tight boxes ``[N, 4]`` of masks, right and bottom edges behind the last pixel; zeros for an empty mask."""
    boxes = []
    for along in (2, 1):  # over columns, then rows: where a row, or column, holds anything
        any_ = masks.any(along)
        first = any_.int().argmax(1)
        last = any_.shape[1] - any_.flip(1).int().argmax(1)
        empty = ~any_.any(1)
        boxes.append((first.masked_fill(empty, 0), last.masked_fill(empty, 0)))
    (top, bottom), (left, right) = boxes
    return torch.stack([left, top, right, bottom], 1).float()


def test_view(image: Tensor, size: int) -> tuple[Tensor, tuple[int, int]]:
    """(image ``[3, size, size]``, longest side at ``size``, padded right and bottom; (height, width) of its area)."""
    image = resize_longest(image, size)
    return pad_to(image, size), (image.shape[-2], image.shape[-1])


test_view.__test__ = False  # no test, though its name begins like one
