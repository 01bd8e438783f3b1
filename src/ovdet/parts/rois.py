"""Regions of interest for the second stage: chosen from proposals and true boxes for the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ovdet.parts import boxes as box_ops


class Samples(NamedTuple):
    """RoIs of a batch chosen for the loss, image by image."""

    boxes: list[Tensor]  # [K_i, 4], positives first
    labels: Tensor  # [sum K_i] int64, C = background
    positives: list[Tensor]  # indices of true boxes that the first of each K_i answer for, int64 [P_i]


@torch.no_grad()
def sample_rois(
    proposals: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
    truth: Sequence[Tensor],
    labels: Sequence[Tensor],
    background: int,
    *,
    number: int = 512,
    positive_share: float = 0.25,
    iou: float = 0.5,
    low_quality: bool = False,
    truth_keeps_label: bool = True,
) -> Samples:
    """RoIs for the loss from proposals and the true boxes themselves.

    An image without any gets its whole valid area, as background: every image (and so every process) always
    contributes a RoI, whose label is right because there is no true box.

    Args:
        proposals: one ``[R_i, 4]`` per image.
        image_sizes: (height, width) of the valid area of each image.
        truth: true boxes, one ``[M_i, 4]`` per image; labels: theirs, int64 ``[M_i]``.
        background: label of background.
        number: RoIs per image, of which at most ``positive_share`` are positive.
        iou: from here on a RoI has the label of the true box that it overlaps most, below it is background.
        low_quality: whether a proposal that is the best of a true box (from ``iou`` on) goes to that one even if it
            overlaps another more.
        truth_keeps_label: whether a true box stands for itself; otherwise it is assigned like a proposal, and a copy
            of another one takes that one's label.
    """
    boxes, chosen_labels, positives = [], [], []
    for proposed, (height, width), own, own_labels in zip(proposals, image_sizes, truth, labels, strict=True):
        own = own.float()
        candidates = torch.cat([own, proposed])
        if not len(candidates):
            candidates = own.new_tensor([[0, 0, width, height]])
        at_least = iou if low_quality else None
        if truth_keeps_label and len(own):
            matches = box_ops.match(candidates[len(own) :], own, positive=iou, negative=iou, at_least=at_least)
            matches = torch.cat([torch.arange(len(own), device=own.device), matches])
        else:
            matches = box_ops.match(candidates, own, positive=iou, negative=iou, at_least=at_least)
        positive, negative = box_ops.sample(matches, number, positive_share)
        positives.append(matches[positive])
        boxes.append(candidates[torch.cat([positive, negative])])
        chosen_labels += [own_labels[matches[positive]], torch.full_like(negative, background)]
    return Samples(boxes, torch.cat(chosen_labels), positives)
