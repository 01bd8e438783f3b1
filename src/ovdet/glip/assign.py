"""Adaptive training sample selection (ATSS, Zhang et al. 2020): which anchors answer for which box."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ovdet.glip import boxes as ops

CANDIDATES = 9  # anchors per box and level
INSIDE = 0.01  # pixels that an anchor's centre must be inside its box


def assign(anchors: Tensor, counts: Sequence[int], boxes: Tensor, candidates: int = CANDIDATES) -> Tensor:
    """The box of each anchor: int64 ``[N]``, an index of ``boxes`` or -1.

    On every level the anchors whose centres are nearest to a box are its candidates. Those whose IoU reaches the mean
    plus one standard deviation of all its candidates, and whose centre is inside the box, are positive. An anchor that
    two boxes claim goes to the one it overlaps more.

    Args:
        anchors: ``[N, 4]`` of all levels; counts: how many there are on each level.
        boxes: ``[M, 4]``, M may be 0; both with inclusive ends.
        candidates: per box and level, where the level has as many.
    """
    chosen = torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
    if not len(boxes):
        return chosen
    iou = ops.box_iou(anchors, boxes)  # [N, M]
    centre, box_centre = (anchors[:, :2] + anchors[:, 2:]) / 2, (boxes[:, :2] + boxes[:, 2:]) / 2
    distance = (centre[:, None] - box_centre).square().sum(-1).sqrt()
    nearest, start = [], 0
    for count in counts:
        part = distance[start : start + count]
        nearest.append(part.topk(min(candidates, count), dim=0, largest=False).indices + start)
        start += count
    candidate = torch.cat(nearest)  # [K, M], anchors
    overlap = iou.gather(0, candidate)
    threshold = overlap.mean(0) + (overlap.std(0) if len(overlap) > 1 else 0)
    points = centre[candidate]  # [K, M, 2]
    inside = torch.cat([points - boxes[:, :2], boxes[:, 2:] - points], dim=-1).amin(-1) > INSIDE
    positive = (overlap >= threshold) & inside
    row, box = positive.nonzero().unbind(1)
    best = torch.full_like(chosen, -1, dtype=iou.dtype)
    anchor, value = candidate[row, box], overlap[row, box]
    best = best.scatter_reduce(0, anchor, value, "amax")
    wins = value == best[anchor]
    # Of equal overlaps the first box wins, whatever the order of execution.
    first = torch.full_like(chosen, len(boxes)).scatter_reduce(0, anchor[wins], box[wins], "amin")
    return torch.where(first < len(boxes), first, chosen)
