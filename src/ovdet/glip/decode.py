"""From token logits to detections: class scores, candidates, boxes, NMS (GLIP, section 3.1; ATSS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from ovdet.glip import boxes as ops
from ovdet.glip.head import HeadOutput

AGGREGATIONS = ("mean", "max", "onehot", "power")
MERGES = ("nms", "vote")  # of the detections of several views, see ovdet.glip.views


@dataclass(frozen=True)
class Selection:
    """Which candidates become detections.

    Attributes:
        aggregation: class score from the probabilities of its tokens: ``"mean"``, ``"max"``, ``"power"`` (geometric
            mean), or ``"onehot"`` (class i is token column i, for texts of one token a class).
        score: class scores must exceed it, before centerness.
        per_level: most (cell, class) pairs of a level.
        nms: IoU above which a weaker box of the same class is dropped.
        per_image: most detections of an image and prompt.
    """

    aggregation: str = "mean"
    score: float = 0.05
    per_level: int = 1000
    nms: float = 0.6
    per_image: int = 100

    def __post_init__(self) -> None:
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f'score aggregation is "{self.aggregation}": use one of {", ".join(AGGREGATIONS)}')


def class_scores(probabilities: Tensor, tokens: Sequence[Sequence[int]], aggregation: str = "mean") -> Tensor:
    """Scores ``[..., C]`` of C classes from token probabilities ``[..., T]``.

    Args:
        tokens: token positions of each class; a class without any scores 0.
        aggregation: see :class:`Selection`.
    """
    if aggregation == "onehot":
        return probabilities[..., : len(tokens)]
    # Padded to the longest class: one gather for all classes.
    longest = max((len(t) for t in tokens), default=0)
    if longest == 0:
        return probabilities.new_zeros(*probabilities.shape[:-1], len(tokens))
    index = torch.tensor([[*t, *[0] * (longest - len(t))] for t in tokens], device=probabilities.device)
    lengths = torch.tensor([len(t) for t in tokens], device=probabilities.device)
    used = torch.arange(longest, device=index.device) < lengths[:, None]  # [C, longest]
    if aggregation == "mean":
        weights = probabilities.new_zeros(probabilities.shape[-1], len(tokens))
        share = used / lengths.clamp(min=1)[:, None]
        weights.scatter_add_(0, index.T, share.T.to(weights.dtype))
        return probabilities @ weights
    values = probabilities[..., index]  # [..., C, longest]
    if aggregation == "max":
        return values.masked_fill(~used, 0).amax(-1)
    if aggregation == "power":
        powers = values.masked_fill(~used, 1).prod(-1) ** (1 / lengths.clamp(min=1))
        return powers.masked_fill(lengths == 0, 0)
    raise ValueError(f'score aggregation is "{aggregation}": use one of {", ".join(AGGREGATIONS)}')


def select_detections(
    output: HeadOutput,
    anchors: Tensor,
    tokens: Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]],
    sizes: Sequence[tuple[int, int]],
    options: Selection,
    *,
    own: bool = False,
) -> list[dict[str, Tensor]]:
    """Detections of each image by falling score.

    Args:
        output: of the head; anchors: ``[N, 4]``.
        tokens: token positions of each class, the same for all images; with ``own`` a list of these, one per image.
        sizes: (height, width) of each image in the input, without padding.

    Returns:
        Per image ``boxes`` ``[K, 4]`` (inclusive ends, pixels of the input), ``scores`` ``[K]`` (square root of class
        score times centerness) and ``labels`` int64 ``[K]``, rows of ``tokens``.
    """
    per_image = list(tokens) if own else [tokens] * len(sizes)
    counts = [h * w for h, w in output.grids]
    results = []
    for i, (names, size) in enumerate(zip(per_image, sizes, strict=True)):
        scores = class_scores(output.tokens[i].float().sigmoid(), names, options.aggregation)  # [N, C]
        ranked = scores * output.centerness[i].float().sigmoid()[:, None]
        ranked = ranked.masked_fill(scores <= options.score, -1)
        cells, labels, values = _best_of_levels(ranked, counts, options.per_level)
        found = ops.clip(ops.decode(output.boxes[i, cells].float(), anchors[cells]), size)
        good = (found[:, 2:] >= found[:, :2]).all(1)
        found, labels, values = found[good], labels[good], values[good].sqrt()
        keep = batched_nms(ops.to_exclusive(found), values, labels, options.nms)
        keep = at_most(values[keep], keep, options.per_image)
        results.append({"boxes": found[keep], "scores": values[keep], "labels": labels[keep]})
    return results


def _best_of_levels(ranked: Tensor, counts: Sequence[int], most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best pairs of every level, cells int64 ``[K]``, classes ``[K]``, values ``[K]``; negative values are none."""
    classes, start, parts = ranked.shape[1], 0, []
    for count in counts:
        flat = ranked[start : start + count].flatten()
        value, index = flat.topk(min(most, len(flat)))
        index, value = index[value >= 0], value[value >= 0]
        parts.append((index // classes + start, index % classes, value))
        start += count
    cells, labels, values = (torch.cat(column) for column in zip(*parts, strict=True))
    return cells, labels, values


def at_most(values: Tensor, keep: Tensor, most: int) -> Tensor:
    """The first ``most`` of falling values, and those equal to the last of them."""
    if len(values) <= most:
        return keep
    return keep[values >= values[most - 1]]
