"""Boxes and masks to embeddings, from a dense map: RoIAlign and mask pooling (extraction "v2")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

from .checks import check_boxes, check_masks, values_are_at_hand
from .separable_roi import separable_roi_align

# From which mean share of the map a box is averaged faster by two matrix products than by torchvision's operator, which
# takes each box by itself: on a CPU with a backward pass, and without (maps of 32 to 64 cells a side).
_SEPARABLE_FROM = {True: 1 / 50, False: 1 / 15}
_SEPARABLE_BOXES = 128  # of an image at most, as the products keep h D numbers of each


def _in_cells(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Boxes ``[K, 4]`` in 0..1 to cells, float32. Python numbers, as a tensor of them would have to be copied over."""
    height, width = grid
    x1, y1, x2, y2 = boxes.float().reshape(-1, 4).unbind(1)
    return torch.stack([x1 * width, y1 * height, x2 * width, y2 * height], dim=1)


def roi_features(dense_map: Tensor, normed_boxes: Sequence[Tensor]) -> Tensor:
    """RoIAlign to 1x1 of each box on a dense map.

    Args:
        dense_map: ``[B, D, h, w]``.
        normed_boxes: one ``[K_i, 4]`` per image, xyxy, in 0..1 of the input image. ``K_i`` may be 0.

    Returns:
        ``[sum K_i, D]``, images one after the other, float32 (float64 for a float64 map): boxes in bfloat16 would move
        by more than a pixel at 1024, and the cosine that follows deserves the precision.
    """
    check_boxes(normed_boxes, len(dense_map), values=False)
    boxes = [_in_cells(b.to(dense_map.device, non_blocking=True), dense_map.shape[-2:]) for b in normed_boxes]
    if not boxes:
        return dense_map.new_zeros(0, dense_map.shape[1]).to(torch.promote_types(dense_map.dtype, torch.float32))
    with torch.autocast(dense_map.device.type, enabled=False):
        # float64 maps stay float64, so that the operator can be checked in double precision.
        features = dense_map if dense_map.dtype == torch.float64 else dense_map.float()
        boxes = [b.to(features.dtype) for b in boxes]
        if _separable(features, boxes):
            pooled = separable_roi_align(features, boxes)
        else:
            pooled = roi_align(features, boxes, (1, 1), 1.0, -1, True)
    return pooled[..., 0, 0]


def _separable(features: Tensor, boxes: Sequence[Tensor]) -> bool:
    """Whether two matrix products do for these boxes (in cells) what torchvision's operator would do more slowly.

    On a GPU they need nothing from the host, and their backward pass is deterministic; there sizes of boxes cannot be
    looked at without waiting.
    """
    if max(map(len, boxes)) > _SEPARABLE_BOXES:
        return False
    if not all(map(values_are_at_hand, boxes)):
        return features.device.type != "cpu"
    area = sum(((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])).sum().item() for b in boxes)
    graded = torch.is_grad_enabled() and features.requires_grad
    return area >= _SEPARABLE_FROM[graded] * sum(map(len, boxes)) * features.shape[-2:].numel() > 0


def mask_features(dense_map: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Mean of a dense map over each mask; an empty mask gives zeros.

    Args:
        dense_map: ``[B, D, h, w]``.
        masks: one bool ``[K_i, h, w]`` per image. ``K_i`` may be 0.

    Returns:
        ``[sum K_i, D]``, images one after the other, float32 (float64 for a float64 map).
    """
    check_masks(masks, len(dense_map), dense_map.shape[-2:])
    dense_map = dense_map.to(torch.promote_types(dense_map.dtype, torch.float32))
    pooled = [dense_map.new_zeros(0, dense_map.shape[1])]
    with torch.autocast(dense_map.device.type, enabled=False):
        for features, mask in zip(dense_map, masks, strict=True):
            cells = mask.to(features.device, non_blocking=True).flatten(1)  # [K_i, h*w]
            sums = cells.to(features.dtype) @ features.flatten(1).T  # [K_i, D]
            pooled.append(sums / cells.sum(1, keepdim=True).clamp(min=1))
    return torch.cat(pooled)


def box_masks(normed_boxes: Sequence[Tensor], grid: tuple[int, int]) -> list[Tensor]:
    """Cells inside each box, for extraction "v1": bool ``[K_i, h, w]``; box corners are truncated to whole cells."""
    check_boxes(normed_boxes)
    height, width = grid
    masks = []
    for boxes in normed_boxes:
        x1, y1, x2, y2 = _in_cells(boxes, grid).long()[:, :, None].unbind(1)  # each [K, 1]
        columns, rows = (torch.arange(n, device=boxes.device)[None] for n in (width, height))
        inside_x = (columns >= x1) & (columns < x2)
        inside_y = (rows >= y1) & (rows < y2)
        masks.append(inside_y[:, :, None] & inside_x[:, None, :])
    return masks
