"""Training samples: an image with its regions, as uint8. Everything random comes from (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from open_clip.transform import crop_region, detection_size, random_crop_box, resize, resize_longest
from training.data.grid import grid_regions
from training.data.proposals import draw_proposals, proposal_regions
from training.data.samples import Sample, Skipped
from training.engine.data.annotations import Annotations, Strings
from training.engine.data.images import ImageError, read_image, resolve
from training.teachers.store import TeacherStore

MIN_SIDE = 2  # pixels; smaller images have no regions worth the name


@dataclass(frozen=True)
class RegionOptions:
    """How samples are made.

    Attributes:
        image_size: side of the square input, pixels; the longest side of an image is brought to it.
        crop_size: side of a region crop (the teacher's native size), pixels.
        crop_on: ``"worker"`` (crops and resized image are made here) or ``"device"`` (the original image travels).
        max_boxes, max_split, crop_scale: see :func:`~training.data.grid.grid_regions`.
        min_size, max_size: see :func:`~training.data.proposals.draw_proposals`.
        seed: of all random choices.
    """

    image_size: int
    crop_size: int
    crop_on: str = "worker"
    max_boxes: int = 20
    max_split: int = 6
    crop_scale: float = 1.0
    min_size: float = 8
    max_size: float = 1024
    seed: int = 0


class RegionDataset(Dataset):
    """Base of the datasets whose samples are an image and its regions; a key is ``(epoch, index)``.

    A sample has ``image`` (uint8 ``[3, h, w]``: resized, or the original for crops on the device), ``boxes`` (float32
    ``[K, 4]`` xyxy over the side of the padded input), ``image_id`` and ``index``; distillation adds ``crops`` (a list
    of K uint8 ``[3, n, n]``) or ``crop_boxes`` (float32 ``[K, 4]``, pixels of the original).
    """

    def __init__(self, annotations: Annotations, root: str, indices: np.ndarray, options: RegionOptions) -> None:
        self.annotations, self.root, self.indices, self.options = annotations, root, indices, options

    def __len__(self) -> int:
        return len(self.indices)

    def regions(self, row: int, width: int, height: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Boxes and, for distillation, crop boxes of an image: ``{"boxes": ..., "crop_boxes": ..., ...}`` in pixels."""
        raise NotImplementedError

    def __getitem__(self, key: tuple[int, int]) -> Sample | Skipped:
        epoch, index = key
        row = int(self.indices[index])
        name = self.annotations.file_name(row)
        try:
            image = read_image(resolve(self.root, name))
        except ImageError as error:
            return Skipped(error.file, error.reason)
        height, width = image.shape[-2:]
        if min(height, width) < MIN_SIDE:
            return Skipped(name, f"the image has {width} x {height} pixels")
        rng = np.random.default_rng([self.options.seed, epoch, row])
        regions = self.regions(row, width, height, rng)
        if len(regions["boxes"]) == 0:
            return Skipped(name, "the image has no region")
        return self._sample(image, row, index, regions)

    def _sample(self, image: Tensor, row: int, index: int, regions: dict[str, np.ndarray]) -> Sample | Skipped:
        options = self.options
        _, _, scale = detection_size(*image.shape[-2:], options.image_size)
        sample: Sample = {
            "image": image if options.crop_on == "device" else resize_longest(image, options.image_size),
            "boxes": torch.from_numpy(regions["boxes"] * np.float32(scale / options.image_size)),
            "image_id": int(self.annotations.image_ids[row]),
            "index": index,
        }
        if "crop_boxes" in regions:
            if options.crop_on == "device":
                sample["crop_boxes"] = torch.from_numpy(regions["crop_boxes"])
            else:
                sample["crops"] = [crop_region(image, box, options.crop_size) for box in regions["crop_boxes"]]
        for name in ("labels", "teacher_features"):
            if name in regions:
                sample[name] = torch.from_numpy(regions[name])
        return sample


class GridDistill(RegionDataset):
    """Cells of a random grid (``--dataset-type grid_distill``); needs images only."""

    def regions(self, row: int, width: int, height: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        options = self.options
        boxes, crops = grid_regions(
            width, height, rng,
            max_split=options.max_split, max_boxes=options.max_boxes, crop_scale=options.crop_scale,
        )  # fmt: skip
        return {"boxes": boxes, "crop_boxes": crops}


class ProposalsDistill(RegionDataset):
    """Random annotations with enlarged crops (``--dataset-type proposals_distill``).

    With a :class:`TeacherStore` as ``store``, samples have the teacher's embeddings of the crops, ``teacher_features``
    (float16 ``[K, D]``), and no crops.
    """

    store: TeacherStore | None = None

    def regions(self, row: int, width: int, height: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        options, annotated = self.options, self.annotations.boxes[self.annotations.of(row)]
        drawn = draw_proposals(
            annotated, rng, max_boxes=options.max_boxes, min_size=options.min_size, max_size=options.max_size
        )
        boxes, crops = proposal_regions(annotated, drawn, width, height)
        if self.store is None:
            return {"boxes": boxes, "crop_boxes": crops}
        return {"boxes": boxes, "teacher_features": self.store.embeddings(row, drawn)}

    def _sample(self, image: Tensor, row: int, index: int, regions: dict[str, np.ndarray]) -> Sample | Skipped:
        if "teacher_features" in regions and not np.isfinite(regions["teacher_features"]).all():
            return Skipped(
                self.annotations.file_name(row),
                f"it could not be read when the teacher cache {self.store.folder} was made; make that anew",
            )
        return super()._sample(image, row, index, regions)


class RegionText(RegionDataset):
    """The first annotations of an image with their labels (``--dataset-type region_clip``); no crops."""

    def regions(self, row: int, width: int, height: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        own = self.annotations.of(row)
        boxes, labels = self.annotations.boxes[own], self.annotations.labels[own]
        known = np.flatnonzero(labels >= 0)[: self.options.max_boxes]
        return {"boxes": boxes[known].astype(np.float32), "labels": labels[known].astype(np.int64)}


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
