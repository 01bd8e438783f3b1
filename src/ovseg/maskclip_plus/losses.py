"""Losses of MaskCLIP+, as sums with their counts, so that they add up over images and processes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ovseg.classes import IGNORE


def segmentation_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits ``[B, C, h, w]`` at the size of the labels, int64 ``[B, H, W]``.

    Returns:
        (sum over pixels that are not 255, how many these are). The published loss divides by all pixels, ignored ones
        too: a pixel then weighs less in an image with a large ignored part.
    """
    logits = F.interpolate(logits.float(), labels.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"), (labels != IGNORE).sum()


def distillation_loss(features: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """L1 between the student's features and CLIP's unit features, both upsampled to the labels' size.

    Args:
        features, teacher: ``[B, D, h, w]`` each, of any size.
        labels: int64 ``[B, H, W]``; pixels of 255 are left out.

    Returns:
        (sum over the D channels of pixels that are not 255, how many numbers these are).
    """
    size = labels.shape[-2:]
    kept = (labels != IGNORE)[:, None]
    total, dimension = features.new_zeros(()), features.shape[1]
    # One image at a time: two maps of D channels at full size.
    for own, other, mask in zip(features.float(), teacher.float(), kept, strict=True):
        own = F.interpolate(own[None], size, mode="bilinear", align_corners=False)[0]
        other = F.interpolate(other[None], size, mode="bilinear", align_corners=False)[0]
        total = total + ((own - other).abs() * mask).sum()
    return total, kept.sum() * dimension
