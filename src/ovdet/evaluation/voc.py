"""VOC's average precision by the rules of its development kit (Everingham et al. 2010).

A pixel has an extent: a box from pixel a to pixel b is b - a + 1 wide. A detection answers for the object that it
overlaps most; the first that does, from the highest score on, is right, further ones are wrong. One that overlaps a
difficult object most is neither, however many there are.
"""

from __future__ import annotations

import numpy as np

from ovdet.evaluation.arrays import Detections, Truth

IOUS = {"50": 0.5, "75": 0.75}


def voc_metrics(truth: Truth, found: Detections) -> dict[str, float]:
    """``VOC_AP50``, ``VOC_AP75``: mean of the classes' eleven-point AP (VOC 2007), and the same under the whole
    curve (``_area``, VOC 2010 and later). -1 without objects.

    COCO boxes of VOC files begin at the first pixel counted from 0 and end behind the last.
    """
    objects = truth.boxes.copy()
    objects[:, 2:] += objects[:, :2] - 1  # the last pixel
    boxes = found.boxes.copy()
    boxes[:, 2:] += boxes[:, :2]
    curves = {key: [] for key in IOUS}
    for label in range(len(truth.names)):
        mine, theirs = np.flatnonzero(truth.label == label), np.flatnonzero(found.label == label)
        for key, iou in IOUS.items():
            curves[key].append(
                precision_recall(
                    objects[mine], truth.image[mine], truth.ignored[mine], boxes[theirs], found.image[theirs],
                    found.scores[theirs], iou,
                )
            )  # fmt: skip
    return {
        f"VOC_AP{key}{suffix}": _mean([ap(*curve) for curve in curves[key] if curve is not None])
        for suffix, ap in (("", eleven_points), ("_area", area))
        for key in IOUS
    }


def precision_recall(
    objects: np.ndarray,
    object_image: np.ndarray,
    difficult: np.ndarray,
    boxes: np.ndarray,
    image: np.ndarray,
    scores: np.ndarray,
    iou: float,
) -> tuple[np.ndarray, np.ndarray] | None:
    """(precision, recall) after each detection of one class, from the highest score on; None without objects.

    Args:
        objects: ``[A, 4]`` and boxes: ``[N, 4]``, first and last pixel; object_image, image: the image of each.
        difficult: bool ``[A]``; scores: ``[N]``.
        iou: overlap from which on a detection answers for an object.
    """
    number = int((~difficult).sum())
    if not number:
        return None
    order = np.argsort(-scores, kind="stable")
    right, wrong = np.zeros(len(order), bool), np.zeros(len(order), bool)
    rows = {int(i): np.flatnonzero(object_image == i) for i in np.unique(object_image)}
    taken = np.zeros(len(objects), bool)
    for place, row in enumerate(order):
        own = rows.get(int(image[row]))
        wrong[place] = True
        if own is None:
            continue
        overlap = _overlap(boxes[row], objects[own])
        best = own[overlap.argmax()]
        if overlap.max() < iou:
            continue
        wrong[place] = taken[best] and not difficult[best]
        right[place] = not taken[best] and not difficult[best]
        taken[best] = True
    hits, misses = np.cumsum(right), np.cumsum(wrong)
    return hits / np.maximum(hits + misses, np.finfo(np.float32).eps), hits / number


def _overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    side = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2]) + 1
    shared = np.clip(side, 0, None).prod(1)
    return shared / ((box[2:] - box[:2] + 1).prod() + (others[:, 2:] - others[:, :2] + 1).prod(1) - shared)


def eleven_points(precision: np.ndarray, recall: np.ndarray) -> float:
    """Mean over recall 0, 0.1, ..., 1 of the best precision at that recall or a higher one."""
    points = np.arange(11) * 0.1
    return float(np.mean([precision[recall >= point].max(initial=0.0) for point in points]))


def area(precision: np.ndarray, recall: np.ndarray) -> float:
    """Area under the curve of the best precision at each recall or a higher one."""
    precision, recall = np.concatenate([[0], precision, [0]]), np.concatenate([[0], recall, [1]])
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.flatnonzero(np.diff(recall))
    return float(((recall[steps + 1] - recall[steps]) * precision[steps + 1]).sum())


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else -1.0
