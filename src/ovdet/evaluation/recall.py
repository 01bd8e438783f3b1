"""Recall of class-agnostic proposals, as COCO's evaluator counts it with classes ignored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ovdet.evaluation.arrays import Truth

IOUS = np.linspace(0.5, 0.95, 10)
NEVER = np.iinfo(np.int64).max  # rank of what no proposal finds


def ranks_found(boxes: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """At which proposal of an image each object is found, from 0: int64 ``[10, G]`` for the ten IoUs.

    From the first proposal on, each takes the object that it overlaps most among those that are not taken yet, where
    that is at least the IoU; of equal ones the last.

    Args:
        boxes: xyxy ``[N, 4]``, best first; objects: xyxy ``[G, 4]``.
    """
    ranks = np.full((len(IOUS), len(objects)), NEVER)
    if not len(boxes) or not len(objects):
        return ranks
    iou = _iou(boxes.astype(np.float64), objects.astype(np.float64))
    for row in np.flatnonzero(iou.max(1) >= IOUS[0]):
        free = np.where(ranks == NEVER, iou[row], -1.0)
        best = free.shape[1] - 1 - free[:, ::-1].argmax(1)
        hit = np.flatnonzero(free[np.arange(len(IOUS)), best] >= IOUS)
        ranks[hit, best[hit]] = row
    return ranks


def _iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    side = np.minimum(boxes[:, None, 2:], others[None, :, 2:]) - np.maximum(boxes[:, None, :2], others[None, :, :2])
    shared = np.clip(side, 0, None).prod(-1)
    area, other = ((b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, others))
    return shared / np.maximum(area[:, None] + other[None] - shared, 1e-12)


def average_recall(
    truth: Truth,
    proposals: Callable[[int], np.ndarray],
    most: Sequence[int] = (100, 300, 1000),
    groups: dict[str, Sequence[int]] | None = None,
) -> dict[str, dict[str, float]]:
    """Average recall over IoU 0.5 to 0.95 of the objects of some classes, in 0..1; -1 without objects.

    Args:
        truth: the objects; crowds count for nothing.
        proposals: image row -> boxes xyxy ``[N, 4]``, best first.
        most: proposals an image that are looked at.
        groups: labels by the group's name, such as ``{"novel": [3, 7]}``; by default all as ``"all"``. Each is
            searched for by itself: a proposal on an object of another group is not used up by that.

    Returns:
        By group ``AR@n``, over its objects, and ``class_AR@n``, the mean over its classes of the recall of the
        objects of that class (both ways are in use for such tables).
    """
    groups = groups or {"all": range(len(truth.names))}
    counted = ~truth.ignored
    corners = truth.boxes.copy()
    corners[:, 2:] += corners[:, :2]
    result = {}
    for name, labels in groups.items():
        rows = np.flatnonzero(counted & np.isin(truth.label, list(labels)))
        ranks = np.full((len(IOUS), len(rows)), NEVER)
        order = np.argsort(truth.image[rows], kind="stable")
        rows = rows[order]
        for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(truth.image[rows])) + 1) if len(rows) else ():
            boxes = proposals(int(truth.image[rows[part[0]]]))[: max(most)]
            ranks[:, part] = ranks_found(boxes, corners[rows[part]])
        result[name] = _summary(ranks, truth.label[rows], most)
    return result


def _summary(ranks: np.ndarray, labels: np.ndarray, most: Sequence[int]) -> dict[str, float]:
    values = {}
    for n in most:
        found = (ranks < n).mean(0) if len(labels) else np.zeros(0)  # share of the ten IoUs, by object
        values[f"AR@{n}"] = float(found.mean()) if len(labels) else -1.0
        per_class = [found[labels == label].mean() for label in np.unique(labels)]
        values[f"class_AR@{n}"] = float(np.mean(per_class)) if per_class else -1.0
    return values


def format_recall(values: dict[str, dict[str, float]]) -> str:
    """A table in percent, one line a group."""
    columns = list(next(iter(values.values())))
    rows = [["", *(c.replace("_", " ") for c in columns)]]
    for group, entries in values.items():
        rows.append([group, *("-" if entries[c] < 0 else f"{100 * entries[c]:.1f}" for c in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
