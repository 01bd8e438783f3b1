"""Samples for training and testing. All randomness of a sample comes from (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ovdet.data.images import read_image
from ovdet.data.masks import MaskWindows, run_lengths, view_of_mask
from ovdet.data.transforms import View, apply_view, apply_view_to_boxes, draw_view, test_view
from training.engine.data.images import ImageError, resolve
from training.engine.data.records import Annotations


@dataclass
class Skipped:
    """An image that could not be used, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class ViewOptions:
    """How images and their objects become training samples.

    Attributes:
        image_size: side S of the padded square.
        jitter, flip, whole_target: see :func:`~ovdet.data.transforms.draw_view`.
        resize: see :func:`~ovdet.data.transforms.resize_to`.
        exif: whether images are turned as their EXIF orientation says.
        mask_centres: see :func:`~ovdet.data.transforms.source_pixels`.
        min_box_side: objects whose box is thinner after the view are dropped, in pixels.
        replace_thin: whether an image all of whose boxes are so thin is replaced by another one, drawn at random.
    """

    image_size: int
    jitter: tuple[float, float] = (0.1, 2.0)
    flip: float = 0.5
    whole_target: bool = True
    resize: str = "bilinear"
    exif: bool = True
    mask_centres: bool = False
    min_box_side: float = 0.01
    replace_thin: bool = True


_TRIES = 10  # images drawn in place of one whose boxes are all too thin


class TrainDataset(Dataset):
    """Jittered views with their objects.

    Args:
        annotations: with masks, if ``masks``.
        labels: int64 ``[A]``, the label of each annotated object in the detector's vocabulary; -1: not trained on.
        root: image root.
        options: of the views.
        keep_empty: also take images without objects.
        min_image_side: images with a thinner side, as the file says, are left out.
        min_object_side: objects thinner than that in the file are left out, in pixels.
        seed: of the views.
        masks: give masks.

    Attributes:
        lost: objects of trained classes that no sample will hold, by reason. An image that loses all of its objects is
            learned as background, as published.

    Items, by key (epoch, index): a dict of ``image`` uint8 ``[3, S, S]``, ``size`` (height, width of the valid area),
    ``boxes`` float32 ``[N, 4]``, ``labels`` int64 ``[N]``, with masks ``masks``
    (:class:`~ovdet.data.masks.MaskWindows`), and ``image_id``; or a :class:`Skipped`. Crowds are left out. Boxes are
    cut off at the window; with masks they are those of the masks in the window.
    """

    def __init__(
        self,
        annotations: Annotations,
        *,
        labels: np.ndarray,
        root: str,
        options: ViewOptions,
        keep_empty: bool = False,
        min_image_side: int = 0,
        min_object_side: float = 0.0,
        seed: int = 0,
        masks: bool = False,
    ) -> None:
        self.annotations, self.labels, self.root, self.options = annotations, labels, root, options
        self.seed, self.masks = seed, masks
        of_class = (labels >= 0) & ~annotations.crowd
        self.wanted = of_class & _large_enough(annotations, min_object_side)
        per_image = np.add.reduceat(np.append(of_class, False).astype(np.int64), annotations.offsets[:-1])
        per_image[np.diff(annotations.offsets) == 0] = 0  # reduceat gives an empty stretch its neighbour's value
        usable = np.ones(len(annotations), bool) if keep_empty else per_image > 0
        if min_image_side:
            usable &= (annotations.sizes == 0).any(1) | (annotations.sizes.min(1) >= min_image_side)
        self.images = np.flatnonzero(usable)
        self.lost = self._count_lost(of_class)

    def _count_lost(self, of_class: np.ndarray) -> dict[str, int]:
        """Objects of trained classes that no sample will hold, by reason."""
        lost = {"object without area, too thin or outside of its image": int((of_class & ~self.wanted).sum())}
        if self.masks:
            lost["object without a segmentation"] = int((self.wanted & ~self.annotations.has_mask()).sum())
        return {reason: number for reason, number in lost.items() if number}

    def __len__(self) -> int:
        return len(self.images)

    def higher_than_wide(self) -> np.ndarray:
        """Bool ``[len]``: images that the file says are higher than wide."""
        width, height = self.annotations.sizes[self.images].T
        return height > width

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | Skipped:
        epoch, index = key
        row = int(self.images[index])
        rng = np.random.default_rng([self.seed, epoch, row])
        for _ in range(_TRIES):
            sample = self._sample(row, rng)
            if isinstance(sample, Skipped) or not sample.pop("thin"):
                break
            row = int(self.images[rng.integers(len(self.images))])
        return sample

    def _sample(self, row: int, rng: np.random.Generator) -> dict[str, Any] | Skipped:
        options = self.options
        try:
            image = read_image(resolve(self.root, self.annotations.file_name(row)), exif=options.exif)
        except ImageError as error:
            return Skipped(error.file, error.reason)
        original = tuple(image.shape[-2:])
        view = draw_view(
            rng, *original, size=options.image_size, jitter=options.jitter, flip=options.flip,
            whole_target=options.whole_target,
        )  # fmt: skip
        mine = self.annotations.of(row)
        chosen = np.arange(mine.start, mine.stop)[self.wanted[mine]]
        boxes = apply_view_to_boxes(torch.from_numpy(np.array(self.annotations.boxes[chosen])), view, original)
        sample: dict[str, Any] = {
            "image": apply_view(image, view, options.image_size, options.resize),
            "size": view.size,
            "image_id": int(self.annotations.image_ids[row]),
        }
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        if self.masks:
            found, windows, boxes = self._masks(chosen, original, view)
            keep &= found
        seen = int(keep.sum())
        keep &= ((boxes[:, 2:] - boxes[:, :2]) >= max(options.min_box_side, 1e-3)).all(1)
        sample["thin"] = options.replace_thin and seen > 0 and not keep.any()
        if self.masks:
            kept = [windows[i] for i in keep.nonzero()[:, 0].tolist()]
            sample["masks"] = MaskWindows.of([mask for mask, _ in kept], [corner for _, corner in kept])
        sample |= {"boxes": boxes[keep], "labels": torch.from_numpy(self.labels[chosen])[keep]}
        return sample | self.extras(row, view, original)

    def extras(self, row: int, view: View, original: tuple[int, int]) -> dict[str, Any]:
        """What a detector wants to know of an image besides its objects; becomes part of its targets.

        Args:
            row: of the image; view: drawn for it; original: (height, width) of the upright image.
        """
        return {}

    def _masks(
        self, chosen: np.ndarray, original: tuple[int, int], view: View
    ) -> tuple[Tensor, list[tuple[np.ndarray, tuple[int, int]]], Tensor]:
        """Which objects have a mask that can be used, the masks' windows in the view, and their boxes ``[N, 4]``."""
        nothing = np.zeros((0, 0), bool), (0, 0)
        rles = [run_lengths(self.annotations.segmentation(i), *original) for i in chosen]
        windows = [
            nothing if rle is None else view_of_mask(rle, view, centre=self.options.mask_centres) for rle in rles
        ]
        corners = [(x, y, x + mask.shape[1], y + mask.shape[0]) for mask, (x, y) in windows]
        found = torch.tensor([rle is not None for rle in rles], dtype=torch.bool)
        return found, windows, torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)


