"""COCO segmentations to masks and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray | None:
    """Mask bool ``[height, width]`` of polygons, uncompressed or compressed run lengths; None when it is unusable.

    Polygons have at least three points; run lengths must be of the image's own size.
    """
    try:
        if isinstance(segmentation, list):
            polygons = [p for p in segmentation if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0]
            if not polygons or not np.isfinite(np.concatenate(polygons).astype(np.float64)).all():
                return None
            rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        elif isinstance(segmentation, dict):
            if list(segmentation.get("size", ())) != [height, width]:
                return None
            counts = segmentation["counts"]
            if isinstance(counts, list):
                # Runs that do not add up to the image would make the decoder read beyond its memory.
                if sum(counts) != height * width or min(counts, default=0) < 0:
                    return None
                rle = coco_mask.frPyObjects(segmentation, height, width)
            else:
                rle = {"size": [height, width], "counts": counts}
                if _pixels(counts) != height * width:
                    return None
        else:
            return None
        return coco_mask.decode(rle).astype(bool)
    except (TypeError, ValueError, KeyError, IndexError):
        return None


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Compressed run lengths, as COCO results hold them, of a bool ``[height, width]``."""
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")}


def _pixels(counts: str) -> int:
    """Sum of the runs of COCO's compressed string: 5 bits a character, and from the third run on differences."""
    runs: list[int] = []
    value = shift = 0
    for code in counts.encode("ascii"):
        code -= 48
        if not 0 <= code < 64:
            raise ValueError("no run-length character")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift or min(runs, default=0) < 0:
        raise ValueError("the runs are damaged")
    return sum(runs)
