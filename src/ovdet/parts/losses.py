"""Losses of the detector. Each is summed over what was sampled and divided by a number of samples, in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ovdet.parts.numbers import widened


def classification_loss(logits: Tensor, labels: Tensor, base_mask: Tensor, background_weight: float) -> Tensor:
    """Cross-entropy over base classes and background: ``sum_i w(y_i) CE_i / K``.

    Novel classes take no part in the softmax, so that their logits get no gradient and no proposal is pushed away from
    a class that has no labels.

    Args:
        logits: ``[K, C+1]``, background last.
        labels: int64 ``[K]``: 0..C-1 (base classes only) or C for background.
        base_mask: bool ``[C]``.
        background_weight: w of background; base classes have 1. The divisor is the number of samples and not the sum
            of their weights, as in the published detector.

    Returns:
        A scalar; 0 (with a gradient of 0) for K = 0.
    """
    novel = F.pad(~base_mask, (0, 1))  # background is none
    losses = F.cross_entropy(widened(logits).masked_fill(novel, -torch.inf), labels, reduction="none")
    background = labels == len(base_mask)
    return (losses * torch.where(background, background_weight, 1.0)).sum() / max(len(labels), 1)


def box_loss(predicted: Tensor, target: Tensor, samples: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """L1 of box offsets ``[..., 4]`` of the positives, summed and divided by the number of all samples.

    Args:
        valid: bool ``[...]``; others count nothing, whatever they hold.
    """
    values = (predicted.float() - target).abs()
    values = values if valid is None else values.masked_fill(~valid[..., None], 0)
    return values.sum() / (max(samples, 1) if isinstance(samples, int) else samples)


def objectness_loss(
    logits: Tensor, positive: Tensor, samples: int | Tensor, valid: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy of objectness logits against bool of the same shape, summed and divided by ``samples``.

    Args:
        valid: bool of the same shape; others count nothing, whatever they hold.
    """
    values = F.binary_cross_entropy_with_logits(logits.float(), positive.to(torch.float32), reduction="none")
    values = values if valid is None else values.masked_fill(~valid, 0)
    return values.sum() / (max(samples, 1) if isinstance(samples, int) else samples)


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of mask logits ``[P, m, m]`` against bool ``[P, m, m]``, mean (0 for P = 0)."""
    target = target.to(torch.float32)
    return F.binary_cross_entropy_with_logits(logits.float(), target, reduction="sum") / max(logits.numel(), 1)
