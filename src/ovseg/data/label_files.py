"""Label files of segmentation data sets: PNGs, MATLAB files and panoptic PNGs, to labels of one byte."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from ovseg.classes import IGNORE
from training.engine.data.images import MAX_PIXELS, ImageError, first_line, read_bytes
from training.engine.data.masks import read_segment_ids
from training.engine.errors import UserError

_UNKNOWN = -1  # in a table of labels: a value that the data set does not have


class LabelError(Exception):
    """A label file of another data set: it holds a value that is no class. Not damage: no file will fit."""


def read_index_png(path: str) -> np.ndarray:
    """Value of every pixel of a PNG of one channel or with a palette, uint8 or int32 ``[H, W]``.

    Raises:
        ImageError: not readable, or a colour picture.
    """
    content = read_bytes(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ImageError(path, f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
                mode, values = image.mode, np.array(image)
    except ImageError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        raise ImageError(path, f"not a readable PNG ({type(error).__name__}: {first_line(error)})") from None
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise ImageError(path, f"a picture of mode {mode}; label files have one channel or a palette")
    return values


def label_table(label_map: Mapping[str, int], size: int = 256) -> np.ndarray:
    """Value in a file -> label, int16 ``[size]``."""
    table = np.full(size, _UNKNOWN, dtype=np.int16)
    for value, label in label_map.items():
        table[int(value)] = label
    return table


def identity_table(num_classes: int) -> np.ndarray:
    """For files that hold labels already: 0..C-1 and 255."""
    return label_table({**{str(i): i for i in range(num_classes)}, str(IGNORE): IGNORE})


def _apply(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Labels uint8 of the values in a file; LabelError for a value without a label."""
    if values.max(initial=0) >= len(table) or values.min(initial=0) < 0:
        bad = int(values.max() if values.max() >= len(table) else values.min())
        raise LabelError(f"holds the value {bad}, which this data set does not have; is it another one's?")
    labels = table[values]
    if labels.min(initial=0) < 0:
        raise LabelError(
            f"holds the value {int(values[labels < 0][0])}, which this data set does not have; is it another one's?"
        )
    return labels.astype(np.uint8)


def read_labels(path: str, tables: Mapping[str, np.ndarray], keys: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Labels of a file by its ending. ``tables``: ending -> table; ``keys``: where a .mat file keeps its map."""
    ending = next(e for e in tables if path.endswith(e))
    values = _read_mat(path, keys[ending]) if ending == ".mat" else read_index_png(path)
    return _apply(tables[ending], values)


def _read_mat(path: str, keys: Sequence[str]) -> np.ndarray:
    """The map in a MATLAB file, under nested names; int32 ``[H, W]``."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{path}: reading MATLAB files needs SciPy: pip install scipy") from None
    content = read_bytes(path)
    try:
        value = loadmat(io.BytesIO(content), squeeze_me=True, struct_as_record=False)
        for key in keys:
            value = value[key] if isinstance(value, dict) else getattr(value, key)
        return np.asarray(value).astype(np.int32)
    except Exception as error:  # SciPy raises a dozen kinds for damaged files
        raise ImageError(path, f"no label map could be read ({type(error).__name__}: {first_line(error)})") from None


def read_panoptic(path: str, segments: Mapping[str, Mapping[int, int]]) -> np.ndarray:
    """Labels uint8 ``[H, W]`` of a panoptic PNG; void (id 0) is 255.

    Args:
        segments: path -> segment id -> label.

    Raises:
        ImageError: not a readable panoptic PNG.
        LabelError: it holds a segment that is not named.
    """
    ids = read_segment_ids(path)
    labels = np.full(ids.shape, IGNORE, dtype=np.uint8)
    known = ids == 0
    for segment, label in segments[path].items():
        mask = ids == segment
        labels[mask] = label
        known |= mask
    if not known.all():
        raise LabelError(f"holds segment {int(ids[~known][0])}, which the annotation file does not name")
    return labels
