"""Image preparation: whole images, detection-size inputs, region crops; uint8 tensors until normalisation.

Unless said otherwise images are RGB uint8 ``[..., 3, H, W]``. Resizing is bicubic with antialias, the kernel of Pillow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

_INTERPOLATIONS = {"bicubic": TF.InterpolationMode.BICUBIC, "bilinear": TF.InterpolationMode.BILINEAR}


def resize(image: Tensor, height: int, width: int, interpolation: str = "bicubic") -> Tensor:
    """Resize with antialias; an image that has the size already is returned as it is."""
    if tuple(image.shape[-2:]) == (height, width):
        return image
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
    return F.pad(image, (0, size - image.shape[-1], 0, size - image.shape[-2]))


def pad_centred(image: Tensor, size: int) -> Tensor:
    """Pad with zeros on both sides to ``[..., size, size]``; an odd pixel goes right or bottom."""
    rows, columns = size - image.shape[-2], size - image.shape[-1]
    return F.pad(image, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


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
    """uint8 ``[..., 3, H, W]`` to ``(v / 255 - mean) / std`` in ``dtype``, on the image's device."""
    mean_, std_ = (torch.tensor(v, dtype=torch.float32, device=image.device)[:, None, None] for v in (mean, std))
    # One multiplication and one addition, in float32: v / (255 std) - mean / std.
    return torch.addcmul(-mean_ / std_, image.float(), 1 / (255 * std_)).to(dtype)


def _whole_image(
    image: Image.Image | Tensor,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    mode: str,
    interpolation: str,
    scale: tuple[float, float],
) -> Tensor:
    if isinstance(image, Image.Image):
        image = TF.pil_to_tensor(image.convert("RGB"))
    height, width = image.shape[-2:]
    if mode == "squash":
        image = resize(image, size, size, interpolation)
    elif mode == "longest":
        image = pad_centred(resize_longest(image, size), size)
    elif mode == "random":
        top, left, h, w = random_crop_box(height, width, scale)
        image = resize(image[..., top : top + h, left : left + w], size, size, interpolation)
    else:
        factor = size / min(height, width)
        # torchvision's rule for the longer side: truncated.
        image = resize(image, max(int(height * factor), size), max(int(width * factor), size), interpolation)
        top, left = (round((s - size) / 2) for s in image.shape[-2:])
        image = image[..., top : top + size, left : left + size]
    return normalize(image, mean, std)


def random_crop_box(
    height: int, width: int, scale: tuple[float, float], generator: torch.Generator | None = None
) -> tuple[int, int, int, int]:
    """(top, left, h, w) of a crop whose area is a random share in ``scale`` and whose aspect ratio is in 3/4..4/3."""
    for _ in range(10):
        area, ratio, y, x = torch.rand(4, generator=generator).tolist()
        area = height * width * (scale[0] + area * (scale[1] - scale[0]))
        ratio = math.exp((2 * ratio - 1) * math.log(4 / 3))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    return 0, 0, height, width


def image_transform(
    size: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    mode: str = "shortest",
    interpolation: str = "bicubic",
    scale: tuple[float, float] = (0.9, 1.0),
) -> Callable[[Image.Image | Tensor], Tensor]:
    """Preparation of whole images: PIL image or uint8 ``[3, H, W]`` -> normalised float32 ``[3, size, size]``.

    Args:
        mode: ``"shortest"`` (shortest side to ``size``, centre crop), ``"longest"`` (longest side, centred on black),
            ``"squash"`` (aspect ratio not kept), ``"random"`` (random resized crop, for training).
        scale: share of the area that a random crop covers.

    Raises:
        ValueError: unknown mode or interpolation.
    """
    if mode not in ("shortest", "longest", "squash", "random"):
        raise ValueError(f'mode is "{mode}": use shortest, longest, squash or random')
    if interpolation not in _INTERPOLATIONS:
        raise ValueError(f'interpolation is "{interpolation}": use {" or ".join(_INTERPOLATIONS)}')
    return partial(_whole_image, size=size, mean=mean, std=std, mode=mode, interpolation=interpolation, scale=scale)
