"""Box arithmetic of the two detection stages: coding, matching, sampling, pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou, roi_align

BACKGROUND, IGNORED = -1, -2
_MOST_LOG_SCALE = math.log(1000 / 16)  # a decoded side is at most 62.5 times its box's


def encode_boxes(targets: Tensor, boxes: Tensor, weights: Sequence[float]) -> Tensor:
    """Offsets ``[N, 4]`` that turn boxes into targets (R-CNN, Girshick et al. 2014, times ``weights``).

    ``(w_x (x'-x)/w, w_y (y'-y)/h, w_w log(w'/w), w_h log(h'/h))`` of centres and sides; float32.
    """
    corner, side = _centre_side(boxes)
    target_corner, target_side = _centre_side(targets)
    offsets = torch.cat([(target_corner - corner) / side, (target_side / side).log()], dim=-1)
    return offsets * offsets.new_tensor(weights)


def decode_boxes(offsets: Tensor, boxes: Tensor, weights: Sequence[float], *, limit_below: bool = True) -> Tensor:
    """Inverse of :func:`encode_boxes`: ``[N, 4]`` xyxy, float32. A side grows at most 62.5 times.

    Args:
        limit_below: whether it also shrinks at most 62.5 times.
    """
    offsets = offsets.float() / torch.tensor(weights, device=offsets.device)
    centre, side = _centre_side(boxes)
    centre = centre + offsets[:, :2] * side
    least = -_MOST_LOG_SCALE if limit_below else None
    half = side * offsets[:, 2:].clamp(min=least, max=_MOST_LOG_SCALE).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def _centre_side(boxes: Tensor) -> tuple[Tensor, Tensor]:
    boxes = boxes.float()
    side = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-3)  # a box without extent has no scale to code in
    return (boxes[:, :2] + boxes[:, 2:]) / 2, side


def match(
    boxes: Tensor, truth: Tensor, *, positive: float, negative: float, at_least: float | None = None, chunk: int = 64
) -> Tensor:
    """Which true box each box answers for: int64 ``[N]``, an index, ``BACKGROUND`` or ``IGNORED``.

    IoU >= ``positive`` matches; IoU < ``negative`` is background; between them the box is ignored. With ``at_least``,
    the boxes that overlap a true box most match it whenever that IoU is at least so much (every true box should be
    learned by some anchor).

    Args:
        boxes: ``[N, 4]``; truth: ``[M, 4]``, M may be 0.
        chunk: true boxes compared at once: an N x M table would need gigabytes for crowded images.
    """
    best = boxes.new_zeros(len(boxes), dtype=torch.float32)
    index = boxes.new_zeros(len(boxes), dtype=torch.int64)
    forced = torch.full_like(index, BACKGROUND)
    for start in range(0, len(truth), chunk):
        iou = box_iou(boxes.float(), truth[start : start + chunk].float())  # [N, chunk]
        value, which = iou.max(dim=1)
        better = value > best
        best, index = torch.where(better, value, best), torch.where(better, which + start, index)
        if at_least is not None and len(boxes):
            most = iou.max(dim=0).values
            box, of = ((iou == most) & (most >= at_least)).nonzero().unbind(1)
            # A box that serves several takes the last, whatever the order of execution.
            forced.scatter_reduce_(0, box, of + start, "amax")
    result = torch.full_like(index, IGNORED)
    result[best < negative] = BACKGROUND
    matched = best >= positive
    result[matched] = index[matched]
    return torch.where(forced >= 0, forced, result) if at_least is not None else result


def sample(matches: Tensor, number: int, positive_share: float) -> tuple[Tensor, Tensor]:
    """Indices (positive, background) of at most ``number`` entries of :func:`match`'s result, drawn at random.

    At most ``positive_share`` of ``number`` are positive; background fills the rest.
    """
    positive, background = (matches >= 0).nonzero()[:, 0], (matches == BACKGROUND).nonzero()[:, 0]
    positive = _draw(positive, int(number * positive_share))
    return positive, _draw(background, number - len(positive))


def _draw(indices: Tensor, number: int) -> Tensor:
    if len(indices) <= number:
        return indices
    return indices[torch.randperm(len(indices), device=indices.device)[:number]]


def clip_to(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes inside an area of (height, width) pixels."""
    height, width = size
    return torch.stack([boxes[:, i].clamp(0, bound) for i, bound in enumerate((width, height, width, height))], dim=-1)


def assign_levels(boxes: Tensor, levels: int, finest: float = 56.0) -> Tensor:
    """Level of each box, int64 ``[K]``: ``floor(log2(sqrt(area) / finest))``, within 0 .. ``levels`` - 1.

    Args:
        finest: level 1 begins at twice this side, in pixels. Lin et al. 2017 pool a box of 224 pixels from stride 16:
            56 where the finest stride is 4.
    """
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
    level = torch.floor(torch.log2(side / finest + 1e-6))
    return level.clamp(0, levels - 1).long()


def pool_levels(
    maps: Sequence[Tensor],
    strides: Sequence[float],
    boxes: Sequence[Tensor],
    *,
    size: int,
    sampling: int = 0,
    finest: float = 56.0,
) -> Tensor:
    """RoIAlign (aligned) of each box on its level of the pyramid: ``[sum K_i, C, size, size]``.

    Args:
        maps: levels ``[B, C, h_l, w_l]``, fine to coarse; strides: input pixels per cell, fractions welcome.
        boxes: one ``[K_i, 4]`` per image in input pixels.
        sampling: points per output cell and axis, 0 = as many as the box's size asks for.
        finest: see :func:`assign_levels`.
    """
    image = torch.cat([b.new_full((len(b), 1), i, dtype=torch.float32) for i, b in enumerate(boxes)])
    flat = torch.cat(list(boxes)).float()
    rois = torch.cat([image, flat], dim=1)
    level = assign_levels(flat, len(strides), finest)
    pooled, order = [], []
    for i, (features, stride) in enumerate(zip(maps, strides, strict=True)):
        chosen = (level == i).nonzero()[:, 0]
        # An empty level is pooled too: every level stays in the graph of every step, as data parallelism expects.
        with torch.autocast(features.device.type, enabled=False):  # half precision would move boxes by pixels
            features = features if features.dtype == torch.float64 else features.float()
            rois_here = rois[chosen].to(features.dtype)
            pooled.append(roi_align(features, rois_here, size, 1 / stride, sampling, True))
        order.append(chosen)
    return torch.cat(pooled)[torch.cat(order).argsort()]
