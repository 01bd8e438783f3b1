"""LVIS's AP with a fixed number of detections for each class, not for each image (Dave et al. 2021)."""

from __future__ import annotations

import numpy as np

from ovdet.evaluation.arrays import Detections, Truth
from ovdet.evaluation.coco import accumulate, check_lvis
from ovdet.evaluation.lvis import FREQUENCIES

PER_CLASS = 10_000  # detections of a class over the data set
_AREAS = ("", "s", "m", "l")


def best_per_class(found: Detections, most: int = PER_CLASS) -> np.ndarray:
    """Rows of the ``most`` detections of highest score of each class, ascending; of equal scores the first."""
    order = np.lexsort((-found.scores, found.label))  # stable: equal scores stay in the order given
    label = found.label[order]
    rank = np.arange(len(order)) - np.searchsorted(label, label)
    return np.sort(order[rank < most])


def fixed_ap(truth: Truth, found: Detections, *, most: int = PER_CLASS) -> dict[str, float]:
    """Fixed AP of detections against an LVIS file.

    Args:
        most: detections of each class over all images; an image has no limit of its own.

    Returns:
        ``AP``, ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl``, ``APr``, ``APc``, ``APf``, ``AR``, ``ARs``, ``ARm``,
        ``ARl`` in 0..1; -1 where there is nothing to find.

    Raises:
        UserError: the file is not LVIS's.
    """
    check_lvis(truth)
    precision, recall = accumulate(truth, found, best_per_class(found, most), "bbox", lvis=True, most=most)

    def mean(values: np.ndarray) -> float:
        values = values[values > -1]
        return float(values.mean()) if values.size else -1.0

    results = {"AP": mean(precision[..., 0]), "AP50": mean(precision[:1, ..., 0]), "AP75": mean(precision[5:6, ..., 0])}
    results |= {f"AP{name}": mean(precision[..., i]) for i, name in enumerate(_AREAS) if i}
    frequencies = np.array(truth.frequencies)
    results |= {f"AP{f}": mean(precision[:, :, frequencies == f, 0]) for f in FREQUENCIES}
    return results | {f"AR{name}": mean(recall[..., i]) for i, name in enumerate(_AREAS)}
