"""The teacher cache: embeddings of fixed regions, computed once and read in every epoch of every run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from open_clip import CLIP
from open_clip.transform import normalize
from training.data.datasets import ProposalsDistill
from training.data.loader import start_worker
from training.data.proposals import CROP_ENLARGEMENT
from training.engine.checkpoint import weights_hash
from training.engine.distributed import Dist, together
from training.engine.precision import Precision
from training.teachers.regions import PackRegions, TeacherRegions, crops_of
from training.teachers.store import TeacherStore, annotations_key

log = logging.getLogger(__name__)

BATCH = 8  # images; a batch never crosses the border of a shard
TEACHER_CHUNK = 256  # crops that the teacher embeds at a time
NAMED_SKIPS = 20


def open_store(folder: str, dataset: ProposalsDistill, model: CLIP, precision: Precision) -> TeacherStore:
    """The store of a run's regions, crops and teacher; nothing is written.

    The images' pixels are not part of its key: after changing images under the same names, delete the folder.

    Args:
        model: the start model, that is the teacher, with its weights in float32.

    Raises:
        UserError: the folder belongs to other weights, regions or crops.
    """
    options, visual = dataset.options, model.visual
    key = {
        "weights": weights_hash(visual.state_dict()),
        "precision": str(precision.input_dtype),
        "regions": annotations_key(dataset.annotations, dataset.indices),
        "min_size": float(options.min_size),
        "max_size": float(options.max_size),
        "crop": f"enlarged {CROP_ENLARGEMENT} times, {options.crop_size} px, made on {options.crop_on}",
        "normalisation": [list(map(float, visual.image_mean)), list(map(float, visual.image_std))],
    }
    return TeacherStore(folder, dataset.annotations, visual.embed_dim, key)


def fill(
    store: TeacherStore,
    dataset: ProposalsDistill,
    teacher: CLIP,
    *,
    dist: Dist,
    precision: Precision,
    workers: int = 0,
) -> int:
    """Embed whatever the store lacks; each process fills shards of its own. Every process must call it.

    A filling that is interrupted loses at most the shard under way of each process.

    Args:
        teacher: on the device, in the dtype it computes in.
        workers: loader processes.

    Returns:
        Regions that this process embedded; 0 when the store was complete.

    Raises:
        UserError: the disk is full or not writable.
    """
    with together():
        if dist.is_master:
            store.create()
    embedded = 0
    with together():
        missing = [s for s in range(dist.rank, store.num_shards, dist.world_size) if not store.is_complete(s)]
        for shard, array, regions in _shards(store, missing, dataset, teacher, dist, precision, workers):
            store.write(shard, array)
            embedded += regions
    log.info("teacher cache %s: %d regions embedded now; training runs without the teacher", store.folder, embedded)
    return embedded


def _shards(
    store: TeacherStore, shards: list[int], dataset: ProposalsDistill, teacher: CLIP, dist: Dist, precision: Precision,
    workers: int,
) -> Iterator[tuple[int, np.ndarray, int]]:  # fmt: skip
    """(shard, its array, number of regions), one after another; one loader serves them all."""
    used = np.zeros(store.num_images, bool)
    used[dataset.indices] = True
    rows = {s: [i for i in store.images_of(s) if used[i]] for s in shards}
    plan = [(s, rows[s][i : i + BATCH]) for s in shards for i in range(0, max(len(rows[s]), 1), BATCH)]
    crop_size = dataset.options.crop_size
    loader = DataLoader(
        TeacherRegions(dataset),
        batch_sampler=[batch for _, batch in plan],
        num_workers=workers,
        collate_fn=PackRegions(crop_size),
        worker_init_fn=start_worker,
    )
    bar = tqdm(
        total=sum(map(len, rows.values())), desc="teacher cache", unit="img",
        disable=not dist.is_master or not shards, dynamic_ncols=True,
    )  # fmt: skip
    skipped, regions, array = 0, 0, None
    with bar:
        for position, ((shard, images), batch) in enumerate(zip(plan, loader, strict=True)):
            if array is None:
                array, regions = np.full(store.shape(shard), np.nan, np.float16), 0
            for file, reason in batch["skipped"]:
                if skipped < NAMED_SKIPS:
                    log.warning("left out of the teacher cache: %s: %s", file, reason)
                skipped += 1
            if batch["regions"]:
                embeddings = _embed(teacher, crops_of(batch, crop_size, dist.device), precision)
                regions += _place(store, array, batch["regions"], embeddings.half().cpu().numpy())
            bar.update(len(images))
            if position + 1 == len(plan) or plan[position + 1][0] != shard:
                yield shard, array, regions
                array = None


@torch.inference_mode()
def _embed(teacher: CLIP, crops: Tensor, precision: Precision) -> Tensor:
    """Teacher embeddings ``[K, D]``, unit length, of crops of values 0..255."""
    visual = teacher.visual
    crops = normalize(crops, visual.image_mean, visual.image_std, precision.input_dtype)
    with precision.autocast():
        return torch.cat([teacher.encode_image(c, normalize=True) for c in crops.split(TEACHER_CHUNK)])


def _place(
    store: TeacherStore, array: np.ndarray, regions: list[tuple[int, Any, bool, int]], values: np.ndarray
) -> int:
    """Put embeddings into their rows of a shard; returns their number."""
    first = 0
    for image, drawn, stand_in, count in regions:
        part = values[first : first + count]
        if len(drawn):
            array[store.rows(image, drawn)[1]] = part[: len(drawn)]
        if stand_in:
            array[store.rows(image, [])[1]] = part[-1]
        first += count
    return first
