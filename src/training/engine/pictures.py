"""What a dense map shows, as pictures: class colours, principal components, similarities. Arrays in, arrays out."""

from __future__ import annotations

import colorsys

import numpy as np
import torch
from torch import Tensor


def distinct_colours(count: int, background: int | None = None) -> np.ndarray:
    """RGB uint8 ``[count, 3]``, neighbours in the list far apart (hues by the golden ratio); ``background`` is grey."""
    colours = []
    for i in range(count):
        hue, saturation, value = i * 0.618034 % 1, 0.55 + 0.4 * (i % 2), 0.95 - 0.3 * (i // 2 % 2)
        colours.append([round(255 * v) for v in colorsys.hsv_to_rgb(hue, saturation, value)])
    if background is not None:
        colours[background] = [60, 60, 60]
    return np.asarray(colours, dtype=np.uint8).reshape(count, 3)


def overlay(image: np.ndarray, labels: np.ndarray, colours: np.ndarray, opacity: float = 0.65) -> np.ndarray:
    """A photograph uint8 ``[H, W, 3]`` under the colours of its labels ``[H, W]``; labels without a colour stay clear.

    The photograph is turned grey, so that its own colours are not taken for a class's.
    """
    grey = image.astype(np.float32) @ np.asarray([0.299, 0.587, 0.114], dtype=np.float32)
    known = labels < len(colours)
    colour = colours[np.where(known, labels, 0)].astype(np.float32)
    share = np.where(known, opacity, 0.0)[..., None].astype(np.float32)
    return np.clip((1 - share) * grey[..., None] + share * colour, 0, 255).round().astype(np.uint8)


def principal_components(dense: Tensor, count: int = 3) -> Tensor:
    """The first principal components of the cells of a dense map: ``[D, h, w] -> [count, h, w]``, each in 0..1.

    Each component is stretched between its 1st and 99th percentile, and turned so that its rarer side is bright.
    Components that a map does not have (fewer cells or channels) are 0.5.
    """
    cells = dense.float().flatten(1).T  # [N, D]
    cells = cells - cells.mean(0)
    components = cells.new_full((count, len(cells)), 0.5)
    rank = min(count, *cells.shape)
    left, values, _ = torch.linalg.svd(cells, full_matrices=False)
    for i in range(rank):
        values_i = left[:, i] * values[i]
        values_i = values_i if values_i.pow(3).sum() >= 0 else -values_i
        low, high = torch.quantile(values_i, torch.tensor([0.01, 0.99], device=values_i.device))
        if high > low:
            components[i] = ((values_i - low) / (high - low)).clamp(0, 1)
    return components.unflatten(1, dense.shape[1:])


def similarity_to(dense: Tensor, box: tuple[float, float, float, float]) -> Tensor:
    """Cosine ``[h, w]`` of all cells of a map ``[D, h, w]`` with the mean of the cells in a box.

    Args:
        box: x1, y1, x2, y2 in 0..1 of the map; a point has x1 = x2 and y1 = y2. At least one cell is taken.
    """
    height, width = dense.shape[1:]
    unit = torch.nn.functional.normalize(dense.float(), dim=0)
    x1, x2 = (min(max(int(x * width), 0), width - 1) for x in (box[0], max(box[2] - 1e-6, box[0])))
    y1, y2 = (min(max(int(y * height), 0), height - 1) for y in (box[1], max(box[3] - 1e-6, box[1])))
    query = torch.nn.functional.normalize(unit[:, y1 : y2 + 1, x1 : x2 + 1].mean((1, 2)), dim=0)
    return torch.einsum("dhw,d->hw", unit, query)
