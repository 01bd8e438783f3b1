"""Scores of the VLM itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from open_clip.regions import roi_features
from ovdet.parts.scores import class_probabilities


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
