"""Image files to RGB uint8 tensors, safely: bounded size, inside their root, one kind of error."""

from __future__ import annotations

import io
import posixpath
import re
import warnings

import fsspec
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

MAX_PIXELS = 178_956_970  # Pillow's own limit: a gigabyte of memory at 6 bytes a pixel
_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+://")


class ImageError(Exception):
    """An image that cannot be used: ``file`` names it and ``reason`` says why, in one line."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.file, self.reason = str(file), reason

    def __reduce__(self) -> tuple:  # exceptions with two arguments do not survive a worker's pickle otherwise
        return type(self), (self.file, self.reason)


def is_url(path: str) -> bool:
    """True for a path that fsspec reads (``s3://...``), False for one on disk."""
    return bool(_URL.match(path))


def resolve(root: str, file_name: str) -> str:
    """Path of a file that an annotation names, inside its root.

    Raises:
        ImageError: an absolute name, a URL, or one that climbs out of the root with ``..``.
    """
    name = file_name.replace("\\", "/")
    normal = posixpath.normpath(name) if name else ""
    if not name or name.startswith("/") or re.match(r"^[a-zA-Z]:", name) or is_url(name) or "\0" in name:
        raise ImageError(file_name, "file names in annotations must be relative to the image root")
    if normal.split("/")[0] == ".." or normal == ".":
        raise ImageError(file_name, "the file name leads out of the image root")
    return f"{root.rstrip('/')}/{normal}" if root else normal


def read_bytes(path: str) -> bytes:
    """Content of a file on disk, or of a URL through fsspec.

    Raises:
        ImageError: it cannot be read.
        ImportError: a package that this kind of URL needs is not installed.
    """
    try:
        opened = fsspec.open(path, "rb") if is_url(path) else open(path, "rb")
        with opened as file:
            return file.read()
    except FileNotFoundError:
        raise ImageError(path, "no such file") from None
    except ImportError:  # a fault of the set-up, not of the image
        raise
    except Exception as error:  # fsspec's backends raise whatever their libraries do
        raise ImageError(path, f"cannot be read ({type(error).__name__}: {first_line(error)})") from None


def read_image(path: str) -> Tensor:
    """RGB uint8 ``[3, H, W]``, the colour channel innermost in memory.

    The EXIF orientation is ignored, as annotations refer to the stored pixels. Of an animation, the first frame counts.

    Grey and RGB JPEGs are decoded by torchvision (libjpeg-turbo), everything else by Pillow, converted to RGB. PNGs
    too, as torchvision's PNG decoder ends the process with a segmentation fault on some damaged files.

    Raises:
        ImageError: missing, unreadable, damaged, or above :data:`MAX_PIXELS`.
    """
    return decode(read_bytes(path), path)


def decode(content: bytes, path: str) -> Tensor:
    """As :func:`read_image`, from the file's content; ``path`` names it in errors."""
    if not content:
        raise ImageError(path, "the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageError(path, f"{width} x {height} pixels are more than {MAX_PIXELS}: refused")
                # libjpeg fills what is missing of a truncated file with grey, Pillow refuses it.
                whole = content.rstrip(b"\0")[-2:] == b"\xff\xd9"
                fast = image.format == "JPEG" and image.mode in ("RGB", "L") and whole
                pixels = _decode_jpeg(content) if fast else None
                return torch.from_numpy(_to_rgb(image)).permute(2, 0, 1) if pixels is None else pixels
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(path, f"more than {MAX_PIXELS} pixels: refused as a decompression bomb") from None
    except UnidentifiedImageError:
        raise ImageError(path, "not an image, or of an unknown format") from None
    except Exception as error:  # decoders raise a dozen kinds for damaged files
        raise ImageError(path, f"not a readable image ({type(error).__name__}: {first_line(error)})") from None


def _decode_jpeg(content: bytes) -> Tensor | None:
    """uint8 ``[3, H, W]`` by torchvision; None where it fails, and Pillow is to judge."""
    try:
        return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError:
        return None


def _to_rgb(image: Image.Image) -> np.ndarray:
    """First frame as uint8 ``[H, W, 3]``. 16-bit grey is scaled down; Pillow's own conversion would clip it."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        grey = np.clip(values / (257.0 if values.max(initial=0) > 255 else 1.0), 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.array(image.convert("RGB"))


def first_line(error: Exception) -> str:
    """First line of an error's text, shortened, for messages of one line."""
    return (str(error).strip().splitlines() or [""])[0][:150]
