"""Flags of the training data and of the regions."""

from __future__ import annotations

from dataclasses import dataclass

from training.engine.flags import COUNT, NATURAL, NOT_NEGATIVE, POSITIVE, SHARE, flag, number

SOURCES = {
    "grid_distill": "cells of a random grid of each image; needs images only",
    "proposals_distill": "annotated boxes, with enlarged crops",
    "mixed_distill": "annotated boxes and grid cells in one image, by --proposal-share",
    "region_clip": "annotated boxes with their class",
    "contrastive": "whole images with a caption",
}


@dataclass(frozen=True)
class DataOptions:
    """Where training images come from, and how they reach the model."""

    dataset_type: str = flag("", "where regions come from; by default the method's own", choices=tuple(SOURCES))
    train_data: str = flag(
        "", 'COCO or LVIS json (captions for contrastive), or a folder of images; "" to evaluate only',
        metavar="FILE|DIR",
    )
    train_image_root: str = flag(
        "", "folder or URL that the file names are relative to; a folder of images is its own", metavar="DIR"
    )
    train_ratio: float = flag(1.0, "share of the images to use", type=number(float, 0, 1, open_low=True))
    det_image_size: int = flag(1024, "side of the dense input in pixels", type=COUNT)
    batch_size: int = flag(2, "images per process and micro-batch", type=COUNT)
    workers: int = flag(4, "loader processes for each training process", type=NATURAL)
    crop_on: str = flag(
        "worker",
        "where images are resized and cropped: loader workers, or the GPU from the original image",
        choices=("worker", "device"),
    )
    max_skipped: float = flag(0.1, "share of unusable images at which the run stops", type=SHARE)
    cache_teacher: str | None = flag(
        None, "compute the teachers' answers once, keep them here, train without them", metavar="DIR"
    )
    annotation_cache: str | None = flag(
        None,
        "keep parsed annotations here; they open in a moment. By default files of 16 MB and more are kept in "
        '~/.cache/open_clip/annotations; "" for never',
        metavar="DIR",
    )
    captions: str = flag(
        "", "COCO captions json for the images of --train-data, where it has none itself", metavar="FILE"
    )


@dataclass(frozen=True)
class RegionOptions:
    """Which regions of an image are drawn."""

    max_boxes: int = flag(20, "regions an image", type=COUNT)
    max_split: int = flag(6, "rows and columns of a grid at most", type=COUNT)
    grid: str = flag(
        "all",
        "grids to draw from: all, or dense (2 rows or more, and more columns than half of them)",
        choices=("all", "dense"),
    )
    crop_scale: float = flag(1.0, "grid crops are the cells enlarged by this factor", type=number(float, 1))
    min_size: float = flag(8, "smaller boxes (square root of the area, pixels) are left out", type=NOT_NEGATIVE)
    max_size: float = flag(1024, "larger boxes are left out", type=POSITIVE)
    proposal_share: float = flag(0.5, "mixed_distill: share of the regions that are annotated boxes", type=SHARE)
    fixed_regions: bool = flag(False, "the same regions of an image in every epoch")


@dataclass(frozen=True)
class SampleOptions:
    """How samples are made.

    Attributes:
        image_size: side of the square input, pixels; the longest side of an image is brought to it.
        crop_size: side of a region crop (the teacher's native size), pixels.
        crop_on: ``"worker"`` (crops and resized image are made there) or ``"device"`` (the original image travels).
        seed: of all random choices.
    """

    image_size: int
    crop_size: int
    crop_on: str = "worker"
    seed: int = 0
