"""What a data set gives for a key, and how images are packed into a batch. Shared by training and evaluation."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from training.engine.data.images import ImageError, is_url, read_bytes, resolve
from training.engine.errors import UserError

Sample = dict[str, Any]


class Skipped(NamedTuple):
    """A sample that cannot be used. It is counted and named in the log; it never stops a worker."""

    file: str
    reason: str


def black(*shape: int) -> Tensor:
    """A uint8 tensor of zeros. In a loader's worker it lies in shared memory from the start, which saves a copy."""
    if get_worker_info() is None:
        return torch.zeros(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own collate does; zero when new
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def stack_padded(images: Sequence[Tensor], size: int) -> Tensor:
    """Images uint8 ``[3, h_i, w_i]``, padded right and bottom with black: ``[B, 3, size, size]``.

    The colour channel is innermost in memory, as decoders and resizing leave it; turning that round would cost as much
    time as the resizing itself.
    """
    batch = black(len(images), size, size, 3).permute(0, 3, 1, 2)
    for square, image in zip(batch, images, strict=True):
        square[:, : image.shape[1], : image.shape[2]] = image
    return batch


def reach(size: tuple[int, int], boxes: Tensor, side: int) -> tuple[int, int]:
    """(height, width) in pixels of a padded square that an image and its boxes cover; boxes may lie beyond the image.

    Args:
        size: (height, width) of the image.
        boxes: ``[K, 4]`` on the CPU, xyxy in 0..1 of the square.
        side: of the square, pixels.
    """
    if not len(boxes):
        return size
    right, below = (boxes[:, 2:].amax(0) * side).tolist()
    return tuple(max(own, min(math.ceil(edge), side)) for own, edge in zip(size, (below, right), strict=True))


def check_image_root(root: str, names: Sequence[str], annotation_file: str, flag: str) -> None:
    """UserError when none of the named files is under the root; behind a URL they are read until one can be."""
    if is_url(root):
        _check_url(root, names, annotation_file, flag)
        return
    if not Path(root).is_dir():
        raise UserError(f"{flag} {root}: no such folder")
    missing = None
    for name in names:
        try:
            path = resolve(root, name)
        except ImageError:
            continue  # refused again, and counted, when it is read
        if os.path.isfile(path):
            return
        missing = missing or path
    if missing:
        raise UserError(f"{flag} {root}: the images of {annotation_file} are not there, e.g. {missing}")


def _check_url(root: str, names: Sequence[str], annotation_file: str, flag: str) -> None:
    failure: ImageError | None = None
    for name in names:
        try:
            read_bytes(resolve(root, name))
            return
        except ImageError as error:
            failure = failure or error
        except ImportError as error:  # of a package that this kind of URL needs
            raise UserError(f"{flag} {root}: {error}; pip install -e '.[remote]' has what http and s3 need") from error
    if failure is not None:
        raise UserError(f"{flag} {root}: the images of {annotation_file} cannot be read, e.g. {failure}")
