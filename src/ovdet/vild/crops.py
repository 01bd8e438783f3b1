"""Crops of proposals as the teacher sees them: which pixels, and how they become a square.

Crops are cut out of the original image, never out of an augmented one, and never reach beyond it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from open_clip.transform import detection_size, pad_centred, resize, resize_longest
from training.engine.data.resample import resample

RULES = ("squash", "resize_centre", "pad")
_SLACK = 1e-3  # pixels; a box that ends here beyond a pixel's border does not take the next pixel


def grow(boxes: np.ndarray, scale: float) -> np.ndarray:
    """Boxes ``[N, 4]`` grown about their centres, not clipped."""
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) * (scale / 2)
    return np.concatenate([centre - half, centre + half], axis=1)


def crop_pixels(boxes: np.ndarray, scale: float, height: int, width: int) -> np.ndarray:
    """Whole pixels of crops, int64 ``[N, 4]``, right and bottom behind the last.

    Boxes are grown ``scale`` times, clipped to the image and rounded outwards; at least one pixel each way.
    """
    bounds = np.array([width, height, width, height])
    grown = np.clip(grow(np.asarray(boxes, np.float64), scale), 0, bounds)
    first = np.floor(grown[:, :2] + _SLACK).astype(np.int64)
    last = np.ceil(grown[:, 2:] - _SLACK).astype(np.int64)
    first = np.minimum(first, bounds[:2] - 1)
    return np.concatenate([first, np.clip(last, first + 1, bounds[:2])], axis=1)


def crop(image: Tensor, pixels: Sequence[int], size: int, rule: str = "squash") -> Tensor:
    """One crop as a square, uint8 ``[3, size, size]``; bicubic with antialias.

    Args:
        image: uint8 ``[3, H, W]``.
        pixels: (x1, y1, x2, y2) of :func:`crop_pixels`.
        rule: ``"squash"``: both sides to ``size``, whatever the shape, nothing cut off and nothing padded;
            ``"resize_centre"``: the short side to ``size``, then its centre, as CLIP prepares whole images (the ends of
            long boxes are lost); ``"pad"``: the long side to ``size``, centred on black.
    """
    x1, y1, x2, y2 = pixels
    part = image[:, y1:y2, x1:x2]
    if rule == "squash":
        return resize(part, size, size)
    if rule == "pad":
        return pad_centred(resize_longest(part, size), size)
    height, width = _short_side(y2 - y1, x2 - x1, size)
    part = resize(part, height, width)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return part[:, top : top + size, left : left + size]


def crops(image: Tensor, pixels: np.ndarray, size: int, rule: str = "squash", out: Tensor | None = None) -> Tensor:
    """Crops of an image: uint8 ``[N, 3, size, size]``, the colour channel innermost in memory.

    Args:
        pixels: ``[N, 4]`` of :func:`crop_pixels`.
        out: is filled and given back, where given.
    """
    if out is None:
        out = torch.empty(len(pixels), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    for place, one in zip(out, pixels.tolist(), strict=True):
        place.copy_(crop(image, one, size, rule))
    return out


def crops_on_device(image: Tensor, pixels: np.ndarray, size: int, rule: str = "squash", chunk: int = 32) -> Tensor:
    """As :func:`crops`, many at once on the image's device: float32 of values 0..255.

    Args:
        chunk: crops at a time; bounds memory.
    """
    if not len(pixels):
        return torch.zeros(0, 3, size, size, device=image.device)
    height, width = pixels[:, 3] - pixels[:, 1], pixels[:, 2] - pixels[:, 0]
    if rule == "squash":
        sizes = np.full((len(pixels), 2), size)
    else:
        along = _short_side if rule == "resize_centre" else detection_size
        sizes = np.array([along(int(h), int(w), size)[:2] for h, w in zip(height, width, strict=True)])
    margins = (size - sizes) / 2
    # Of the odd pixel: padding leaves it right and bottom, a centre crop rounds halves to even.
    corners = (np.floor(margins) if rule == "pad" else -np.round(-margins)).astype(np.int64)
    table = torch.from_numpy(np.concatenate([pixels, sizes, corners], axis=1))
    return torch.cat([resample(image, part, size) for part in table.split(chunk)])


def _short_side(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) with the short side at ``size``; the long one is cut down to whole pixels, as in torchvision."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size
