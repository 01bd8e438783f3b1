"""Many regions of one image resized at once, on the image's device: bicubic with antialias as two matrix products."""

from __future__ import annotations

import torch
from torch import Tensor


def _table(regions: Tensor) -> Tensor:
    """float32 ``[2, K, 7]`` for columns and rows: what :func:`_weights` reads of regions ``[K, 8]``, in its order.

    Worked out where the regions are, on a CPU as a rule: a handful of numbers, for which a GPU starts many kernels.
    """
    x1, y1, x2, y2, rows, columns, top, left = regions.double().unbind(1)
    axes = []
    for first, last, size, offset in ((x1, x2, columns, left), (y1, y2, rows, top)):
        scale = (last - first) / size
        sharpness = 1 / scale.clamp(min=1)
        start = (first - offset * scale) * sharpness
        middle, half = (first + last) / 2, (last - first) / 2
        output = (offset + size / 2, size / 2)  # middle and half of the region on the canvas
        axes.append(torch.stack([sharpness, scale * sharpness, start, middle, half, *output], dim=1))
    return torch.stack(axes).float()


def _weights(table: Tensor, length: int, canvas: int) -> Tensor:
    """Rows that make output pixels from input pixels: ``[2, K, canvas, length]`` for columns and rows; zero where the
    canvas is padding.

    Keys' kernel with a = -0.5 (Pillow's), zero outside [-2, 2], which is with u = max(2 - |t|, 0), v = max(1 - |t|, 0)
    half of u^2 (u - 1) + v^2 (2 - 4 v).
    """
    sharpness, step, start, middle, half, centre, reach = table[:, :, None, None].unbind(-1)
    pixel = torch.arange(length, device=table.device, dtype=torch.float32) + 0.5  # their centres
    output = torch.arange(canvas, device=table.device, dtype=torch.float32)[:, None] + 0.5  # [canvas, 1]
    t = (pixel * sharpness).sub(torch.addcmul(start, output, step)).abs_()  # [2, K, canvas, length]
    u = (2 - t).clamp_(min=0)
    less = u - 1
    v = less.clamp(min=0)
    weights = torch.addcmul(u.square_().mul_(less), v.square(), torch.rsub(v, 2, alpha=4))
    inside = ((pixel - middle).abs_() < half) & ((output - centre).abs_() < reach)
    weights *= inside
    return weights.div_(weights.sum(-1, keepdim=True).clamp_(min=1e-6))


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
    table = _table(regions).to(image.device, non_blocking=True)
    across, down = _weights(table, max(height, width), canvas)  # [K, canvas, max(H, W)] each
    # Colours between rows and columns, so that each pass is one product of matrices that lie in memory as they are.
    pixels = torch.empty(height, 3, width, device=image.device).copy_(image.permute(1, 0, 2)).flatten(0, 1)
    with torch.autocast(image.device.type, enabled=False):
        every = pixels.expand(len(regions), -1, -1)
        lines = torch.bmm(every, across[..., :width].transpose(1, 2))  # [K, H * 3, canvas]
        # An 8-bit image between the passes, as Pillow and torchvision have one.
        lines = lines.add_(0.5).floor_().clamp_(0, 255).unflatten(1, (height, 3)).flatten(2)  # [K, H, 3 * canvas]
        squares = torch.bmm(down[..., :height], lines).add_(0.5).floor_().clamp_(0, 255)
    return squares.unflatten(2, (3, canvas)).transpose(1, 2)  # [K, 3, canvas, canvas]
