"""Many regions of one image resized at once, on the image's device: bicubic with antialias as two matrix products."""

from __future__ import annotations

import torch
from torch import Tensor


def _cubic(t: Tensor) -> Tensor:
    """Keys' kernel with a = -0.5 (Pillow's), zero outside [-2, 2]."""
    t = t.abs()
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    return torch.where(t < 1, near, torch.where(t < 2, far, torch.zeros_like(t)))


def _weights(first: Tensor, last: Tensor, size: Tensor, offset: Tensor, length: int, canvas: int) -> Tensor:
    """Rows that make output pixels from input pixels: ``[K, canvas, length]``, zero rows where the canvas is padding.

    Args:
        first, last: int ``[K]``, input pixels [first, last) of the region.
        size: int ``[K]``, output pixels of the region; ``offset`` where they begin on the canvas.
        length: input pixels of the whole image along this axis.
    """
    device = first.device
    first, last, size, offset = (t[:, None, None].float() for t in (first, last, size, offset))
    output = torch.arange(canvas, device=device)[None, :, None] - offset  # [K, canvas, 1]
    pixel = torch.arange(length, device=device)[None, None]  # [1, 1, length]
    scale = (last - first) / size
    centre = first + (output + 0.5) * scale
    weights = _cubic((pixel + 0.5 - centre) / scale.clamp(min=1))
    weights = weights * ((pixel >= first) & (pixel < last) & (output >= 0) & (output < size))
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)


def resample(image: Tensor, regions: Tensor, canvas: int) -> Tensor:
    """Regions of an image, each resized and put on a black square; what lies beyond the square is lost.

    Args:
        image: uint8 or float ``[3, H, W]`` of values 0..255, on any device.
        regions: whole numbers ``[K, 8]``: pixels (x1, y1, x2, y2) of the image, right and bottom behind the last;
            (height, width) that they are resized to; (top, left) where they begin on the square, below 0 for some.
        canvas: side of the squares.

    Returns:
        float32 ``[K, 3, canvas, canvas]`` of whole values 0..255, as an 8-bit image would hold.
    """
    height, width = image.shape[-2:]
    x1, y1, x2, y2, rows, columns, top, left = regions.to(image.device, non_blocking=True).unbind(1)
    across = _weights(x1, x2, columns, left, width, canvas)  # [K, canvas, W]
    down = _weights(y1, y2, rows, top, height, canvas)  # [K, canvas, H]
    with torch.autocast(image.device.type, enabled=False):
        lines = torch.matmul(image.float()[None], across.transpose(1, 2)[:, None])  # [K, 3, H, canvas]
        # An 8-bit image between the passes, as Pillow and torchvision have one.
        lines = (lines + 0.5).floor().clamp(0, 255)
        return (torch.matmul(down[:, None], lines) + 0.5).floor().clamp(0, 255)  # [K, 3, canvas, canvas]
