"""Segments of a panoptic PNG: their ids by pixel, and their tight boxes."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

from training.engine.data.images import MAX_PIXELS, ImageError, read_bytes

COLOUR_TYPES = (2, 3, 6)  # PNG header: RGB, palette, RGB with alpha


def read_segment_ids(path: str) -> np.ndarray:
    """Segment id of every pixel, int32 ``[H, W]`` (R + 256 G + 65536 B), of a panoptic PNG.

    Raises:
        ImageError: not readable, too large, not a PNG, or a grey one, which has no room for ids.
    """
    content = read_bytes(path)
    if len(content) < 26 or content[1:4] != b"PNG":
        raise ImageError(path, "not a PNG file")
    width, height, depth, colour_type = struct.unpack(">IIBB", content[16:26])
    if colour_type not in COLOUR_TYPES or depth > 8:
        raise ImageError(path, "not an 8-bit colour PNG, in which panoptic segment ids are kept")
    if width * height > MAX_PIXELS:
        raise ImageError(path, f"{width} x {height} pixels are more than {MAX_PIXELS}")
    try:
        # Pillow: torchvision's decoder ends the process on some damaged files. Four bytes a pixel are one number.
        with Image.open(io.BytesIO(content)) as image:
            words = np.asarray(image.convert("RGBA")).view("<i4")[..., 0]
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        raise ImageError(path, f"not a readable PNG ({(str(error).splitlines() or [''])[0][:120]})") from None
    return words.astype(np.int32, copy=False) & 0xFFFFFF


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """First and last column and row (x1, y1, x2, y2; last index, not plus one) of a bool ``[H, W]``; None if empty."""
    columns = np.flatnonzero(mask.any(axis=0))
    if not len(columns):
        return None
    rows = np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])
