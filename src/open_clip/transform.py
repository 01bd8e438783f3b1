"""Image preparation: detection-size inputs, region crops; uint8 tensors until normalisation.

Whole images, as OpenCLIP prepares them, are in :mod:`open_clip.whole_images` (and may be imported from here).

Unless said otherwise images are RGB uint8 ``[..., 3, H, W]``. Resizing is bicubic with antialias, the kernel of Pillow.
Decoders and the resizing kernels leave the colour channel innermost in memory; everything here keeps it there, because
turning a batch round takes as long as resizing it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from .whole_images import AugmentationCfg as AugmentationCfg
from .whole_images import PreprocessCfg as PreprocessCfg
from .whole_images import image_transform as image_transform

_INTERPOLATIONS = {"bicubic": TF.InterpolationMode.BICUBIC, "bilinear": TF.InterpolationMode.BILINEAR}


def resize(image: Tensor, height: int, width: int, interpolation: str = "bicubic") -> Tensor:
    """Resize with antialias; an image that has the size already is returned as it is."""
    if tuple(image.shape[-2:]) == (height, width):
        return image
    if image.dim() == 3 and image.stride(0) == 1 and not image[None].is_contiguous(memory_format=torch.channels_last):
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # a crop: packed rows double the kernel's speed
    return TF.resize(image, [height, width], interpolation=_INTERPOLATIONS[interpolation], antialias=True)


def detection_size(height: int, width: int, size: int) -> tuple[int, int, float]:
    """(height, width, scale) after the longest side is brought to ``size``; sides rounded, at least one pixel."""
    scale = size / max(height, width)
    return max(round(height * scale), 1), max(round(width * scale), 1), scale


def resize_longest(image: Tensor, size: int) -> Tensor:
    """Bring the longest side to ``size`` pixels."""
    height, width, _ = detection_size(*image.shape[-2:], size)
    return resize(image, height, width)


def pad_to(image: Tensor, size: int) -> Tensor:
    """Pad with zeros on the right and at the bottom to ``[..., size, size]``."""
    return _place(image, size, 0, 0)


def pad_centred(image: Tensor, size: int) -> Tensor:
    """Pad with zeros on both sides to ``[..., size, size]``; an odd pixel goes right or bottom."""
    return _place(image, size, (size - image.shape[-2]) // 2, (size - image.shape[-1]) // 2)


def _place(image: Tensor, size: int, top: int, left: int) -> Tensor:
    """The image on a black square, in the memory layout that it has."""
    height, width = image.shape[-2:]
    if (height, width) == (size, size):
        return image
    if image.stride(-3) == 1:
        square = image.new_zeros(*image.shape[:-3], size, size, image.shape[-3]).movedim(-1, -3)
    else:
        square = image.new_zeros(*image.shape[:-2], size, size)
    square[..., top : top + height, left : left + width] = image
    return square


def crop_box(box: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    """Whole pixels (x1, y1, x2, y2) of a crop: coordinates rounded, inside the image, at least one pixel each way."""
    x1, y1, x2, y2 = (int(round(float(v))) for v in box)
    x1, y1 = min(max(x1, 0), width - 1), min(max(y1, 0), height - 1)
    return x1, y1, min(max(x2, x1 + 1), width), min(max(y2, y1 + 1), height)


def crop_region(image: Tensor, box: Sequence[float], size: int) -> Tensor:
    """A region as a square: cropped, longest side to ``size``, centred on black. ``[3, size, size]``.

    Args:
        image: uint8 ``[3, H, W]``.
        box: xyxy in pixels of the image. Thin or sub-pixel boxes grow to one pixel.
    """
    x1, y1, x2, y2 = crop_box(box, *image.shape[-2:])
    return pad_centred(resize_longest(image[..., y1:y2, x1:x2], size), size)


def normalize(image: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """Values 0..255 (uint8 or float) ``[..., 3, H, W]`` to ``(v / 255 - mean) / std``, on the image's device.

    Computed in float32, returned in ``dtype``.
    """
    offset, factor = _pixel_constants(tuple(mean), tuple(std), image.device)
    return torch.addcmul(offset, image.float(), factor).to(dtype)


@lru_cache  # a tensor made anew for each batch would halt the device for a transfer
def _pixel_constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """``-mean / std`` and ``1 / (255 std)``, ``[3, 1, 1]``: normalising is one multiplication and one addition."""
    with torch.inference_mode(False):
        mean_, std_ = (torch.tensor(v, dtype=torch.float32, device=device)[:, None, None] for v in (mean, std))
        return -mean_ / std_, 1 / (255 * std_)


def random_crop_box(
    height: int, width: int, scale: tuple[float, float], generator: torch.Generator | None = None
) -> tuple[int, int, int, int]:
    """(top, left, h, w) of a crop whose area is a random share in ``scale`` and whose aspect ratio is in 3/4..4/3.

    Where ten draws do not fit into the image: its centre, as much of it as the aspect ratios allow.
    """
    for _ in range(10):
        area, ratio, y, x = torch.rand(4, generator=generator).tolist()
        area = height * width * (scale[0] + area * (scale[1] - scale[0]))
        ratio = math.exp((2 * ratio - 1) * math.log(4 / 3))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w
