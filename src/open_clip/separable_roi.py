"""RoIAlign to 1x1 as two small matrix products.

A box's value is the mean over a grid of samples, each bilinear between four cells. Rows and columns of the grid enter
apart, so the mean is ``wy^T F wx`` with one weight per row and per column of the map. The products are deterministic on
every device (torchvision's backward pass adds with atomics on a GPU) and need nothing from the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def _axis_weights(low: Tensor, high: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Weights ``[K, cells]`` of the cells along one axis, summed over samples, and the number of samples ``[K]``.

    Samples lie half a step inside the box, ``ceil(size)`` of them, at most a cell apart. Outside -1..cells one counts
    as zero; beyond the outermost centres it takes the outermost cell. Coordinates are computed in the order and type
    in which torchvision does, so that a sample on such a limit falls on the same side.
    """
    start = low - 0.5
    size = (high - 0.5) - start
    count = size.ceil().clamp(min=0)
    divisor = count.clamp(min=1)
    # Steps are longer than half a cell unless there is but one sample, so of however many only 2 (cells + 1) can lie
    # inside, from here on.
    first = ((-1 - start) * divisor / size.clamp(min=torch.finfo(size.dtype).tiny)).ceil() - 2
    index = first.clamp(min=0)[:, None] + torch.arange(2 * cells + 6, device=low.device, dtype=low.dtype)
    position = start[:, None] + (index + 0.5) * size[:, None] / divisor[:, None]
    inside = (index < count[:, None]) & (position >= -1) & (position <= cells)
    position = torch.where(inside, position, 0).clamp(0, cells - 1)
    near = 1 - (position[:, :, None] - torch.arange(cells, device=low.device, dtype=low.dtype)).abs()
    return torch.where(inside[:, :, None], near.clamp(min=0), 0).sum(1), count


def separable_roi_align(features: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    """``torchvision.ops.roi_align(features, boxes, (1, 1), 1.0, -1, True)``, to rounding.

    The work is that of one dense product per box, whatever its size: on a CPU less than torchvision's up to a hundred
    boxes an image (forward and backward pass), more for a thousand small ones.

    Args:
        features: float32 or float64 ``[B, D, h, w]``.
        boxes: per image ``[K_i, 4]`` of the same type, xyxy in cells; ``K_i`` may be 0. They get no gradient. Up to
            1e5 cells away from the map; reversed ones give zeros (torchvision fails on them).

    Returns:
        ``[sum K_i, D, 1, 1]``, images one after the other.
    """
    height, width = features.shape[-2:]
    pooled = []
    for one, corners in zip(features, boxes, strict=True):
        rows, down = _axis_weights(corners[:, 1], corners[:, 3], height)
        columns, across = _axis_weights(corners[:, 0], corners[:, 2], width)
        bands = one @ columns.T  # [D, h, K]
        sums = torch.einsum("dhk,kh->kd", bands, rows)
        pooled.append(sums / (down * across).clamp(min=1)[:, None])
    if not pooled:
        return features.new_zeros(0, features.shape[1], 1, 1)
    return torch.cat(pooled)[:, :, None, None]
