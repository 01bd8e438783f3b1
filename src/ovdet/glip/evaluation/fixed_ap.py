"""LVIS's AP with a fixed number of detections for each class, not for each image (Dave et al. 2021)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from ovdet.evaluation.coco import ground_truth
from ovdet.evaluation.lvis import accumulate_by_category, category_groups

PER_CLASS = 10_000  # detections of a class over the data set
_AREAS = ("", "s", "m", "l")


def best_per_class(detections: Sequence[dict[str, Any]], most: int = PER_CLASS) -> list[dict[str, Any]]:
    """The ``most`` detections of highest score of each class; equal scores in the order given."""
    by_class: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for detection in detections:
        by_class[detection["category_id"]].append(detection)
    return [
        d
        for found in by_class.values()
        for d in (found if len(found) <= most else sorted(found, key=lambda d: -d["score"])[:most])
    ]


def fixed_ap(
    content: dict[str, Any], detections: Sequence[dict[str, Any]], *, most: int = PER_CLASS, file: str = "annotations"
) -> dict[str, float]:
    """Fixed AP of COCO results against an LVIS file.

    Args:
        content: the file's json content; detections: dicts of image_id, category_id, score and bbox (xywh).
        most: detections of each class over all images; an image has no limit of its own.
        file: name of the annotation file for messages.

    Returns:
        ``AP``, ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl``, ``APr``, ``APc``, ``APf``, ``AR``, ``ARs``, ``ARm``,
        ``ARl`` in 0..1; -1 where there is nothing to find.

    Raises:
        UserError: the file is not LVIS's.
    """
    truth = ground_truth(content, kind="bbox", file=file, lvis=True)
    known = {image["id"] for image in truth["images"]}
    kept = best_per_class([d for d in detections if d["image_id"] in known], most)
    precision, recall = accumulate_by_category(truth, kept, kind="bbox", limit=max(most, 1))

    def mean(values: np.ndarray) -> float:
        values = values[values > -1]
        return float(values.mean()) if values.size else -1.0

    results = {"AP": mean(precision[..., 0]), "AP50": mean(precision[:1, ..., 0]), "AP75": mean(precision[5:6, ..., 0])}
    results |= {f"AP{name}": mean(precision[..., i]) for i, name in enumerate(_AREAS) if i}
    results |= {f"AP{f}": mean(precision[:, :, rows, 0]) for f, rows in category_groups(truth).items()}
    return results | {f"AR{name}": mean(recall[..., i]) for i, name in enumerate(_AREAS)}
