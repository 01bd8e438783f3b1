"""Scores of the detector and of the VLM, and their geometric mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from open_clip.regions import roi_features


def class_probabilities(logits: Tensor) -> Tensor:
    """Softmax of ``[K, C+1]`` over all classes and background, without the background's column: ``[K, C]``.

    Background competes with the classes (a region that looks like none of them gets small probabilities) but is no
    answer, and is not fused.
    """
    return logits.float().softmax(dim=-1)[:, :-1]


def vlm_probabilities(
    dense: Tensor, boxes: Sequence[Tensor], image_size: tuple[int, int], class_embeddings: Tensor, temperature: float
) -> Tensor:
    """The VLM's own class probabilities of boxes: ``softmax(temperature * cosine)``, ``[sum K_i, C]``.

    Args:
        dense: dense embedding ``[B, D, h, w]``, unit length per cell.
        boxes: one ``[K_i, 4]`` per image, xyxy in input pixels.
        image_size: (height, width) of the padded input.
        class_embeddings: ``[C+1, D]``, unit length, background last (in the softmax, not in the result).
    """
    height, width = image_size
    scale = torch.tensor([width, height, width, height], dtype=torch.float32, device=dense.device)
    features = F.normalize(roi_features(dense, [b.float() / scale for b in boxes]), dim=-1)
    with torch.autocast(dense.device.type, enabled=False):
        return class_probabilities(temperature * features @ class_embeddings.to(features.dtype).T)


def fuse(detector: Tensor, vlm: Tensor, base_mask: Tensor, *, weight_base: float, weight_novel: float) -> Tensor:
    """``p_det^(1-w) * p_vlm^w`` with w = ``weight_base`` (a) for base and ``weight_novel`` (b) for novel classes.

    Args:
        detector, vlm: probabilities ``[K, C]``.
        base_mask: bool ``[C]``.

    Returns:
        ``[K, C]`` in 0..1 (F-VLM, Kuo et al. 2023, eq. 4).
    """
    weight = torch.where(base_mask, weight_base, weight_novel).to(detector.dtype)
    return detector.pow(1 - weight) * vlm.to(detector.dtype).pow(weight)
