"""Masks of panoptic segments on the feature grid."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from open_clip.transform import detection_size


@lru_cache(maxsize=256)
def _bicubic_taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels read and their weights when ``source`` pixels become ``target``, bicubically without antialias.

    Four taps per target cell (A = -0.75, half-pixel centres, border repeated), in float32 like torch's own kernel, so
    that even the sign of a sum that nearly cancels agrees. Returns indices int64 and weights, each ``[4, target]``.
    """
    scale = torch.tensor(source, dtype=torch.float32) / target
    position = scale * (torch.arange(target, dtype=torch.float32) + 0.5) - 0.5
    start = position.floor()
    t = position - start
    a = -0.75

    def near(x: Tensor) -> Tensor:  # distance 0..1
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: Tensor) -> Tensor:  # distance 1..2
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    weights = torch.stack([far(t + 1), near(t), near(1 - t), far(2 - t)])
    indices = (start.long() + torch.arange(-1, 3)[:, None]).clamp(0, source - 1)
    return indices.numpy(), weights.numpy()


def grid_masks(ids: np.ndarray, segments: np.ndarray, grid: int, *, antialias: bool = False) -> Tensor:
    """Masks of segments on the feature grid.

    Each mask is resized bicubically so that its longest side is ``grid`` (the image's own resize, divided by the patch
    size), padded right and bottom, and is true where the result is above 0. Small masks may vanish without antialias;
    such a mask becomes the one cell that holds the mask's pixel nearest to its centre of mass.

    Without antialias only 4 x 4 pixels per cell matter, so only those are looked at, for all segments together.

    Args:
        ids: int32 ``[H, W]``, segment id of each pixel.
        segments: int32 ``[K]``, ids that occur in ``ids``.
        grid: cells of a side.
        antialias: torchvision's default of today, which widens masks.

    Returns:
        bool ``[K, grid, grid]``.
    """
    height, width = ids.shape
    rows, columns, scale = detection_size(height, width, grid)
    masks = torch.zeros(len(segments), grid, grid, dtype=torch.bool)
    if antialias:
        full = torch.from_numpy(ids == segments[:, None, None]).float()
        resized = F.interpolate(full[None], (rows, columns), mode="bicubic", align_corners=False, antialias=True)[0]
        masks[:, :rows, :columns] = resized > 0
    else:
        (y, weight_y), (x, weight_x) = _bicubic_taps(height, rows), _bicubic_taps(width, columns)
        sampled = ids[y.reshape(-1)]  # [4 rows, W]: first tap of every row of cells, second tap, ...
        resized = sum(
            np.multiply(sampled[:, x[i]] == segments[:, None, None], weight_x[i], dtype=np.float32) for i in range(4)
        )
        resized = sum(resized[:, rows * i : rows * (i + 1)] * weight_y[i][:, None] for i in range(4))
        masks[:, :rows, :columns] = torch.from_numpy(resized > 0)
    for index in (~masks.flatten(1).any(1)).nonzero().flatten().tolist():
        pixels = np.argwhere(ids == segments[index])  # [pixels, 2] as y, x
        nearest = pixels[((pixels - pixels.mean(0)) ** 2).sum(1).argmin()]
        cell_y, cell_x = ((nearest + 0.5) * scale).astype(int)
        masks[index, min(cell_y, rows - 1), min(cell_x, columns - 1)] = True
    return masks