def _large_enough(annotations: Annotations, least: float) -> np.ndarray:
    """Objects at least so wide and high in the file, of some area, and partly in their image: bool ``[A]``."""
    if not least:
        return np.ones(len(annotations.boxes), bool)
    boxes = annotations.boxes
    sides = boxes[:, 2:] - boxes[:, :2]
    size = np.repeat(annotations.sizes, np.diff(annotations.offsets), axis=0).astype(np.float32)
    size[size == 0] = np.inf  # the file does not say
    inside = (np.minimum(boxes[:, 2:], size) > np.maximum(boxes[:, :2], 0)).all(1)
    return (sides >= least).all(1) & inside & (annotations.areas > 0)


class ImageFiles(Dataset):
    """Images of files, made ready by :meth:`view`.

    Items, by index: what :meth:`view` gives, with ``original`` (height, width of the upright image) and ``index``; or a
    :class:`Skipped`.

    Args:
        file_names: paths below ``root``, or paths as they are where it is empty.
        exif: see :class:`ViewOptions`.
    """

    def __init__(self, file_names: Sequence[str], *, root: str, exif: bool) -> None:
        self.file_names, self.root, self.exif = file_names, root, exif

    def __len__(self) -> int:
        return len(self.file_names)

    def __getitem__(self, index: int) -> dict[str, Any] | Skipped:
        name = self.file_names[index]
        try:
            image = read_image(resolve(self.root, name) if self.root else name, exif=self.exif)
        except ImageError as error:
            return Skipped(error.file, error.reason)
        return {**self.view(image), "original": tuple(image.shape[-2:]), "index": index}

    def view(self, image: Tensor) -> dict[str, Any]:
        """An image uint8 ``[3, H, W]`` as a detector takes it: ``image``, and what else is known of it."""
        raise NotImplementedError


class TestDataset(ImageFiles):
    """Images at the detector's input size.

    Items, by index: a dict of ``image`` uint8 ``[3, S, S]``, ``size`` (height, width of the valid area), ``original``
    (height, width of the upright image), ``index`` and, where asked for, ``pixels``, the image itself; or a
    :class:`Skipped`.

    Args:
        file_names, root: see :class:`ImageFiles`.
        resize, exif: see :class:`ViewOptions`.
        keep_pixels: give the image as well.
    """

    __test__ = False  # no test, though its name begins like one

    def __init__(
        self,
        file_names: Sequence[str],
        *,
        root: str,
        image_size: int,
        resize: str = "bilinear",
        exif: bool = True,
        keep_pixels: bool = False,
    ) -> None:
        super().__init__(file_names, root=root, exif=exif)
        self.image_size, self.resize, self.keep_pixels = image_size, resize, keep_pixels

    def view(self, image: Tensor) -> dict[str, Any]:
        pixels, size = test_view(image, self.image_size, self.resize)
        sample = {"image": pixels, "size": size}
        return sample | {"pixels": image} if self.keep_pixels else sample
