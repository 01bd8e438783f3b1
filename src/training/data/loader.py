"""From command-line arguments to the training data: dataset, order and worker processes."""

from __future__ import annotations

import argparse
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.data.collate import Collate
from training.data.datasets import GridDistill, ImageText, ProposalsDistill, RegionOptions, RegionText
from training.engine.data.annotations import Annotations, Strings, load_annotations, parse, read_captions, read_json
from training.engine.data.images import ImageError, is_url, resolve
from training.engine.data.sampler import EpochBatchSampler
from training.engine.errors import UserError

log = logging.getLogger(__name__)

_DATASETS = {"grid_distill": GridDistill, "proposals_distill": ProposalsDistill, "region_clip": RegionText}
_PROBES = 16  # files looked for before training starts
_GRACE = 120  # seconds that a worker lives on after SIGTERM


def start_worker(_: int) -> None:
    """Set up a loader process: one thread, and signals left to the training process."""
    torch.set_num_threads(1)  # workers share the cores with each other and with the model
    # A signal to the whole process group must not take the data from a training process that is about to save.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))


class TrainData:
    """Training data of one process.

    Attributes:
        dataset: map-style, keys ``(epoch, index)``.
        sampler: order of the data.
        loader: collated batches of the chosen epoch, from its chosen batch on.
        class_names: of a labelled dataset, by label; None otherwise. ``num_classes`` is their number, or 0.
        num_images, num_regions: images, and annotations of them.
        skipped: bad annotation entries that were left out, by reason.
    """

    def __init__(
        self, dataset: Dataset, sampler: EpochBatchSampler, loader: DataLoader, annotations: Annotations, labelled: bool
    ) -> None:
        self.dataset, self.sampler, self.loader = dataset, sampler, loader
        self.class_names = annotations.names if labelled else None
        self.num_classes = len(annotations.names) if labelled else 0
        self.num_images = len(dataset)
        self.num_regions = int(np.diff(annotations.offsets)[dataset.indices].sum())
        self.skipped = annotations.skipped

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
    args: argparse.Namespace,
    *,
    image_size: int,
    crop_size: int,
    rank: int = 0,
    world_size: int = 1,
    tokenizer: Callable[[list[str]], Tensor] | None = None,
) -> TrainData:
    """Training data of ``args.dataset_type`` for one process.

    Args:
        args: the program's arguments.
        image_size: side of the input (the native size for contrastive training).
        crop_size: side of a region crop.
        tokenizer: texts -> ids ``[N, L]``; contrastive training only.

    Raises:
        UserError: annotation file or images missing, or nothing to train on.
    """
    kind = args.dataset_type
    if kind == "contrastive":
        annotations, dataset = _image_text(args, image_size, tokenizer)
    else:
        annotations = load_annotations(args.train_data, cache_dir=args.annotation_cache)
        dataset = _region_dataset(args, annotations, image_size, crop_size)
    check_image_root(args.train_image_root, _some_names(dataset), args.train_data, "--train-image-root")
    sampler = EpochBatchSampler(
        size=len(dataset), batch_size=args.batch_size, rank=rank, world_size=world_size, seed=args.seed
    )
    context_length = tokenizer(["a"]).shape[1] if kind == "contrastive" else 0
    collate = Collate(
        image_size=image_size, crop_size=crop_size, crop_on=args.crop_on, kind=kind, context_length=context_length
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=args.workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available() and not str(args.device or "").startswith("cpu"),
        persistent_workers=args.workers > 0,
        prefetch_factor=4 if args.workers > 0 else None,
        worker_init_fn=start_worker,
        # Its own: each pass draws a seed, and a resumed run makes a pass more than the one it continues.
        generator=torch.Generator().manual_seed(args.seed + rank),
    )
    log.info("%s: %d images for %s", args.train_data, len(dataset), kind)
    return TrainData(dataset, sampler, loader, annotations, labelled=kind == "region_clip")


def _share(count: int, ratio: float, seed: int) -> np.ndarray:
    """A random share of ``range(count)``, ascending; all of it when the ratio is 1."""
    if ratio >= 1:
        return np.arange(count)
    chosen = np.random.default_rng([seed, 7]).permutation(count)[: max(int(count * ratio), 1)]
    return np.sort(chosen)


def _region_dataset(args: argparse.Namespace, annotations: Annotations, image_size: int, crop_size: int) -> Dataset:
    rows = np.arange(len(annotations))
    if args.dataset_type == "region_clip":
        rows = np.flatnonzero(np.diff(annotations.offsets) > 0)  # images with annotations
        if len(rows) == 0 or not annotations.names:
            raise UserError(f"--train-data {args.train_data}: no annotation with a category; region_clip needs labels")
    rows = rows[_share(len(rows), args.train_ratio, args.seed)]
    options = RegionOptions(
        image_size=image_size, crop_size=crop_size, crop_on=args.crop_on, max_boxes=args.max_boxes,
        max_split=args.max_split, crop_scale=args.crop_scale, min_size=args.min_size, max_size=args.max_size,
        seed=args.seed,
    )  # fmt: skip
    return _DATASETS[args.dataset_type](annotations, args.train_image_root, rows, options)


def _image_text(
    args: argparse.Namespace, image_size: int, tokenizer: Callable[[list[str]], Tensor] | None
) -> tuple[Annotations, ImageText]:
    content = read_json(args.train_data, "--train-data")
    annotations = parse({**content, "annotations": []}, args.train_data)
    captions = read_captions(content.get("annotations"), annotations)
    with_caption = np.flatnonzero([len(c) for c in captions])
    if len(with_caption) == 0:
        raise UserError(f"--train-data {args.train_data}: no image with a caption; contrastive training needs them")
    rows = with_caption[_share(len(with_caption), args.train_ratio, args.seed)]
    dataset = ImageText(
        annotations=annotations,
        root=args.train_image_root,
        rows=rows,
        captions=Strings.of([text for r in rows for text in captions[r]]),
        offsets=np.cumsum([0, *(len(captions[r]) for r in rows)]),
        tokenize=tokenizer,
        size=image_size,
        seed=args.seed,
    )
    return annotations, dataset


def _some_names(dataset: Dataset) -> list[str]:
    """Names of a few files, evenly spread over the dataset."""
    chosen = np.unique(np.linspace(0, len(dataset) - 1, _PROBES).astype(int))
    return [dataset.annotations.file_name(int(dataset.indices[i])) for i in chosen]


def check_image_root(root: str, names: list[str], annotation_file: str, flag: str) -> None:
    """UserError when none of the named files is under the root (URLs are not probed)."""
    if is_url(root):
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
