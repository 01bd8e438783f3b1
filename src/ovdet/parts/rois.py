"""Regions of interest for the second stage: chosen from proposals and true boxes for the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ovdet.parts import boxes as box_ops
from ovdet.parts.boxes import Padded


class Samples(NamedTuple):
    """RoIs of a batch chosen for the loss, image by image."""

    boxes: list[Tensor]  # [K_i, 4], positives first
    labels: Tensor  # [sum K_i] int64, C = background
    positives: list[Tensor]  # indices of true boxes that the first of each K_i answer for, int64 [P_i]


def check_labels(targets: Sequence[dict[str, Tensor]], base_mask: Tensor) -> None:
    """ValueError for targets with labels that are not those of base classes.

    They are looked at where they are on the host; those on a GPU would make it wait in every step.

    Args:
        targets: with ``labels``, int64 ``[M_i]``; base_mask: bool ``[C]``.
    """
    on_host = [target["labels"] for target in targets if target["labels"].device.type == "cpu"]
    if on_host:
        labels, base = torch.cat(on_host), base_mask.cpu()
        if not ((labels >= 0) & (labels < len(base))).all() or not base[labels].all():
            raise ValueError("targets hold labels that are not base classes: train on base-class annotations only")


@torch.no_grad()
def sample_rois(
    proposals: Padded | Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]] | Tensor,
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
    """RoIs for the loss from proposals and the true boxes themselves. One host synchronisation, for their numbers.

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
    proposals = proposals if isinstance(proposals, Padded) else Padded.of(proposals)
    own, device = Padded.of(truth), proposals.boxes.device
    sizes = box_ops.sizes_tensor(image_sizes, device)
    nothing = ~(own.valid.any(1) | proposals.valid.any(1))[:, None]
    # Where there is something it is no box: it would overlap true boxes, and be the best of one.
    whole = torch.cat([torch.zeros_like(sizes), sizes.flip(1)], 1)[:, None] * nothing[..., None]
    boxes = torch.cat([own.boxes, proposals.boxes, whole], dim=1)
    valid = torch.cat([own.valid, proposals.valid, nothing], dim=1)
    first = own.boxes.shape[1] if truth_keeps_label else 0
    matches = box_ops.match_batch(
        boxes[:, first:], own, positive=iou, negative=iou, at_least=iou if low_quality else None
    )
    rank = torch.arange(first, device=device).expand(len(boxes), -1)
    matches = torch.cat([rank, matches], dim=1).masked_fill(~valid, box_ops.IGNORED)
    return collect(boxes, matches, box_ops.draw(matches, number, positive_share), labels, background)


def collect(
    boxes: Tensor, matches: Tensor, draw: box_ops.Draw, labels: Sequence[Tensor], background: int
) -> Samples:
    """The drawn RoIs as :class:`Samples`.

    Args:
        boxes: candidates ``[B, N, 4]``; matches: the true box of each, int64 ``[B, N]``.
        labels: of the true boxes, int64 ``[M_i]`` per image.
    """
    positive = draw.valid[:, : draw.positives].sum(1)
    counts = torch.stack([positive, draw.valid[:, draw.positives :].sum(1)], 1).tolist()
    chosen, chosen_labels, positives = [], [], []
    for i, (hits, rest) in enumerate(counts):
        index = torch.cat([draw.index[i, :hits], draw.index[i, draw.positives : draw.positives + rest]])
        chosen.append(boxes[i, index])
        positives.append(matches[i, draw.index[i, :hits]])
        chosen_labels += [labels[i][positives[-1]], index.new_full((rest,), background)]
    return Samples(chosen, torch.cat(chosen_labels), positives)
