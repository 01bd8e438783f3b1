"""Image patches: an image cut into M x N cells (CLIPSelf, section 3.2)."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np


@lru_cache
def grid_choices(max_split: int, kind: str = "all") -> tuple[tuple[int, int], ...]:
    """All (rows M, columns N) with 1 <= M <= max_split and ceil(M / 2) <= N <= min(2 M, max_split).

    Of kind ``"dense"`` (DenseVLM, ICCV 2025): from 2 rows on, and N above ceil(M / 2).
    """
    first, above = (2, 1) if kind == "dense" else (1, 0)
    return tuple(
        (rows, columns)
        for rows in range(first, max_split + 1)
        for columns in range(math.ceil(rows / 2) + above, min(2 * rows, max_split) + 1)
    )


def grid_template(rows: int, columns: int) -> np.ndarray:
    """Cells of a grid, row by row: float32 ``[rows * columns, 4]``, xyxy in 0..1."""
    x, y = np.linspace(0, 1, columns + 1), np.linspace(0, 1, rows + 1)
    left, top = np.meshgrid(x[:-1], y[:-1])
    right, bottom = np.meshgrid(x[1:], y[1:])
    return np.stack([left, top, right, bottom], -1).reshape(-1, 4).astype(np.float32)


def enlarge(boxes: np.ndarray, factor: float, width: float, height: float) -> np.ndarray:
    """Boxes ``[K, 4]`` xyxy in pixels, scaled about their centres and clipped to the image."""
    centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) * factor
    scaled = np.concatenate([centres - sides / 2, centres + sides / 2], 1)
    return np.clip(scaled, 0, np.array([width, height, width, height], scaled.dtype))


def grid_regions(
    width: int,
    height: int,
    rng: np.random.Generator,
    *,
    max_split: int = 6,
    max_boxes: int = 20,
    crop_scale: float = 1.0,
    kind: str = "all",
    choice: tuple[int, int] | None = None,
    order: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Cells of one random grid of an image, shuffled, at most ``max_boxes``.

    Args:
        width, height: the unpadded image, pixels.
        rng: source of the grid and the order.
        max_split, kind: grids to draw from, see :func:`grid_choices`.
        crop_scale: crops are the cells enlarged by this factor about their centres, clipped.
        choice, order: impose the grid (rows, columns) and the order of its cells.

    Returns:
        (boxes, crop boxes): float32 ``[K, 4]`` each, xyxy in pixels.
    """
    choices = grid_choices(max_split, kind)
    rows, columns = choice or choices[int(rng.integers(len(choices)))]
    order = rng.permutation(rows * columns) if order is None else np.asarray(order)
    cells = grid_template(rows, columns)[order[:max_boxes]]
    boxes = cells * np.array([width, height, width, height], np.float32)
    crops = boxes if crop_scale == 1 else enlarge(boxes, crop_scale, width, height)
    return boxes, crops.astype(np.float32)
