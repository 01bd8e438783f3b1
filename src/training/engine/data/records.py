"""Annotation files as compact arrays, which worker processes share."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

log = logging.getLogger(__name__)


def log_left_out(source: str, skipped: Mapping[str, int]) -> None:
    """Say what was left out of a source: (reason -> number of entries)."""
    for reason, number in skipped.items():
        log.warning("%s: %d x %s (left out)", source, number, reason)


@dataclass
class Strings:
    """Many texts, utf-8, end to end in one array: text i is ``data[offsets[i]:offsets[i + 1]]``.

    A list of strings would be copied into every worker as Python touches its reference counts.
    """

    data: np.ndarray  # uint8
    offsets: np.ndarray  # int64 [N + 1]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Strings:
        """Pack texts. Characters that utf-8 cannot hold (lone surrogates) become question marks."""
        encoded = [text.encode("utf-8", "replace") for text in texts]
        return cls(np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([0, *map(len, encoded)], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = self.offsets[index : index + 2]
        return self.data[start:end].tobytes().decode("utf-8")


@dataclass
class Annotations:
    """Images with their annotations, as arrays. Image i owns annotations ``offsets[i]:offsets[i + 1]``.

    Attributes:
        image_ids: int64 ``[N]``.
        sizes: int32 ``[N, 2]``, (width, height); 0 where the file does not say.
        name_bytes, name_offsets: file names, utf-8, end to end; see :meth:`file_name` and :attr:`file_names`.
        offsets: int64 ``[N + 1]``.
        boxes: float32 ``[A, 4]``, xyxy in pixels.
        areas: float32 ``[A]``, as annotated (width times height when the file does not say).
        labels: int32 ``[A]``, rows of ``category_ids``; -1 without a category.
        crowd: bool ``[A]``: a group, of which nothing is annotated singly.
        mask_bytes, mask_offsets: json text of each annotation's ``segmentation``, end to end; empty if not kept. See
            :meth:`segmentation`.
        category_ids: int64 ``[C]``, ascending.
        names: class names by label.
        frequencies: by label, LVIS's "r", "c" or "f" of a class (rare, common, frequent); "" where the file has none.
        skipped: bad entries that were left out, by reason.
        unannotated: nobody annotated the boxes: a program found them that had learned from no annotation.
        file: where they come from, for messages.
    """

    image_ids: np.ndarray
    sizes: np.ndarray
    name_bytes: np.ndarray
    name_offsets: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    mask_bytes: np.ndarray
    mask_offsets: np.ndarray
    category_ids: np.ndarray
    names: list[str]
    frequencies: list[str]
    skipped: dict[str, int]
    unannotated: bool = False
    file: str = ""

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, index: int) -> str:
        """File name of image ``index``, relative to the image root."""
        return self.file_names[index]

    @property
    def file_names(self) -> Strings:
        """File names by image, relative to the image root."""
        return Strings(self.name_bytes, self.name_offsets)

    def segmentation(self, annotation: int) -> Any:
        """COCO ``segmentation`` of an annotation that was read with its masks: polygons, a run-length dict, or None."""
        return json.loads(Strings(self.mask_bytes, self.mask_offsets)[annotation])

    def has_mask(self) -> np.ndarray:
        """Whether annotations were read with a segmentation that is not empty: bool ``[A]``."""
        if len(self.mask_offsets) != len(self.boxes) + 1:  # read without
            return np.zeros(len(self.boxes), bool)
        return np.diff(self.mask_offsets) > len("null")  # shorter ones are [] and {}

    def of(self, index: int) -> slice:
        """Annotations of image ``index``, in the file's order."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))
