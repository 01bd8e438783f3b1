"""Anchors and box arithmetic of GLIP: one square anchor a cell, and boxes whose last pixel is inside.

Boxes are ``[..., 4]`` xyxy in pixels of the network's input. Unlike everywhere else in this project, x2 and y2 here are
the last pixel that belongs to a box: its width is ``x2 - x1 + 1``. :func:`to_inclusive` and :func:`to_exclusive` lead
in and out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ANCHOR_SCALE = 8  # anchor side in strides
WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of dx, dy, dw, dh
_MOST_LOG = math.log(1000 / 16)


def to_inclusive(boxes: Tensor) -> Tensor:
    """Ordinary xyxy to boxes that name their last pixel."""
    return boxes - boxes.new_tensor([0, 0, 1, 1])


def to_exclusive(boxes: Tensor) -> Tensor:
    """The inverse of :func:`to_inclusive`."""
    return boxes + boxes.new_tensor([0, 0, 1, 1])


def cell_anchor(stride: float) -> tuple[float, float, float, float]:
    """The anchor of the first cell, side ``8 * stride``: ``(-28, -28, 35, 35)`` for stride 8."""
    centre, half = stride / 2 - 0.5, (ANCHOR_SCALE * stride - 1) / 2
    return centre - half, centre - half, centre + half, centre + half


def level_anchors(grid: tuple[int, int], stride: float, device: torch.device | str = "cpu") -> Tensor:
    """Anchors ``[height * width, 4]`` of a level, row by row; those outside the image stay."""
    y = torch.arange(grid[0], device=device, dtype=torch.float32) * stride
    x = torch.arange(grid[1], device=device, dtype=torch.float32) * stride
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    shift = torch.stack([columns, rows, columns, rows], dim=-1).reshape(-1, 4)
    return shift + torch.tensor(cell_anchor(stride), device=device)


def make_anchors(
    grids: Sequence[tuple[int, int]], strides: Sequence[float], device: torch.device | str = "cpu"
) -> Tensor:
    """Anchors ``[N, 4]`` of all levels, in the order of the head's output."""
    return torch.cat([level_anchors(g, s, device) for g, s in zip(grids, strides, strict=True)])


def area(boxes: Tensor) -> Tensor:
    """Pixels inside ``[...]``."""
    return (boxes[..., 2] - boxes[..., 0] + 1) * (boxes[..., 3] - boxes[..., 1] + 1)


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union ``[N, M]`` of ``[N, 4]`` and ``[M, 4]``."""
    low = torch.maximum(first[:, None, :2], second[:, :2])
    high = torch.minimum(first[:, None, 2:], second[:, 2:])
    shared = (high - low + 1).clamp(min=0).prod(-1)
    return shared / (area(first)[:, None] + area(second) - shared)


def _centre_side(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2] + 1


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Offsets ``[..., 4]`` of boxes from anchors: 10 dx / w, 10 dy / h, 5 log(w'/w), 5 log(h'/h)."""
    (centre, side), (anchor_centre, anchor_side) = _centre_side(boxes), _centre_side(anchors)
    offsets = torch.cat([(centre - anchor_centre) / anchor_side, (side / anchor_side).log()], dim=-1)
    return offsets * offsets.new_tensor(WEIGHTS)


def decode(offsets: Tensor, anchors: Tensor) -> Tensor:
    """Inverse of :func:`encode`; sides grow at most 62.5 times."""
    offsets = offsets / offsets.new_tensor(WEIGHTS)
    centre, side = _centre_side(anchors)
    centre = centre + offsets[..., :2] * side
    side = side * offsets[..., 2:].clamp(max=_MOST_LOG).exp()
    half = (side - 1) / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def clip(boxes: Tensor, size: tuple[int, int] | Tensor) -> Tensor:
    """Boxes within an image of (height, width) pixels."""
    height, width = (int(v) for v in size)
    limits = boxes.new_tensor([width - 1, height - 1, width - 1, height - 1])
    return torch.minimum(boxes.clamp(min=0), limits)


def rescale(boxes: Tensor, size: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Boxes of an image of (height, width) pixels in the same image of another size."""
    y, x = (new / old for new, old in zip(target, size, strict=True))
    return boxes * boxes.new_tensor([x, y, x, y])


def mirror(boxes: Tensor, width: int) -> Tensor:
    """Boxes of the mirrored image."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([width - 1 - x2, y1, width - 1 - x1, y2], dim=-1)


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """How central points ``[N, 2]`` are in boxes ``[N, 4]`` around them: 1 at the centre, 0 at the border (FCOS)."""
    low, high = points - boxes[:, :2], boxes[:, 2:] - points
    ratio = torch.minimum(low, high) / torch.maximum(low, high)
    return ratio.prod(-1).sqrt()
