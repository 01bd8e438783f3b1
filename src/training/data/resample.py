"""Many crops of one image at once, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from open_clip.transform import crop_box, detection_size
from training.engine.data.resample import resample as resample_regions


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
    if not boxes:
        return torch.zeros(0, 3, canvas, canvas, device=image.device)
    table = []  # one transfer for all numbers of the image
    for x1, y1, x2, y2 in boxes:
        rows, columns, _ = detection_size(y2 - y1, x2 - x1, canvas)
        corner = ((canvas - rows) // 2, (canvas - columns) // 2) if centred else (0, 0)
        table.append((x1, y1, x2, y2, rows, columns, *corner))
    return resample_regions(image, torch.tensor(table), canvas)


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
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else torch.zeros(0, 3, size, size, device=image.device)


def device_image(image: Tensor, size: int) -> Tensor:
    """An image brought to a padded square, as the loader makes it: float32 ``[3, size, size]`` of values 0..255."""
    height, width = image.shape[-2:]
    return resample(image, [(0, 0, width, height)], size, centred=False)[0]
