"""Training samples: an image with its regions, as uint8. Everything random comes from (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from open_clip.transform import crop_region, detection_size, random_crop_box, resize, resize_longest
from training.data.extras import Extra
from training.data.options import SampleOptions
from training.data.regions import Drawn, RegionSource
from training.engine.data.annotations import Annotations, Strings
from training.engine.data.images import ImageError, read_image, resolve
from training.engine.data.samples import Sample, Skipped

MIN_SIDE = 2  # pixels; smaller images have no regions worth the name


class Answers(Protocol):
    """Kept answers of a teacher: ``folder`` names them, ``unit`` is ``"region"`` or ``"image"``."""

    folder: object
    unit: str

    def answers(self, image: int, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """float16 ``[K, D]`` of an image's rows; NaN where the image could not be read."""

    def of_image(self, image: int) -> np.ndarray:
        """float16 ``[N, D]``, all rows of an image."""


class RegionDataset(Dataset):
    """An image and its regions; a key is ``(epoch, index)``.

    A sample has ``image`` (uint8 ``[3, h, w]``: resized, or the original for crops on the device), ``boxes`` (float32
    ``[K, 4]`` xyxy over the side of the padded input), ``image_id`` and ``index``; with the field ``crops`` also
    ``crops`` (a list of K uint8 ``[3, n, n]``) or ``crop_boxes`` (float32 ``[K, 4]``, pixels of the original); with
    ``labels`` int64 ``[K]``; then the extras, each (values, what they belong to).

    Args:
        annotations: the images.
        root: folder or URL of the images.
        indices: int64, rows of the images to use.
        source: draws their regions.
        options: how samples are made.
        fields: ``"crops"``, ``"labels"``.
        extras: further entries.

    Attributes:
        stores: kept answers by teacher; a sample then has ``answers`` (float16 ``[K, D]``, or ``[1, N, D]`` of a map).
        crops: whether crops are made; to be switched off when every teacher of crops has a store.
    """

    def __init__(
        self,
        annotations: Annotations,
        root: str,
        indices: np.ndarray,
        source: RegionSource,
        options: SampleOptions,
        *,
        fields: Sequence[str] = ("crops",),
        extras: Sequence[Extra] = (),
    ) -> None:
        self.annotations, self.root, self.indices, self.source = annotations, root, indices, source
        self.options, self.fields, self.extras = options, tuple(fields), tuple(extras)
        self.stores: dict[str, Answers] = {}
        self.crops = "crops" in fields

    def __len__(self) -> int:
        return len(self.indices)

    def rng(self, epoch: int, row: int) -> np.random.Generator:
        """Source of an image's regions in an epoch; of all epochs when the regions are fixed."""
        fixed = self.source.options.fixed_regions
        return np.random.default_rng([self.options.seed, row] if fixed else [self.options.seed, epoch, row])

    def read(self, row: int) -> Tensor | Skipped:
        """The image of a row, uint8 ``[3, H, W]``, if it can be used."""
        name = self.annotations.file_name(row)
        try:
            image = read_image(resolve(self.root, name))
        except ImageError as error:
            return Skipped(error.file, error.reason)
        height, width = image.shape[-2:]
        if min(height, width) < MIN_SIDE:
            return Skipped(name, f"the image has {width} x {height} pixels")
        return image

    def __getitem__(self, key: tuple[int, int]) -> Sample | Skipped:
        epoch, index = key
        row = int(self.indices[index])
        image = self.read(row)
        if isinstance(image, Skipped):
            return image
        height, width = image.shape[-2:]
        drawn = self.source.draw(row, width, height, self.rng(epoch, row))
        if len(drawn.boxes) == 0:
            return Skipped(self.annotations.file_name(row), "the image has no region")
        sample = self._sample(image, row, index, drawn)
        if isinstance(sample, Skipped) or not self.extras:  # a generator takes a while to be made
            return sample
        rng = np.random.default_rng([self.options.seed, epoch, row, 1])  # apart: extras leave the regions as they are
        return sample | {extra.name: extra(row, drawn, rng) for extra in self.extras}

    def _sample(self, image: Tensor, row: int, index: int, drawn: Drawn) -> Sample | Skipped:
        options = self.options
        _, _, scale = detection_size(*image.shape[-2:], options.image_size)
        sample: Sample = {
            "image": image if options.crop_on == "device" else resize_longest(image, options.image_size),
            "boxes": torch.from_numpy(drawn.boxes * np.float32(scale / options.image_size)),
            "image_id": int(self.annotations.image_ids[row]),
            "index": index,
        }
        if self.crops and options.crop_on == "device":
            sample["crop_boxes"] = torch.from_numpy(drawn.crop_boxes)
        elif self.crops:
            sample["crops"] = [crop_region(image, box, options.crop_size) for box in drawn.crop_boxes]
        if "labels" in self.fields:
            own = self.annotations.of(row)
            sample["labels"] = torch.from_numpy(self.annotations.labels[own][drawn.annotation].astype(np.int64))
        if self.stores:
            sample["answers"] = {}
        for name, store in self.stores.items():
            kept = store.answers(row, drawn.answers) if store.unit == "region" else store.of_image(row)[None]
            if not np.isfinite(kept).all():
                return Skipped(
                    self.annotations.file_name(row),
                    f"it could not be read when the teacher cache {store.folder} was made; make that anew",
                )
            sample["answers"][name] = torch.from_numpy(kept)
        return sample


class ImageText(Dataset):
    """An image at the model's native size and one of its captions (``--dataset-type contrastive``).

    Args:
        annotations: the images.
        root: folder or URL of the images.
        rows: int64 ``[N]``, the images to use.
        captions: all captions; those of ``rows[i]`` are ``offsets[i]:offsets[i + 1]``, at least one.
        offsets: int64 ``[N + 1]``.
        tokenize: text -> ids ``[1, L]``; runs in the worker.
        size: side of the image, pixels.
        scale: share of the area that the random crop covers.
    """

    def __init__(
        self,
        *,
        annotations: Annotations,
        root: str,
        rows: np.ndarray,
        captions: Strings,
        offsets: np.ndarray,
        tokenize: Callable[[list[str]], Tensor],
        size: int,
        seed: int = 0,
        scale: tuple[float, float] = (0.9, 1.0),
    ) -> None:
        self.annotations, self.root, self.indices = annotations, root, rows
        self.captions, self.offsets = captions, offsets
        self.tokenize, self.size, self.seed, self.scale = tokenize, size, seed, scale

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> Sample | Skipped:
        epoch, index = key
        row = int(self.indices[index])
        try:
            image = read_image(resolve(self.root, self.annotations.file_name(row)))
        except ImageError as error:
            return Skipped(error.file, error.reason)
        rng = np.random.default_rng([self.seed, epoch, row])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        top, left, h, w = random_crop_box(*image.shape[-2:], self.scale, generator)
        text = self.captions[int(rng.integers(self.offsets[index], self.offsets[index + 1]))]
        return {
            "image": resize(image[:, top : top + h, left : left + w], self.size, self.size),
            "text": self.tokenize([text])[0],
            "image_id": int(self.annotations.image_ids[row]),
            "index": index,
        }
