"""Samples for training and testing. All randomness of a sample comes from (seed, epoch, index)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ovdet.data.annotations import Annotations
from ovdet.data.images import ImageError, read_image, resolve
from ovdet.data.masks import decode_segmentation
from ovdet.data.transforms import apply_view, apply_view_to_masks, boxes_of_masks, draw_view, test_view

log = logging.getLogger(__name__)


@dataclass
class Skipped:
    """An image that could not be used, and why."""

    file: str
    reason: str


class TrainDataset(Dataset):
    """Jittered views with their objects.

    Args:
        annotations: with masks, if ``masks``.
        labels: int64 ``[A]``, the label of each annotated object in the detector's vocabulary; -1: not trained on.
        root: image root.
        image_size: side S of the padded square.
        jitter, flip: see :func:`~ovdet.data.transforms.draw_view`.
        min_box_side: objects whose box is thinner after the view are dropped, in pixels.
        keep_empty: also take images without objects.
        seed: of the views.
        masks: give masks.

    Items, by key (epoch, index): a dict of ``image`` uint8 ``[3, S, S]``, ``size`` (height, width of the valid area),
    ``boxes`` float32 ``[N, 4]``, ``labels`` int64 ``[N]``, with masks ``masks`` bool ``[N, S, S]``, and ``image_id``;
    or a :class:`Skipped`. Crowds are left out. Boxes are cut off at the window; with masks they are those of the masks
    in the window.
    """

    def __init__(
        self,
        annotations: Annotations,
        *,
        labels: np.ndarray,
        root: str,
        image_size: int,
        jitter: tuple[float, float] | list[float] = (0.1, 2.0),
        flip: float = 0.5,
        min_box_side: float = 1.0,
        keep_empty: bool = False,
        seed: int = 0,
        masks: bool = False,
    ) -> None:
        self.annotations, self.labels, self.root = annotations, labels, root
        self.image_size, self.jitter, self.flip = image_size, tuple(jitter), flip
        self.min_box_side, self.seed, self.masks = min_box_side, seed, masks
        self.wanted = (labels >= 0) & ~annotations.crowd
        per_image = np.add.reduceat(np.append(self.wanted, False).astype(np.int64), annotations.offsets[:-1])
        per_image[np.diff(annotations.offsets) == 0] = 0  # reduceat gives an empty stretch its neighbour's value
        self.images = np.arange(len(annotations)) if keep_empty else np.flatnonzero(per_image)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | Skipped:
        epoch, index = key
        row = int(self.images[index])
        name = self.annotations.file_names[row]
        try:
            image = read_image(resolve(self.root, name))
        except ImageError as error:
            return Skipped(error.file, error.reason)
        rng = np.random.default_rng([self.seed, epoch, row])
        height, width = image.shape[-2:]
        view = draw_view(rng, height, width, size=self.image_size, jitter=self.jitter, flip=self.flip)
        mine = self.annotations.of(row)
        chosen = np.arange(mine.start, mine.stop)[self.wanted[mine]]
        masks = None
        if self.masks:
            chosen, masks = self._masks(chosen, height, width)
        pixels, boxes = apply_view(image, torch.from_numpy(self.annotations.boxes[chosen]), view, self.image_size)
        if masks is not None:
            masks = apply_view_to_masks(masks, view, self.image_size)
            boxes = boxes_of_masks(masks)
        keep = ((boxes[:, 2:] - boxes[:, :2]) >= max(self.min_box_side, 1e-3)).all(1)
        sample = {
            "image": pixels,
            "size": view.size,
            "boxes": boxes[keep],
            "labels": torch.from_numpy(self.labels[chosen])[keep],
            "image_id": int(self.annotations.image_ids[row]),
        }
        if masks is not None:
            sample["masks"] = masks[keep]
        return sample

    def _masks(self, chosen: np.ndarray, height: int, width: int) -> tuple[np.ndarray, Tensor]:
        """(objects whose mask can be used, their masks bool ``[N, height, width]``)."""
        masks = [decode_segmentation(self.annotations.segmentation(i), height, width) for i in chosen]
        good = [m is not None for m in masks]
        kept = [torch.from_numpy(m) for m in masks if m is not None]
        return chosen[good], torch.stack(kept) if kept else torch.zeros(0, height, width, dtype=torch.bool)


class TestDataset(Dataset):
    """Images at the detector's input size.

    Items, by index: a dict of ``image`` uint8 ``[3, S, S]``, ``size`` (height, width of the valid area), ``original``
    (height, width of the file) and ``index``; or a :class:`Skipped`.
    """

    __test__ = False  # no test, though its name begins like one

    def __init__(self, file_names: list[str], *, root: str, image_size: int) -> None:
        self.file_names, self.root, self.image_size = file_names, root, image_size

    def __len__(self) -> int:
        return len(self.file_names)

    def __getitem__(self, index: int) -> dict[str, Any] | Skipped:
        name = self.file_names[index]
        try:
            image = read_image(resolve(self.root, name) if self.root else name)
        except ImageError as error:
            return Skipped(error.file, error.reason)
        pixels, size = test_view(image, self.image_size)
        return {"image": pixels, "size": size, "original": tuple(image.shape[-2:]), "index": index}
