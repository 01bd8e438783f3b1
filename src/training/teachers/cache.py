"""The teacher cache: answers to fixed questions, computed once and read in every epoch of every run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from training.data.datasets import RegionDataset
from training.data.proposals import CROP_ENLARGEMENT
from training.engine.data.store import TeacherStore, annotations_key, images_key
from training.engine.data.workers import Loader
from training.engine.distributed import Dist, together
from training.engine.errors import UserError
from training.engine.precision import Precision
from training.teachers.build import Teacher
from training.teachers.pictures import PackPictures, TeacherPictures, pictures_of

log = logging.getLogger(__name__)

BATCH = 8  # images; a batch never crosses the border of a shard
NAMED_SKIPS = 20


def why_not_kept(dataset: RegionDataset, teacher: Teacher) -> str:
    """Why a run's questions to a teacher are not answered from a store; "" where they are.

    Those about images recur in every epoch, those about regions if the regions do. A map of every region would take
    tens of times the space of its embedding.
    """
    if teacher.view.source == "images":
        return ""
    if teacher.spec.emits != "embedding":
        return "it answers with a map of every crop"
    return "" if dataset.source.repeats else "regions are drawn anew in every epoch"


def open_store(folder: str, dataset: RegionDataset, teacher: Teacher) -> TeacherStore:
    """The store of a teacher's answers to a run's questions; nothing is written.

    The images' pixels are not part of its key: after changing images under the same names, delete the folder.

    Raises:
        UserError: the folder belongs to other weights, regions or crops.
        ValueError: the answers are not kept, see :func:`why_not_kept`.
    """
    options, source, view = dataset.options, dataset.source, teacher.view
    size = options.crop_size if view.source == "crops" else options.image_size
    key = {
        "weights": teacher.identity(),
        "precision": str(view.dtype),
        "view": [view.source, view.size, *map(float, (*view.mean, *view.std))],
        "crop" if view.source == "crops" else "image": f"{size} px, made on {options.crop_on}",
    }
    path = Path(folder) / teacher.spec.name
    strangers = [f.name for f in Path(folder).glob("[!.]*") if not f.is_dir()]
    if strangers:
        raise UserError(f"--cache-teacher {folder} holds something else ({strangers[0]}): give another folder")
    if view.source == "images":
        cells = int(np.prod(teacher.cells()))
        offsets = np.arange(len(dataset.annotations) + 1, dtype=np.int64) * cells
        key["images"] = images_key(dataset.annotations, dataset.indices)  # their boxes change no answer
        return TeacherStore(path, offsets, teacher.width, key, unit="image")
    if reason := why_not_kept(dataset, teacher):
        raise ValueError(reason)
    regions = annotations_key(dataset.annotations, dataset.indices)
    key |= {"regions": regions, **source.key(), "enlarged": CROP_ENLARGEMENT}
    if source.options.fixed_regions:
        key["seed"] = options.seed
    return TeacherStore(path, source.answer_offsets(), teacher.width, key)


def fill(
    store: TeacherStore,
    dataset: RegionDataset,
    teacher: Teacher,
    *,
    dist: Dist,
    precision: Precision,
    workers: int = 0,
) -> int:
    """Ask whatever the store lacks; each process fills shards of its own. Every process must call it.

    A filling that is interrupted loses at most the shard under way of each process.

    Args:
        teacher: on the device.
        workers: loader processes.

    Returns:
        Answers that this process asked for; 0 when the store was complete.

    Raises:
        UserError: the disk is full or not writable, or is not the same for all processes.
    """
    with together():
        if dist.is_master:
            store.create()
    asked = 0
    with together():
        missing = store.missing(range(dist.rank, store.num_shards, dist.world_size), read=True)
        for shard, array, answers in _shards(store, missing, dataset, teacher, dist, precision, workers):
            store.write(shard, array)
            asked += answers
    with together():
        if missing := store.missing(delete=False):
            raise UserError(
                f"{store.where}: process {dist.rank} does not see {len(missing)} of the {store.num_shards} shards that "
                "all have filled together: give a folder that every machine shares"
            )
    log.info("teacher cache %s: %d answers asked for now; training runs without the teacher", store.folder, asked)
    return asked


def _shards(
    store: TeacherStore, shards: list[int], dataset: RegionDataset, teacher: Teacher, dist: Dist, precision: Precision,
    workers: int,
) -> Iterator[tuple[int, np.ndarray, int]]:  # fmt: skip
    """(shard, its array, number of answers), one after another; one loader serves them all."""
    used = np.zeros(store.num_images, bool)
    used[dataset.indices] = True
    rows = {s: [i for i in store.images_of(s) if used[i]] for s in shards}
    plan = [(s, rows[s][i : i + BATCH]) for s in shards for i in range(0, max(len(rows[s]), 1), BATCH)]
    options = dataset.options
    loader = Loader(
        TeacherPictures(dataset, teacher.view.source), workers=workers, batch_sampler=[batch for _, batch in plan],
        collate_fn=PackPictures(options.image_size, options.crop_size, options.crop_on),
    )  # fmt: skip
    bar = tqdm(
        total=sum(map(len, rows.values())), desc=f"teacher cache ({teacher.spec.name})", unit="img",
        disable=not dist.is_master or not shards, dynamic_ncols=True,
    )  # fmt: skip
    skipped, answers, array = 0, 0, None
    with bar:
        for position, ((shard, images), batch) in enumerate(zip(plan, loader, strict=True)):
            if array is None:
                array, answers = np.full(store.shape(shard), np.nan, np.float16), 0
            for file, reason in batch["skipped"]:
                if skipped < NAMED_SKIPS:
                    log.warning("left out of the teacher cache: %s: %s", file, reason)
                skipped += 1
            if batch["rows"]:
                with precision.autocast():
                    said = teacher(pictures_of(batch, teacher.view, dist.device))
                if said.ndim == 4:
                    said = said.flatten(2).transpose(1, 2).flatten(0, 1)  # [B * cells, D]
                answers += _place(store, array, batch["rows"], batch["answers"], said.half().cpu().numpy())
            bar.update(len(images))
            if position + 1 == len(plan) or plan[position + 1][0] != shard:
                yield shard, array, answers
                array = None


def _place(
    store: TeacherStore, array: np.ndarray, images: Sequence[int], answers: Sequence[np.ndarray | None],
    values: np.ndarray,
) -> int:  # fmt: skip
    """Put answers into their rows of a shard; returns their number."""
    first = 0
    for image, numbers in zip(images, answers, strict=True):
        if numbers is None:
            numbers = np.arange(store.offsets[image + 1] - store.offsets[image])
        array[store.rows(image, numbers)[1]] = values[first : first + len(numbers)]
        first += len(numbers)
    return first
