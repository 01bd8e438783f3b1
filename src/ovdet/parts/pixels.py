"""From pixels to what the ViT is given: statistics, and what stands for nothing beyond an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from open_clip.transform import normalize
from ovdet.parts.boxes import sizes_tensor

IMAGENET_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
IMAGENET_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)


def normalize_padded(
    images: Tensor,
    sizes: Sequence[tuple[int, int]] | Tensor,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    *,
    zero: bool = True,
) -> Tensor:
    """Normalised images ``[B, 3, S, S]``, float32.

    Args:
        images: uint8, padded right and bottom with black; sizes: (height, width) of each image's own area.
        mean, std: of pixels in 0..1.
        zero: whether the padding is 0 after normalisation; otherwise it is black, normalised like the rest.
    """
    result = normalize(images, mean, std)
    if not zero:
        return result
    own = sizes_tensor(sizes, images.device)
    rows, columns = (torch.arange(n, device=images.device) for n in images.shape[-2:])
    inside = (rows[:, None] < own[:, :1, None]) & (columns < own[:, 1:, None])  # [B, S, S]
    return result.mul_(inside[:, None])
