"""Segmentation data sets in the folder trees that they are downloaded as: photographs with the label of every pixel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ovseg.classes import ClassList, class_list
from ovseg.data.label_files import LabelError
from ovseg.data.layouts import LAYOUTS, Pairs, panoptic_pairs
from training.engine.data.images import ImageError, read_image
from training.engine.errors import UserError

DATASETS = (*LAYOUTS, "panoptic")
PROBES = 16  # pairs looked for before the start


@dataclass(frozen=True)
class Unusable:
    """An image that could not be read, and why."""

    file: str
    reason: str
    fatal: bool = False


class SegmentationSet(Dataset):
    """Photographs with labels.

    An item is a dict: ``image`` uint8 ``[3, H, W]``, ``labels`` uint8 ``[H, W]`` (0..C-1, or 255 for pixels that do not
    count), ``index``; or :class:`Unusable`.

    Args:
        name: of the data set, for messages and results.
        classes: its classes.
        pairs: its files.
        prepare: applied to an image in the worker process; its result is the item's ``input``.
    """

    def __init__(
        self, name: str, classes: ClassList, pairs: Pairs, prepare: Callable[[torch.Tensor], Any] | None = None
    ) -> None:
        self.name, self.classes, self.prepare = name, classes, prepare
        # One array instead of lists of strings, which workers would copy as they count references.
        self.images, self.labels = (
            np.asarray([p.encode() for p in x], dtype=bytes) for x in (pairs.images, pairs.labels)
        )
        self.read_labels = pairs.read

    def __len__(self) -> int:
        return len(self.images)

    def files(self, index: int) -> tuple[str, str]:
        """Paths of the photograph and of its label file."""
        return self.images[index].decode(), self.labels[index].decode()

    def __getitem__(self, index: int) -> dict[str, Any] | Unusable:
        image_file, label_file = self.files(index)
        try:
            image = read_image(image_file)
            labels = self.read_labels(label_file)
        except ImageError as error:
            return Unusable(error.file, error.reason)
        except LabelError as error:
            return Unusable(label_file, str(error), fatal=True)
        if labels.shape != tuple(image.shape[1:]):
            sides = f"{labels.shape[1]} x {labels.shape[0]}"
            return Unusable(image_file, f"{image.shape[2]} x {image.shape[1]} pixels, but its labels are {sides}")
        item = {"image": image, "labels": torch.from_numpy(labels), "index": index}
        if self.prepare is not None:
            item["input"] = self.prepare(image)
        return item


def open_dataset(
    name: str,
    root: str | Path,
    split: str = "val",
    *,
    words: str = "names",
    image_root: str | Path | None = None,
    prepare: Callable[[torch.Tensor], Any] | None = None,
) -> SegmentationSet:
    """A data set by name.

    Args:
        name: one of :data:`DATASETS`.
        root: the folder that it was unpacked into, or one above it; of ``panoptic`` also the json file itself.
        split: ``val`` or ``train``, or the data set's own name of a part (``trainaug``, ``val2017``).
        words: whose words stand for the classes, see :func:`ovseg.classes.class_list`.
        image_root: photographs of ``panoptic``, where they are not beside the annotations' folder.
        prepare: see :class:`SegmentationSet`.

    Raises:
        UserError: unknown name, a folder without the data set, or without this split.
    """
    if name not in DATASETS:
        raise UserError(f'no data set is called "{name}": use one of {", ".join(DATASETS)}')
    root = Path(root)
    if not root.exists():
        raise UserError(f"--data-root {root}: no such folder")
    if name == "panoptic":
        classes, pairs = panoptic_pairs(root, split, image_root)
    else:
        classes, pairs = class_list(name, words), LAYOUTS[name](name, root, split)
    if not pairs.images:
        raise UserError(f"--data-root {root}: no image of the split {split} of {name} was found")
    _probe(name, pairs)
    return SegmentationSet(name, classes, pairs, prepare)


def _probe(name: str, pairs: Pairs) -> None:
    """Refuse folders in which none of the first files exist: every image would fail."""
    step = max(1, len(pairs.images) // PROBES)
    for what, files in (("photographs", pairs.images[::step]), ("label files", pairs.labels[::step])):
        if not any(Path(file).is_file() for file in files):
            raise UserError(f"{name}: none of the {what} looked for exist, for example {files[0]}")
