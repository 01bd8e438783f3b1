"""Image files to RGB uint8 tensors: inside their root, of bounded size, with one kind of error."""

from __future__ import annotations

import io
import posixpath
import re
import warnings

import fsspec
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

MAX_PIXELS = 178_956_970  # Pillow's own limit
_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+://")


class ImageError(Exception):
    """An image that cannot be used: ``file`` names it, ``reason`` says why in one line."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.file, self.reason = str(file), reason

    def __reduce__(self) -> tuple:  # otherwise lost between a worker process and its parent
        return type(self), (self.file, self.reason)


def resolve(root: str, file_name: str) -> str:
    """Path of a file that an annotation names. ImageError when it would leave the image root."""
    name = file_name.replace("\\", "/")
    normal = posixpath.normpath(name) if name else "."
    if name.startswith("/") or re.match(r"^[a-zA-Z]:", name) or _URL.match(name) or "\0" in name:
        raise ImageError(file_name, "file names in annotations must be relative to the image root")
    if normal == "." or normal.split("/")[0] == "..":
        raise ImageError(file_name, "the file name leads out of the image root")
    return posixpath.join(root, normal)


def exists(path: str) -> bool:
    """Whether a file on disk or behind a URL is there."""
    with fsspec.open(path, "rb") if _URL.match(path) else open(path, "rb"):
        return True


def read_image(path: str) -> Tensor:
    """RGB uint8 ``[3, H, W]`` from a file or URL, whatever its mode. EXIF orientation is ignored, as annotations do.

    Raises:
        ImageError: missing, empty, unreadable, damaged, or larger than :data:`MAX_PIXELS`.
    """
    try:
        with fsspec.open(path, "rb") if _URL.match(path) else open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        raise ImageError(path, "no such file") from None
    except Exception as error:  # the backends behind URLs raise whatever their libraries do
        raise ImageError(path, f"cannot be read ({_reason(error)})") from None
    if not content:
        raise ImageError(path, "the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ImageError(path, f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
                # libjpeg fills a truncated file with grey; Pillow, which refuses it, gets those without an end mark.
                whole = image.format == "PNG" or content.rstrip(b"\0").endswith(b"\xff\xd9")
                plain = image.mode in ("RGB", "L") and "transparency" not in image.info
                if image.format in ("JPEG", "PNG") and plain and whole:
                    return decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
                return torch.from_numpy(_to_rgb(image)).permute(2, 0, 1).contiguous()
    except ImageError:
        raise
    except Exception as error:  # decoders raise a dozen kinds
        raise ImageError(path, f"not a readable image ({_reason(error)})") from None


def _to_rgb(image: Image.Image) -> np.ndarray:
    """uint8 ``[H, W, 3]``; 16-bit grey is scaled down, where Pillow would clip it."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        grey = np.clip(values / (257.0 if values.max(initial=0) > 255 else 1.0), 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.array(image.convert("RGB"))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:150]}"
