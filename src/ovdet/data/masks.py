"""COCO segmentations: to run lengths and masks, and through a view into small packed windows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from ovdet.data.transforms import View, source_pixels


def run_lengths(segmentation: Any, height: int, width: int) -> dict[str, Any] | None:
    """Compressed run lengths of polygons or of run lengths of either kind; None when it is unusable.

    Polygons have at least three points; run lengths must be of the image's own size.
    """
    try:
        if isinstance(segmentation, list):
            polygons = [p for p in segmentation if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0]
            if not polygons or not np.isfinite(np.concatenate(polygons).astype(np.float64)).all():
                return None
            return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        if not isinstance(segmentation, dict) or list(segmentation.get("size", ())) != [height, width]:
            return None
        counts = segmentation["counts"]
        # Runs that do not add up to the image would make the decoder read beyond its memory.
        if isinstance(counts, list):
            if sum(counts) != height * width or min(counts, default=0) < 0:
                return None
            return coco_mask.frPyObjects(segmentation, height, width)
        return {"size": [height, width], "counts": counts} if _pixels(counts) == height * width else None
    except (TypeError, ValueError, KeyError, IndexError, OverflowError):
        return None


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray | None:
    """Mask bool ``[height, width]`` of a segmentation; None when it is unusable, as :func:`run_lengths` says."""
    rle = run_lengths(segmentation, height, width)
    return None if rle is None else coco_mask.decode(rle).astype(bool)


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Compressed run lengths, as COCO results hold them, of a bool ``[height, width]``."""
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")}


def _pixels(counts: str) -> int:
    """Sum of the runs of COCO's compressed string: 5 bits a character, and from the third run on differences.

    Raises:
        ValueError: no such string.
    """
    codes = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() >= 64 or codes[-1] & 32:
        raise ValueError("no run lengths")
    last = np.flatnonzero(~codes & 32)  # characters that end a number
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    if length.max() > 7:  # beyond 2^34, no image
        raise ValueError("a run is too long")
    shift = 5 * (np.arange(len(codes)) - np.repeat(first, length))
    values = np.add.reduceat((codes & 31) << shift, first)
    values -= np.where(codes[last] & 16, np.int64(1) << (5 * length), 0)  # the sign
    runs = values.copy()
    # From the fourth number on it is the difference from the run before the last, of the same colour.
    runs[1::2] = np.cumsum(values[1::2])
    runs[2::2] = np.cumsum(values[2::2])
    if runs.min() < 0:
        raise ValueError("a run is negative")
    return int(runs.sum())


# -- windows ----------------------------------------------------------------------------------------------------------


class MaskWindows(NamedTuple):
    """Masks of one image as bits inside their tight boxes: a hundredth of the bytes of whole masks."""

    boxes: Tensor  # int32 [N, 4]: xyxy, pixels of the padded input, right and bottom behind the last pixel
    bits: Tensor  # uint8, the windows end to end, each row by row from a byte's highest bit on and filled up to a byte

    @classmethod
    def of(cls, masks: list[np.ndarray], corners: list[tuple[int, int]]) -> MaskWindows:
        """From windows, bool ``[h, w]``, and the (left, top) of each."""
        boxes = [(x, y, x + m.shape[1], y + m.shape[0]) for m, (x, y) in zip(masks, corners, strict=True)]
        bits = [np.packbits(m) for m in masks]
        return cls(
            torch.tensor(boxes, dtype=torch.int32).reshape(-1, 4),
            torch.from_numpy(np.concatenate(bits) if bits else np.zeros(0, np.uint8)),
        )


def view_of_mask(rle: dict[str, Any], view: View, *, centre: bool = False) -> tuple[np.ndarray, tuple[int, int]]:
    """The tight window of a mask in a view, bool ``[h, w]``, and its (left, top); ``[0, 0]`` where nothing is left.

    Only the pixels of the mask's own box are ever scaled.

    Args:
        rle: compressed run lengths of the whole image.
        centre: see :func:`ovdet.data.transforms.source_pixels`.
    """
    height, width = rle["size"]
    x, y, w, h = (int(v) for v in coco_mask.toBbox(rle))
    nothing = np.zeros((0, 0), bool), (0, 0)
    if not w or not h:
        return nothing
    own = coco_mask.decode(rle)[y : y + h, x : x + w]
    rows = source_pixels(view.top, view.size[0], view.scaled[0], height, centre=centre) - y
    columns = source_pixels(view.left, view.size[1], view.scaled[1], width, centre=centre) - x
    top, bottom = np.searchsorted(rows, [0, h])
    left, right = np.searchsorted(columns, [0, w])
    seen = own[rows[top:bottom]][:, columns[left:right]].astype(bool)
    lines, places = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    if not len(lines):
        return nothing
    seen = seen[lines[0] : lines[-1] + 1, places[0] : places[-1] + 1]
    top, left = int(top + lines[0]), int(left + places[0])
    if view.flip:
        seen, left = seen[:, ::-1], view.size[1] - left - seen.shape[1]
    return seen, (left, top)


def unpack(windows: MaskWindows, size: int, device: torch.device | str | None = None) -> Tensor:
    """Whole masks, bool ``[N, size, size]``, made on a device out of the bits that are sent there.

    Args:
        windows: on the host.
    """
    device = device or windows.bits.device
    result = torch.zeros(len(windows.boxes), size, size, dtype=torch.bool, device=device)
    bits = windows.bits.to(device, non_blocking=True)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8).to(device, non_blocking=True)
    flat = ((bits[:, None] >> shifts) & 1).bool().flatten()
    start = 0
    for mask, (x1, y1, x2, y2) in zip(result, windows.boxes.tolist(), strict=True):
        number = (x2 - x1) * (y2 - y1)
        mask[y1:y2, x1:x2] = flat[start : start + number].view(y2 - y1, x2 - x1)
        start += -(-number // 8) * 8
    return result
