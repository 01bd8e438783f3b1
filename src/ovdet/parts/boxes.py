"""Box arithmetic of detectors: coding, matching, sampling, pooling, suppression; batches without host synchronisation.

Boxes are float ``[..., 4]``, xyxy in pixels. What differs in number between images is padded (:class:`Padded`), so
that a batch is one computation and its numbers need not be known on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms, roi_align

BACKGROUND, IGNORED = -1, -2
_MOST_LOG_SCALE = math.log(1000 / 16)  # a decoded side is at most 62.5 times its box's
_TABLE = 2**25  # entries of a table of overlaps computed at once


class Padded(NamedTuple):
    """Boxes of several images, filled up to one number with zeros."""

    boxes: Tensor  # float32 [B, K, 4]
    valid: Tensor  # bool [B, K]

    @classmethod
    def of(cls, boxes: Sequence[Tensor], most: int | None = None) -> Padded:
        """From one ``[K_i, 4]`` per image, all on one device; ``most`` columns at least."""
        width = max([len(b) for b in boxes] + [most or 0])
        out = boxes[0].new_zeros(len(boxes), width, 4, dtype=torch.float32)
        for row, b in zip(out, boxes, strict=True):
            row[: len(b)] = b
        numbers = to_device(torch.tensor([len(b) for b in boxes]), out.device)
        return cls(out, torch.arange(width, device=out.device) < numbers[:, None])

    def unpad(self) -> list[Tensor]:
        """One ``[K_i, 4]`` per image, of which the valid ones come first in each row. One host synchronisation."""
        return [b[:n] for b, n in zip(self.boxes, self.valid.sum(1).tolist(), strict=True)]


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A host tensor copied without waiting for the device."""
    return tensor.to(device, non_blocking=True)


def sizes_tensor(image_sizes: Sequence[tuple[int, int]] | Tensor, device: torch.device | str) -> Tensor:
    """(height, width) of images as float32 ``[B, 2]`` on a device."""
    if isinstance(image_sizes, Tensor):
        return image_sizes.to(device, torch.float32, non_blocking=True)
    return to_device(torch.tensor(image_sizes, dtype=torch.float32).reshape(-1, 2), device)


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A float32 vector, copied to its device once."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


# -- coding -----------------------------------------------------------------------------------------------------------


def encode_boxes(targets: Tensor, boxes: Tensor, weights: Sequence[float]) -> Tensor:
    """Offsets ``[..., 4]`` that turn boxes into targets (R-CNN, Girshick et al. 2014, times ``weights``).

    ``(w_x (x'-x)/w, w_y (y'-y)/h, w_w log(w'/w), w_h log(h'/h))`` of centres and sides; float32.
    """
    centre, side = _centre_side(boxes)
    target_centre, target_side = _centre_side(targets)
    offsets = torch.cat([(target_centre - centre) / side, (target_side / side).log()], dim=-1)
    return offsets * constant(tuple(weights), offsets.device)


def decode_boxes(offsets: Tensor, boxes: Tensor, weights: Sequence[float], *, limit_below: bool = True) -> Tensor:
    """Inverse of :func:`encode_boxes`: ``[..., 4]`` xyxy, float32. A side grows at most 62.5 times.

    Args:
        limit_below: whether it also shrinks at most 62.5 times.
    """
    offsets = offsets.float() / constant(tuple(weights), offsets.device)
    centre, side = _centre_side(boxes)
    centre = centre + offsets[..., :2] * side
    least = -_MOST_LOG_SCALE if limit_below else None
    half = side * offsets[..., 2:].clamp(min=least, max=_MOST_LOG_SCALE).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def _centre_side(boxes: Tensor) -> tuple[Tensor, Tensor]:
    boxes = boxes.float()
    side = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-3)  # a box without extent has no scale to code in
    return (boxes[..., :2] + boxes[..., 2:]) / 2, side


def clip_to(boxes: Tensor, size: tuple[int, int] | Tensor) -> Tensor:
    """Boxes inside areas of (height, width) pixels that begin at the top left.

    Args:
        boxes: ``[N, 4]`` with one size, or ``[B, N, 4]`` with sizes ``[B, 2]``.
    """
    if isinstance(size, Tensor):
        bounds = size.to(boxes.dtype).flip(-1).repeat(1, 2)[:, None]
        return torch.minimum(boxes.clamp(min=0), bounds)
    height, width = size
    return torch.stack([boxes[:, i].clamp(0, bound) for i, bound in enumerate((width, height, width, height))], dim=-1)


# -- matching and sampling --------------------------------------------------------------------------------------------


def match(boxes: Tensor, truth: Tensor, *, positive: float, negative: float, at_least: float | None = None) -> Tensor:
    """Which true box each box answers for: int64 ``[N]``, an index, ``BACKGROUND`` or ``IGNORED``.

    As :func:`match_batch` for one image.

    Args:
        boxes: ``[N, 4]``; truth: ``[M, 4]``, M may be 0.
    """
    return match_batch(
        boxes[None], Padded.of([truth]), positive=positive, negative=negative, at_least=at_least
    )[0]  # fmt: skip


