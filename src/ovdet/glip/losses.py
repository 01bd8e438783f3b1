"""What GLIP minimises: focal loss over tokens, GIoU of boxes, cross-entropy of centerness (GLIP, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ovdet.glip import boxes as ops
from ovdet.glip.assign import assign
from ovdet.glip.head import HeadOutput
from training.engine.distributed import all_reduce_sum

BOX_WEIGHT = 2.0
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss
_EPS = 1e-7


class GroundTruth(NamedTuple):
    """The boxes of one image, and what each is called. A tuple: loaders pin the tensors of no other kind of class.

    Attributes:
        boxes: ``[M, 4]``, inclusive ends, pixels of the network's input; M may be 0.
        tokens: bool ``[M, T]``, True at the tokens of the box's phrase.
    """

    boxes: Tensor
    tokens: Tensor


@dataclass
class Assignment:
    """Targets of all anchors of one image."""

    box: Tensor  # int64 [N], row of the ground truth, -1 for background
    tokens: Tensor  # float [N, T]


def assign_targets(anchors: Tensor, counts: Sequence[int], truth: GroundTruth, *, no_object: bool) -> Assignment:
    """Targets of one image.

    Args:
        anchors, counts: see :func:`ovdet.glip.assign.assign`.
        no_object: whether the last column stands for "nothing": background anchors then have a one there. It counts
            only where a text fills every column, as padding is not part of the loss.
    """
    box = assign(anchors, counts, truth.boxes)
    positive = box >= 0
    tokens = anchors.new_zeros(len(anchors), truth.tokens.shape[1])
    tokens[positive] = truth.tokens[box[positive]].to(tokens.dtype)
    if no_object:
        tokens[~positive, -1] = 1
    return Assignment(box, tokens)


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = ALPHA, gamma: float = GAMMA) -> Tensor:
    """Sigmoid focal loss of each element (Lin et al. 2017), computed in float32.

    ``-alpha (1-p)^gamma log p`` where the target is 1, ``-(1-alpha) p^gamma log(1-p)`` where it is 0.
    """
    logits, targets = logits.float(), targets.float()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probability = logits.sigmoid()
    miss = targets * (1 - probability) + (1 - targets) * probability
    return (targets * alpha + (1 - targets) * (1 - alpha)) * cross_entropy * miss**gamma


def token_loss(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Sum of the focal loss over the tokens that are no padding.

    Args:
        logits, targets: ``[B, N, T]``; mask: bool ``[B, T]``.
    """
    return (focal_loss(logits, targets) * mask[:, None]).sum()


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """``1 - GIoU`` ``[N]`` of boxes ``[N, 4]`` (Rezatofighi et al. 2019); sides here are ``x2 - x1``.

    A predicted box that is turned over has no extent.
    """
    high = torch.maximum(predicted[:, :2], predicted[:, 2:])
    low = predicted[:, :2]
    shared = _area((torch.minimum(high, target[:, 2:]) - torch.maximum(low, target[:, :2])).clamp(min=0))
    union = _area(high - low) + _area(target[:, 2:] - target[:, :2]) - shared + _EPS
    hull = _area(torch.maximum(high, target[:, 2:]) - torch.minimum(low, target[:, :2])) + _EPS
    return 1 - (shared / union - (hull - union) / hull)


def _area(sides: Tensor) -> Tensor:
    # Not prod: its backward pass takes another way, of other rounding, where operations are counted.
    return sides[:, 0] * sides[:, 1]


def glip_losses(
    output: HeadOutput,
    mask: Tensor,
    anchors: Tensor,
    truths: Sequence[GroundTruth],
    *,
    no_object: bool,
    world_size: int = 1,
) -> dict[str, Tensor]:
    """The three losses of a batch; their sum is the objective.

    Args:
        output: of the head; mask: bool ``[B, T]``, tokens that are no padding.
        anchors: ``[N, 4]``; truths: one per image.
        no_object: see :func:`assign_targets`.
        world_size: number of processes; normalisers are their averages. Every process must call.

    Returns:
        ``loss_token`` (normalised by the positives), ``loss_box`` (GIoU weighted by centerness, times 2, normalised by
        the sum of centerness) and ``loss_centerness``. Without positives the last two are 0.
    """
    counts = [h * w for h, w in output.grids]
    with torch.no_grad():
        targets = [assign_targets(anchors, counts, truth, no_object=no_object) for truth in truths]
        image, cell = torch.stack([t.box >= 0 for t in targets]).nonzero().unbind(1)
        matched = torch.cat([truth.boxes[t.box[t.box >= 0]] for truth, t in zip(truths, targets, strict=True)]).float()
        prior = anchors[cell]
        # The reference compares with boxes that were encoded and decoded again.
        wanted = ops.decode(ops.encode(matched, prior), prior)
        central = ops.centerness((prior[:, :2] + prior[:, 2:]) / 2, wanted)
        totals = torch.stack([central.new_tensor(float(len(cell))), central.sum()]).double()
        totals = all_reduce_sum(totals) / world_size
        positives, weight = totals.clamp(min=1.0).float()[0], totals.float()[1]
    loss_token = token_loss(output.tokens, torch.stack([t.tokens for t in targets]), mask) / positives
    offsets, logits = output.boxes[image, cell].float(), output.centerness[image, cell].float()
    giou = giou_loss(ops.decode(offsets, prior), wanted)
    # Empty sums, not missing terms: every parameter stays in the graph, as data parallelism expects.
    loss_box = (giou * central).sum() / weight.clamp(min=torch.finfo(torch.float32).tiny) * BOX_WEIGHT
    loss_centerness = F.binary_cross_entropy_with_logits(logits, central, reduction="sum") / positives
    return {"loss_token": loss_token, "loss_box": loss_box, "loss_centerness": loss_centerness}
