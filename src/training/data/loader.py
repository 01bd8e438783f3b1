"""From options to the training data: dataset, order and worker processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from training.data.collate import Collate
from training.data.datasets import ImageText, RegionDataset
from training.data.extras import make_extras
from training.data.options import DataOptions, RegionOptions, SampleOptions
from training.data.proposals import eligible
from training.data.regions import GridCells, Labelled, Mixed, Proposals, RegionSource
from training.engine.data.annotations import Annotations, Strings, load_annotations, parse, read_captions, read_json
from training.engine.data.folder import folder_annotations
from training.engine.data.sampler import EpochBatchSampler
from training.engine.data.samples import check_image_root
from training.engine.data.workers import Loader, check_shared_memory
from training.engine.errors import UserError

log = logging.getLogger(__name__)

REGION_SOURCES: dict[str, type[RegionSource]] = {
    "grid_distill": GridCells, "proposals_distill": Proposals, "mixed_distill": Mixed, "region_clip": Labelled,
}  # fmt: skip
_PROBES = 16  # files looked for before training starts
MANY = 0.1  # share of the boxes outside the limits of sizes from which on that is worth a warning


class TrainData:
    """Training data of one process.

    Attributes:
        dataset: map-style, keys ``(epoch, index)``.
        sampler: order of the data.
        loader: collated batches of the chosen epoch, from its chosen batch on.
        class_names: of annotations with categories, by label; None otherwise.
        num_images, num_regions: images, and annotations of them.
        skipped: bad annotation entries that were left out, by reason.
        unannotated: whether nobody annotated the boxes.
    """

    def __init__(
        self, dataset: Dataset, sampler: EpochBatchSampler, loader: Loader, annotations: Annotations
    ) -> None:
        self.dataset, self.sampler, self.loader = dataset, sampler, loader
        self.class_names = annotations.names or None
        self.num_images = len(dataset)
        self.num_regions = int(np.diff(annotations.offsets)[dataset.indices].sum())
        self.skipped = annotations.skipped
        self.unannotated = annotations.unannotated

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose what the next iteration over ``loader`` gives."""
        self.sampler.set_epoch(epoch, start_batch)

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of a whole epoch, for each process."""
        return self.sampler.batches_per_epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.loader)


def build_train_data(
    options: DataOptions,
    regions: RegionOptions,
    *,
    image_size: int,
    crop_size: int,
    fields: Sequence[str] = ("crops",),
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    tokenize: Callable[[list[str]], Tensor] | None = None,
    pin_memory: bool = False,
) -> TrainData:
    """Training data of ``options.dataset_type`` for one process.

    Args:
        options, regions: the flags.
        image_size: side of the input (the native size for contrastive training).
        crop_size: side of a region crop.
        fields: what samples have besides image and boxes: ``"crops"``, ``"labels"``, ``"captions"``,
            ``"region_captions"``, ``"classes"``.
        seed: of order and regions.
        rank, world_size: this process.
        tokenize: texts -> ids ``[N, L]``, for captions.
        pin_memory: for a training process that copies to a GPU.

    Raises:
        UserError: annotation file or images missing, nothing to train on, or too little shared memory for batches.
    """
    sample = SampleOptions(image_size=image_size, crop_size=crop_size, crop_on=options.crop_on, seed=seed)
    empty: dict[str, Tensor] = {}
    if options.dataset_type == "contrastive":
        annotations, dataset = _image_text(options, sample, tokenize)
        empty["texts"] = torch.zeros(0, tokenize(["a"]).shape[1], dtype=torch.int64)
        units = {}
    else:
        annotations = _annotations(options)
        dataset = _region_dataset(options, regions, sample, annotations, tuple(fields), tokenize)
        units = {extra.name: extra.unit for extra in dataset.extras}
        empty |= {extra.name: extra.none() for extra in dataset.extras}
        if "labels" in fields:
            empty["labels"] = torch.zeros(0, dtype=torch.int64)
        if "crops" in fields and options.crop_on == "device":
            empty["crop_boxes"] = torch.zeros(0, 4)
        elif "crops" in fields:
            empty["crops"] = torch.zeros(0, 3, crop_size, crop_size, dtype=torch.uint8)
    check_image_root(_image_root(options), _some_names(dataset), options.train_data, "--train-image-root")
    sampler = EpochBatchSampler(
        size=len(dataset), batch_size=options.batch_size, rank=rank, world_size=world_size, seed=seed
    )
    check_shared_memory(
        options.batch_size * _image_bytes(options, regions, sample, dataset, crops="crops" in fields),
        workers=options.workers, world_size=world_size, in_all=sampler.batches_per_epoch,
        flags="--workers or --batch-size",
    )  # fmt: skip
    collate = Collate(
        image_size=image_size, crop_size=crop_size, crop_on=options.crop_on, empty=empty, units=units,
        regions=options.dataset_type != "contrastive",
    )  # fmt: skip
    loader = Loader(
        dataset, workers=options.workers, seed=seed + rank, batch_sampler=sampler, collate_fn=collate,
        pin_memory=pin_memory,
    )  # fmt: skip
    log.debug("%s: %d images for %s", options.train_data, len(dataset), options.dataset_type)
    return TrainData(dataset, sampler, loader, annotations)


def _annotations(options: DataOptions) -> Annotations:
    """Those of the json, or of a folder of images (none)."""
    if Path(options.train_data).is_dir():
        return folder_annotations(options.train_data, "--train-data")
    read = REGION_SOURCES[options.dataset_type].reads_annotations
    return load_annotations(options.train_data, cache_dir=options.annotation_cache, images_only=not read)


def _image_root(options: DataOptions) -> str:
    """``--train-image-root``; a folder of images as training data is its own, whatever a recipe says of the root."""
    return options.train_data if Path(options.train_data).is_dir() else options.train_image_root


def _share(count: int, ratio: float, seed: int) -> np.ndarray:
    """A random share of ``range(count)``, ascending; all of it when the ratio is 1."""
    if ratio >= 1:
        return np.arange(count)
    chosen = np.random.default_rng([seed, 7]).permutation(count)[: max(int(count * ratio), 1)]
    return np.sort(chosen)


def _region_dataset(
    options: DataOptions, regions: RegionOptions, sample: SampleOptions, annotations: Annotations,
    fields: tuple[str, ...], tokenize: Callable[[list[str]], Tensor] | None,
) -> RegionDataset:  # fmt: skip
    source = REGION_SOURCES[options.dataset_type](annotations, regions)
    rows = np.arange(len(annotations))
    if source.reads_annotations:
        rows = _with_annotations(options, regions, source, annotations)
    rows = rows[_share(len(rows), options.train_ratio, sample.seed)]
    extras = make_extras(fields, annotations, captions_file=options.captions, tokenize=tokenize)
    return RegionDataset(
        annotations, _image_root(options), rows, source, sample, fields=fields, extras=extras
    )  # fmt: skip


def _with_annotations(
    options: DataOptions, regions: RegionOptions, source: RegionSource, annotations: Annotations
) -> np.ndarray:
    """Rows of the images to train on, for a source that draws annotations; says what is missing."""
    where, usable = f"--train-data {options.train_data}", source.usable()
    if isinstance(source, Labelled):
        if not usable.any() or not annotations.names:
            raise UserError(f"{where}: no annotation with a category; region_clip needs labels")
        return np.flatnonzero(usable)
    limits = f"--min-size {regions.min_size:g} to --max-size {regions.max_size:g} pixels"
    if not usable.any():
        raise UserError(
            f"{where}: not one of its {len(annotations)} images has a box of {limits} (sides of squares of equal "
            "area): give a file with annotations or other limits, or use --dataset-type grid_distill"
        )
    left_out = int((~eligible(annotations.boxes, regions.min_size, regions.max_size)).sum())
    if left_out > MANY * len(annotations.boxes):
        log.warning("%s: %d of its %d boxes are not of %s and are left out", where, left_out, len(annotations.boxes),
                    limits)  # fmt: skip
    if missing := int((~usable).sum()):
        stands_in = "the top-left quarter of each stands in" if source.needs_annotations else "they have cells alone"
        level = logging.WARNING if source.needs_annotations else logging.INFO
        log.log(level, "%s: %d of %d images have no usable box; %s", where, missing, len(annotations), stands_in)
    return np.arange(len(annotations))


def _image_text(
    options: DataOptions, sample: SampleOptions, tokenize: Callable[[list[str]], Tensor] | None
) -> tuple[Annotations, ImageText]:
    content = read_json(options.train_data, "--train-data")
    annotations = parse({**content, "annotations": []}, options.train_data)
    captions = read_captions(content.get("annotations"), annotations)
    with_caption = np.flatnonzero([len(c) for c in captions])
    if len(with_caption) == 0:
        raise UserError(f"--train-data {options.train_data}: no image with a caption; contrastive training needs them")
    rows = with_caption[_share(len(with_caption), options.train_ratio, sample.seed)]
    dataset = ImageText(
        annotations=annotations,
        root=options.train_image_root,
        rows=rows,
        captions=Strings.of([text for r in rows for text in captions[r]]),
        offsets=np.cumsum([0, *(len(captions[r]) for r in rows)]),
        tokenize=tokenize,
        size=sample.image_size,
        seed=sample.seed,
    )
    return annotations, dataset


def _image_bytes(
    options: DataOptions, regions: RegionOptions, sample: SampleOptions, dataset: RegionDataset | ImageText, *,
    crops: bool,
) -> float:  # fmt: skip
    """Bytes of shared memory for an image and its crops, on average; all else of a batch is small beside them."""
    square = float(3 * sample.image_size**2)
    if options.dataset_type == "contrastive":
        return square
    annotations, rows = dataset.annotations, dataset.indices
    if options.crop_on == "device":  # the original travels
        areas = annotations.sizes[rows].astype(np.float64).prod(1)
        known = areas[areas > 0]  # the median: one file of sizes that cannot be would spoil a mean
        return 3 * float(np.median(known)) if len(known) else square
    if not crops or options.cache_teacher:  # crops are made once, to fill the cache
        return square
    source = REGION_SOURCES[options.dataset_type]
    cells = 0 if source.needs_annotations else regions.max_split**2
    boxes = np.diff(annotations.offsets)[rows] if source.reads_annotations else 0
    return square + 3 * sample.crop_size**2 * float(np.minimum(boxes + cells, regions.max_boxes).mean())


def _some_names(dataset: Dataset) -> list[str]:
    """Names of a few files, evenly spread over the dataset."""
    chosen = np.unique(np.linspace(0, len(dataset) - 1, _PROBES).astype(int))
    return [dataset.annotations.file_name(int(dataset.indices[i])) for i in chosen]
