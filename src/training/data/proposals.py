"""Regions from annotations: object proposals with their crops, and region-text pairs."""

from __future__ import annotations

import numpy as np

from training.data.grid import enlarge

CROP_ENLARGEMENT = 1.5  # of a proposal, about its centre


def proposal_regions(
    boxes: np.ndarray,
    width: int,
    height: int,
    rng: np.random.Generator,
    *,
    max_boxes: int = 20,
    min_size: float = 8,
    max_size: float = 1024,
    order: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """At most ``max_boxes`` annotations drawn at random; those outside the area limits are skipped, not replaced.

    Args:
        boxes: ``[A, 4]`` xyxy in pixels of the image.
        width, height: the image, pixels.
        min_size, max_size: limits; boxes of ``min_size**2`` to ``max_size**2`` square pixels are kept. The area of the
            box counts, not the annotated one, which is that of the mask.
        order: impose the order in which annotations are taken.

    Returns:
        (boxes, crop boxes): float32 ``[K, 4]``, xyxy in pixels. When no annotation is left, both are the top-left
        quarter by quarter of the image, so K is never 0.
    """
    order = rng.permutation(len(boxes)) if order is None else np.asarray(order, dtype=np.int64)
    drawn = order[:max_boxes]
    areas = (boxes[drawn, 2] - boxes[drawn, 0]) * (boxes[drawn, 3] - boxes[drawn, 1])
    kept = drawn[(areas >= min_size**2) & (areas <= max_size**2)]
    if len(kept) == 0:
        quarter = np.array([[0, 0, width / 4, height / 4]], np.float32)
        return quarter, quarter
    chosen = boxes[kept].astype(np.float32)
    return chosen, enlarge(chosen, CROP_ENLARGEMENT, width, height).astype(np.float32)
