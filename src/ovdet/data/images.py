"""Image files turned the way that they are meant to be seen."""

from __future__ import annotations

import io
import warnings

from PIL import Image
from torch import Tensor

from training.engine.data.images import decode, read_bytes

_ORIENTATION = 0x0112  # the EXIF tag


def read_image(path: str, *, exif: bool = True) -> Tensor:
    """RGB uint8 ``[3, H, W]`` from a file or URL, whatever its mode.

    Args:
        exif: turn the image as its EXIF orientation says (photographs of phones are stored lying on their side).

    Raises:
        ImageError: missing, empty, unreadable, damaged, or too large.
    """
    content = read_bytes(path)
    image = decode(content, path)
    return turned(image, orientation(content)) if exif else image


def orientation(content: bytes) -> int:
    """EXIF orientation of an image file's content, 1 to 8; 1 (upright) where it says nothing or nonsense."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged tag says nothing; whether the image is usable, the decoder has judged
        return 1
    return value if value in range(1, 9) else 1


def turned(image: Tensor, value: int) -> Tensor:
    """An image ``[..., H, W]`` as an EXIF orientation asks: 2 to 4 keep its sides, 5 to 8 swap them."""
    if value >= 5:
        image = image.transpose(-1, -2)
    # What remains after the transposition, in rows and columns of the upright image.
    flips = {2: (-1,), 3: (-2, -1), 4: (-2,), 6: (-1,), 7: (-2, -1), 8: (-2,)}.get(value, ())
    return image.flip(flips) if flips else image