def match_batch(
    boxes: Tensor, truth: Padded, *, positive: float, negative: float, at_least: float | None = None
) -> Tensor:
    """Which true box of its image each box answers for: int64 ``[B, N]``, an index, ``BACKGROUND`` or ``IGNORED``.

    IoU >= ``positive`` matches the true box of largest IoU; IoU < ``negative`` is background; between them the box is
    ignored. With ``at_least``, the boxes that overlap a true box most match it whenever that IoU is at least so much
    (every true box should be learned by some anchor); one that serves several takes the last.

    Args:
        boxes: ``[B, N, 4]``, or ``[1, N, 4]`` for the same boxes in every image.
    """
    images, number = len(truth.boxes), boxes.shape[1]
    best = boxes.new_zeros(images, number, dtype=torch.float32)
    index = torch.zeros_like(best, dtype=torch.int64)
    forced = torch.full_like(index, BACKGROUND)
    # A table of all pairs would need gigabytes for crowded images.
    chunk = max(_TABLE // max(images * number, 1), 1)
    for start in range(0, truth.boxes.shape[1] if number else 0, chunk):
        part, valid = truth.boxes[:, start : start + chunk], truth.valid[:, start : start + chunk]
        iou = pairwise_iou(boxes, part).masked_fill(~valid[:, None], -1)  # [B, N, chunk]
        value, which = iou.max(dim=2)
        better = value > best
        best, index = torch.where(better, value, best), torch.where(better, which + start, index)
        if at_least is not None:
            most = iou.amax(dim=1, keepdim=True)
            rank = torch.arange(start, start + part.shape[1], device=boxes.device)
            serves = torch.where((iou == most) & (most >= at_least), rank, BACKGROUND)
            forced = torch.maximum(forced, serves.amax(dim=2))
    result = torch.where(best < negative, BACKGROUND, IGNORED)
    result = torch.where(best >= positive, index, result)
    return torch.where(forced >= 0, forced, result) if at_least is not None else result


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union ``[B, N, M]`` of ``[B or 1, N, 4]`` with ``[B, M, 4]``, float32 (NaN for two points)."""
    boxes, others = boxes.float()[:, :, None], others.float()[:, None]
    side = torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(boxes[..., :2], others[..., :2])
    shared = side.clamp(min=0).prod(-1)
    area, other_area = ((b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]) for b in (boxes, others))
    return shared / (area + other_area - shared)


class Draw(NamedTuple):
    """Entries drawn from each row: those that are valid come first among the positives, and among the rest."""

    index: Tensor  # int64 [B, P + K]
    valid: Tensor  # bool [B, P + K]
    positives: int  # P: columns before it are of positives, the others of background


def draw(matches: Tensor, number: int, positive_share: float) -> Draw:
    """At most ``number`` entries of each row of :func:`match_batch`'s result, drawn at random.

    At most ``positive_share`` of ``number`` are positive; background fills the rest. Draws come from torch's default
    generator of the device.
    """
    most = min(int(number * positive_share), matches.shape[1])
    rest = min(number, matches.shape[1])
    keys = torch.rand(matches.shape, device=matches.device)
    chosen, valid = _smallest(keys, matches >= 0, most)
    index, background = _smallest(keys, matches == BACKGROUND, rest)
    room = number - valid.sum(dim=1, keepdim=True)
    background &= torch.arange(rest, device=matches.device) < room
    return Draw(torch.cat([chosen, index], 1), torch.cat([valid, background], 1), most)


def _smallest(keys: Tensor, wanted: Tensor, number: int) -> tuple[Tensor, Tensor]:
    value, index = keys.masked_fill(~wanted, 2.0).topk(number, dim=1, largest=False, sorted=True)
    return index, value < 2.0


# -- suppression ------------------------------------------------------------------------------------------------------


def suppress(boxes: Tensor, valid: Tensor, iou: float) -> Tensor:
    """Greedy non-maximum suppression within each row: bool ``[G, n]``, True where a box stays.

    A box goes when one before it, that stays, overlaps it by more than ``iou``.

    Args:
        boxes: ``[G, n, 4]``, by falling score; valid: bool ``[G, n]``, others neither stay nor count.
    """
    if boxes.device.type == "cpu":
        return _suppress_by_row(boxes, valid, iou)
    return _suppress_at_once(boxes, valid, iou)


def _suppress_by_row(boxes: Tensor, valid: Tensor, iou: float) -> Tensor:
    keep = torch.zeros_like(valid)
    for row, own, good in zip(keep, boxes, valid, strict=True):
        where = good.nonzero()[:, 0]
        # Scores that fall with the position: the order given is the order taken.
        row[where[nms(own[where].float(), -torch.arange(len(where), dtype=torch.float32), iou)]] = True
    return keep


def _suppress_at_once(boxes: Tensor, valid: Tensor, iou: float, rounds: int = 16) -> Tensor:
    """By repeating ``stays = no stayer before it overlaps it`` until nothing changes, which is the greedy answer.

    After round r the answer is right for every box that is the end of a chain of at most r overlaps; chains of
    proposals are short. One host synchronisation every ``rounds`` rounds.
    """
    size = boxes.shape[1]
    earlier = torch.ones(size, size, dtype=torch.bool, device=boxes.device).triu(1)
    group = max(_TABLE // max(size * size, 1), 1)
    over = torch.cat([(pairwise_iou(b, b) > iou) & earlier for b in boxes.split(group)])
    keep = valid
    while True:
        for _ in range(rounds):
            before = keep
            keep = valid & ~(over & before[:, :, None]).any(dim=1)
        if torch.equal(keep, before):
            return keep


# -- pooling ----------------------------------------------------------------------------------------------------------


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

    One host synchronisation, for the number of boxes on each level.

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
    order = level.argsort(stable=True)
    counts = (level[:, None] == torch.arange(len(strides), device=level.device)).sum(0).tolist()
    pooled = []
    for features, stride, here in zip(maps, strides, rois[order].split(counts), strict=True):
        # An empty level is pooled too: every level stays in the graph of every step, as data parallelism expects.
        with torch.autocast(features.device.type, enabled=False):  # half precision would move boxes by pixels
            features = features if features.dtype == torch.float64 else features.float()
            pooled.append(roi_align(features, here.to(features.dtype), size, 1 / stride, sampling, True))
    return torch.cat(pooled)[order.argsort()]
