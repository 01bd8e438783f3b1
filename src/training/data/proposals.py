"""Regions from annotations: object proposals with their crops, and region-text pairs."""

from __future__ import annotations

import numpy as np

from training.data.grid import enlarge

CROP_ENLARGEMENT = 1.5  # of a proposal, about its centre


def eligible(boxes: np.ndarray, min_size: float, max_size: float) -> np.ndarray:
    """Which boxes ``[A, 4]`` have ``min_size**2`` to ``max_size**2`` square pixels: bool ``[A]``."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return (areas >= min_size**2) & (areas <= max_size**2)


def draw_proposals(
    boxes: np.ndarray,
    rng: np.random.Generator,
    *,
    max_boxes: int = 20,
    min_size: float = 8,
    max_size: float = 1024,
    order: np.ndarray | None = None,
) -> np.ndarray:
    """At most ``max_boxes`` annotations drawn at random; those outside the area limits are skipped, not replaced.

    Args:
        boxes: ``[A, 4]`` xyxy in pixels of the image.
        min_size, max_size: limits; boxes of ``min_size**2`` to ``max_size**2`` square pixels are kept. The area of the
            box counts, not the annotated one, which is that of the mask.
        order: impose the order in which annotations are taken.

    Returns:
        Rows of ``boxes``, int64 ``[K]``; K may be 0.
    """
    order = rng.permutation(len(boxes)) if order is None else np.asarray(order, dtype=np.int64)
    drawn = order[:max_boxes]
    return drawn[eligible(boxes[drawn], min_size, max_size)]


def proposal_regions(boxes: np.ndarray, drawn: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of the drawn annotations, and the boxes of their crops: enlarged 1.5 times, clipped to the image.

    Args:
        boxes: ``[A, 4]`` xyxy in pixels of the image.
        drawn: int ``[K]``, see :func:`draw_proposals`.
        width, height: the image, pixels.

    Returns:
        (boxes, crop boxes): float32 ``[max(K, 1), 4]``, xyxy in pixels. Without a drawn annotation both are the
        top-left quarter by quarter of the image.
    """
    if len(drawn) == 0:
        quarter = np.array([[0, 0, width / 4, height / 4]], np.float32)
        return quarter, quarter
    chosen = boxes[drawn].astype(np.float32)
    return chosen, enlarge(chosen, CROP_ENLARGEMENT, width, height).astype(np.float32)
