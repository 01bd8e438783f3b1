"""LVIS's federated protocol (Gupta et al. 2019).

An image judges only the classes that it has objects of, or that are known to be absent from it
(``neg_category_ids``); a wrong detection of a class that is not annotated exhaustively in it counts for nothing; at
most 300 detections an image.
"""

from __future__ import annotations

import numpy as np

from ovdet.evaluation.arrays import Detections, Truth

LVIS_DETECTIONS = 300  # per image
FREQUENCIES = ("r", "c", "f")  # in fewer than 10, fewer than 100, and more training images


def best_per_image(found: Detections, most: int = LVIS_DETECTIONS) -> np.ndarray:
    """Rows of the ``most`` detections of highest score of each image, ascending; of equal scores the first."""
    order = np.lexsort((-found.scores, found.image))  # stable: equal scores stay in the order given
    image = found.image[order]
    rank = np.arange(len(order)) - np.searchsorted(image, image)
    return np.sort(order[rank < most])


def judged_pairs(truth: Truth, objects: np.ndarray, labels: range) -> set[tuple[int, int]]:
    """(image row, class) pairs that the truth says something about.

    Args:
        objects: rows of the annotated objects of these classes.
    """
    judged = set(zip(truth.image[objects].tolist(), truth.label[objects].tolist(), strict=True))
    judged |= {(image, c) for image, absent in enumerate(truth.absent) for c in absent if c in labels}
    return judged
