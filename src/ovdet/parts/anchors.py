"""Anchor boxes on levels of any stride, fractions included."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def level_anchors(
    grid: tuple[int, int],
    stride: float,
    scale: float,
    ratios: Sequence[float],
    device: torch.device | str = "cpu",
    *,
    offset: float = 0.0,
) -> Tensor:
    """Anchors of one level, float32 ``[h*w*A, 4]`` xyxy in input pixels, cell by cell, ratios innermost; not to be
    changed in place.

    Centred at ``((x + offset) * stride, (y + offset) * stride)``, of area ``(scale * stride)^2`` and height / width =
    ratio. (torchvision's generator rounds the stride to whole pixels: 3.5 would become 3, off by 128 pixels at 896.)

    Args:
        grid: cells (h, w).
        stride: input pixels per cell.
        scale: side of a square anchor in strides.
        offset: of the centre, in cells: 0 (as in MMDetection and torchvision) or 0.5, the cell's own centre.
    """
    return _level_anchors(tuple(grid), stride, scale, tuple(ratios), torch.device(device), offset)


@lru_cache(maxsize=64)  # a few megabytes for each grid that occurs, instead of a dozen small operations every step
def _level_anchors(
    grid: tuple[int, int], stride: float, scale: float, ratios: tuple[float, ...], device: torch.device, offset: float
) -> Tensor:
    with torch.inference_mode(False):  # what inference makes could not be used in training
        root = torch.tensor(ratios, dtype=torch.float32, device=device).sqrt()
        half = torch.stack([1 / root, root], dim=-1) * (scale * stride / 2)  # [A, 2]: half width, half height
        y, x = ((torch.arange(n, dtype=torch.float32, device=device) + offset) * stride for n in grid)
        centre = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 1, 2)  # [h*w, 1, 2]
        return torch.cat([centre - half, centre + half], dim=-1).reshape(-1, 4)
