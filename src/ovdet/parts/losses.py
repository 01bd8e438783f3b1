"""Losses of the detector. Each is summed over what was sampled and divided by a number of samples, in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def keep_base_columns(logits: Tensor, base_mask: Tensor) -> Tensor:
    """Logits ``[K, C+1]`` without the novel classes: ``[K, number of base classes + 1]``, background last.

    The novel columns are removed and not merely never the answer: they take no part in the softmax, so their logits
    get no gradient and no proposal is pushed away from a class that has no labels.
    """
    keep = torch.cat([base_mask, base_mask.new_ones(1)])
    return logits[:, keep]


def classification_loss(logits: Tensor, labels: Tensor, base_mask: Tensor, background_weight: float) -> Tensor:
    """Cross-entropy over base classes and background: ``sum_i w(y_i) CE_i / K``.

    Args:
        logits: ``[K, C+1]``, background last.
        labels: int64 ``[K]``: 0..C-1 (base classes only) or C for background.
        base_mask: bool ``[C]``.
        background_weight: w of background; base classes have 1. The divisor is the number of samples and not the sum
            of their weights, as in the published detector.

    Returns:
        A scalar; 0 (with a gradient of 0) for K = 0.
    """
    kept = keep_base_columns(logits.float(), base_mask)
    # Position of each class among the kept columns; background is the last column.
    position = torch.cat([base_mask.long().cumsum(0) - 1, base_mask.sum()[None]])
    weights = kept.new_ones(kept.shape[1])
    weights[-1] = background_weight
    losses = F.cross_entropy(kept, position[labels], weight=weights, reduction="none")
    return losses.sum() / max(len(labels), 1)


def box_loss(predicted: Tensor, target: Tensor, samples: int) -> Tensor:
    """L1 of box offsets ``[P, 4]`` of the positives, summed and divided by the number of all samples."""
    return (predicted.float() - target).abs().sum() / max(samples, 1)


def objectness_loss(logits: Tensor, positive: Tensor, samples: int) -> Tensor:
    """Binary cross-entropy of objectness logits ``[N]`` against bool ``[N]``, summed and divided by ``samples``."""
    target = positive.to(torch.float32)
    return F.binary_cross_entropy_with_logits(logits.float(), target, reduction="sum") / max(samples, 1)


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of mask logits ``[P, m, m]`` against bool ``[P, m, m]``, mean (0 for P = 0)."""
    target = target.to(torch.float32)
    return F.binary_cross_entropy_with_logits(logits.float(), target, reduction="sum") / max(logits.numel(), 1)
