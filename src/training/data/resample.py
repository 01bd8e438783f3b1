"""Many crops of one image at once, on the device: bicubic resampling with antialias as two matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from open_clip.transform import crop_box, detection_size


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


def resample(image: Tensor, boxes: list[tuple[int, int, int, int]], canvas: int, centred: bool) -> Tensor:
    """Regions of an image as squares, each scaled to its longest side and padded with black.

    Args:
        image: uint8 or float ``[3, H, W]`` of values 0..255, on any device.
        boxes: whole pixels (x1, y1, x2, y2).
        canvas: side of the squares.
        centred: padding on both sides (the odd pixel right or bottom) instead of right and bottom only.

    Returns:
        float32 ``[K, 3, canvas, canvas]`` of whole values 0..255, as an 8-bit image would hold.
    """
    height, width = image.shape[-2:]
    device = image.device
    if not boxes:
        return torch.zeros(0, 3, canvas, canvas, device=device)
    sizes = [detection_size(y2 - y1, x2 - x1, canvas)[:2] for x1, y1, x2, y2 in boxes]
    # One transfer for all numbers of the image.
    table = torch.tensor([[*b, *s] for b, s in zip(boxes, sizes, strict=True)]).to(device, non_blocking=True)
    x1, y1, x2, y2, rows, columns = table.unbind(1)
    zero = torch.zeros_like(rows)
    left, top = ((canvas - columns) // 2, (canvas - rows) // 2) if centred else (zero, zero)
    across = _weights(x1, x2, columns, left, width, canvas)  # [K, canvas, W]
    down = _weights(y1, y2, rows, top, height, canvas)  # [K, canvas, H]
    with torch.autocast(device.type, enabled=False):
        lines = torch.matmul(image.float()[None], across.transpose(1, 2)[:, None])  # [K, 3, H, canvas]
        # An 8-bit image between the passes, as Pillow and torchvision have one.
        lines = lines.round().clamp(0, 255)
        return torch.matmul(down[:, None], lines).round().clamp(0, 255)  # [K, 3, canvas, canvas]


def device_crops(image: Tensor, boxes: Tensor, size: int, chunk: int = 32) -> Tensor:
    """Crops of an image, as :func:`open_clip.transform.crop_region` makes them one by one.

    Args:
        image: uint8 ``[3, H, W]`` on the device.
        boxes: float ``[K, 4]`` on the CPU, xyxy in pixels.
        chunk: crops at a time; bounds memory.

    Returns:
        float32 ``[K, 3, size, size]`` of values 0..255.
    """
    whole = [crop_box(b, *image.shape[-2:]) for b in boxes.tolist()]
    parts = [resample(image, whole[i : i + chunk], size, centred=True) for i in range(0, len(whole), chunk)]
    return torch.cat(parts) if parts else torch.zeros(0, 3, size, size, device=image.device)


def device_image(image: Tensor, size: int) -> Tensor:
    """An image brought to a padded square, as the loader makes it: float32 ``[3, size, size]`` of values 0..255."""
    height, width = image.shape[-2:]
    return resample(image, [(0, 0, width, height)], size, centred=False)[0]
