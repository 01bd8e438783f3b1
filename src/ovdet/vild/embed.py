"""The teacher's embeddings of all proposals, computed once: crops -> embeddings -> store."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from open_clip.identity import identity
from open_clip.transform import normalize
from ovdet.data.dataset import Skipped
from ovdet.data.images import read_image
from ovdet.vild.config import TeacherConfig, VildConfig
from ovdet.vild.crops import crop_pixels, crops, crops_on_device
from ovdet.vild.proposals import ProposalList
from ovdet.vild.scores import teacher_target
from training.engine.data.images import ImageError, resolve
from training.engine.data.samples import black
from training.engine.data.store import TeacherStore
from training.engine.data.workers import Loader, check_shared_memory
from training.engine.distributed import Dist, all_reduce_sum, together
from training.engine.errors import UserError
from training.engine.precision import Precision
from training.engine.skips import SkipPolicy

log = logging.getLogger(__name__)

SHARD_IMAGES = 100  # 31 MB at 300 proposals an image of 512 numbers
CHECKED_IMAGES = 256  # before training
CPU_BATCH = 16  # crops a CPU embeds at a time, whatever the batch size: more do not fit into its caches
AHEAD = 1  # images that a worker makes ahead: 90 MB each


def open_store(
    folder: str, config: VildConfig, proposals: ProposalList, teacher: nn.Module, *, flag: str = "data.store"
) -> TeacherStore:
    """The store of a teacher's embeddings of proposals; nothing is written.

    Args:
        teacher: a CLIP model.

    Raises:
        UserError: no folder is named, or it belongs to another teacher, other proposals or other crops.
    """
    if not folder:
        raise UserError(f"{flag} is empty: name the folder of the teacher's embeddings (ViLD/embed.py fills it)")
    options = config.teacher
    key = {
        "teacher": f"{options.name} {identity(teacher.visual)}",
        "precision": options.precision,
        "crops": f"{options.crop_rule} to {teacher.visual.image_size} px",
        "scales": [float(scale) for scale in options.crop_scales],
        "sum": "raw embeddings added, then unit length",
        "upright": config.data.exif,
        "proposals": proposals.hash,
    }
    return TeacherStore(
        folder, proposals.offsets, teacher.embed_dim, key, shard_images=SHARD_IMAGES, flag=flag
    )  # fmt: skip


def check_filled(store: TeacherStore) -> None:
    """UserError where shards are missing; their sizes are looked at, not their bytes."""
    if not Path(store.folder).is_dir():
        raise UserError(f"{store.where}: no such folder; ViLD/embed.py fills it")
    missing = store.missing()
    if missing:
        raise UserError(
            f"{store.where}: {len(missing)} of {store.num_shards} shards are not there; run ViLD/embed.py again, which "
            "goes on where it was"
        )


def check_rows(store: TeacherStore, images: np.ndarray) -> None:
    """UserError where the teacher embedded nothing, as with images that could not be read; few rows are looked at.

    Args:
        images: rows of ``store`` that are used.
    """
    filled = images[np.diff(store.offsets)[images] > 0]
    looked = filled[np.linspace(0, len(filled) - 1, min(len(filled), CHECKED_IMAGES)).astype(np.int64)]
    if len(looked) and not any(np.isfinite(store.answers(int(image), [0])).all() for image in looked):
        raise UserError(
            f"{store.where}: rows of NaN alone, as the teacher could not embed any of {len(looked)} images looked at; "
            "see data.train_images, delete the folder and run ViLD/embed.py again"
        )


class Embedder:
    """Unit-length embeddings of crops.

    Args:
        clip: a CLIP model; its image tower is moved to the device.
        options: how crops are made.
        precision: of the tower.
    """

    def __init__(self, clip: nn.Module, options: TeacherConfig, *, device: torch.device, precision: Precision) -> None:
        self.clip, self.options, self.device, self.precision = clip, options, device, precision
        self.visual = clip.visual.to(device)

    @property
    def size(self) -> int:
        """Side of a crop."""
        return self.visual.image_size

    def pixels_of(self, boxes: np.ndarray, height: int, width: int) -> np.ndarray:
        """Whole pixels of all crops of an image, int64 ``[K, S, 4]``, S scales."""
        parts = [crop_pixels(boxes, scale, height, width) for scale in self.options.crop_scales]
        return np.stack(parts, axis=1)

    @torch.inference_mode()
    def raw(self, pictures: Tensor) -> Tensor:
        """Raw embeddings ``[N, D]``, float32, of squares ``[N, 3, size, size]`` of values 0..255."""
        if self.device.type == "cpu":
            return torch.cat([self._raw(part) for part in pictures.split(CPU_BATCH)])
        return self._raw(pictures)

    def _raw(self, pictures: Tensor) -> Tensor:
        with self.precision.autocast():
            view = normalize(pictures.to(self.device, non_blocking=True), self.visual.image_mean, self.visual.image_std)
            return self.clip.encode_image(view, normalize=False).float()

    def embed(self, image: Tensor, boxes: np.ndarray) -> Tensor:
        """Targets ``[K, D]`` of boxes of an image, uint8 ``[3, H, W]``."""
        pixels = self.pixels_of(boxes, *image.shape[-2:])
        cut = self.cut(image, pixels.reshape(-1, 4))
        parts = [self.raw(part) for part in cut.split(self.options.batch_size)]
        whole = torch.cat(parts) if parts else torch.zeros(0, self.clip.embed_dim, device=self.device)
        return self.combine(whole)

    def cut(self, image: Tensor, pixels: np.ndarray) -> Tensor:
        """Crops where they are cheapest: on a GPU all at once, else one by one."""
        if self.device.type == "cuda":
            return crops_on_device(image.to(self.device, non_blocking=True), pixels, self.size, self.options.crop_rule)
        return crops(image, pixels, self.size, self.options.crop_rule)

    def combine(self, raw: Tensor) -> Tensor:
        """Targets ``[K, D]`` of raw embeddings ``[K * S, D]``, the scales of a box one after the other."""
        return teacher_target(*raw.unflatten(0, (-1, len(self.options.crop_scales))).unbind(1))


class CropDataset(Dataset):
    """Crops of an image's proposals; a key is an image's row. Items: a dict of ``row`` and ``crops`` uint8
    ``[K * S, 3, n, n]`` or, for a GPU, ``image`` and ``pixels``; or a :class:`Skipped`.
    """

    def __init__(self, proposals: ProposalList, embedder: Embedder, *, root: str, exif: bool) -> None:
        self.proposals, self.root, self.exif = proposals, root, exif
        self.scales, self.rule, self.size = embedder.options.crop_scales, embedder.options.crop_rule, embedder.size
        self.on_device = embedder.device.type == "cuda"

    def __len__(self) -> int:
        return len(self.proposals)

    def __getitem__(self, row: int) -> dict[str, Any] | Skipped:
        boxes = self.proposals.boxes[self.proposals.of(row)]
        try:
            image = read_image(resolve(self.root, self.proposals.names[row]), exif=self.exif)
        except ImageError as error:
            return Skipped(error.file, error.reason)
        parts = [crop_pixels(boxes, scale, *image.shape[-2:]) for scale in self.scales]
        pixels = np.stack(parts, axis=1).reshape(-1, 4)
        if self.on_device:
            return {"row": row, "image": image, "pixels": pixels}
        out = black(len(pixels), self.size, self.size, 3).permute(0, 3, 1, 2)
        return {"row": row, "crops": crops(image, pixels, self.size, self.rule, out)}


def fill(
    store: TeacherStore,
    proposals: ProposalList,
    embedder: Embedder,
    *,
    root: str,
    exif: bool,
    dist: Dist,
    workers: int = 0,
    max_skipped: float = 0.1,
) -> int:
    """Embed what the store lacks; each process fills shards of its own. Every process must call it.

    An interrupted filling loses the shard under way of each process. Rows of images that cannot be read are NaN.

    Args:
        root: of the images; exif: whether they are turned as their EXIF orientation says, as proposals' were.
        workers: loader processes.
        max_skipped: share of unreadable images that ends it.

    Returns:
        Rows that this process embedded.

    Raises:
        UserError: the disk is full or not writable, or too many images cannot be read.
    """
    with together():
        if dist.is_master:
            store.create()
            log.info("%s", announcement(store))
        if embedder.device.type != "cuda":
            most = int(np.diff(proposals.offsets).max(initial=0)) * len(embedder.options.crop_scales)
            check_shared_memory(
                most * 3 * embedder.size**2, workers=workers, flags="data.workers, or the number of proposals",
                world_size=dist.world_size, batches=AHEAD,
            )  # fmt: skip
    policy = SkipPolicy(store.where, max_skipped, "data.max_skipped")
    rows = 0
    with together():
        shards = store.missing(range(dist.rank, store.num_shards, dist.world_size))
        source = CropDataset(proposals, embedder, root=root, exif=exif)
        for shard, array, number in _shards(store, shards, source, embedder, policy, dist, workers):
            store.write(shard, array)
            rows += number
    # On the device: NCCL sums nothing that lies on the host.
    counts = torch.tensor([policy.usable, policy.skipped, rows], dtype=torch.float64, device=dist.device)
    usable, skipped, everywhere = all_reduce_sum(counts).tolist()
    policy.reset()
    policy.count(usable, skipped)
    policy.judge(at_end=True)
    if dist.is_master:
        log.info("%s: %d rows embedded now", store.where, everywhere)
    return rows


def announcement(store: TeacherStore) -> str:
    """What a store will hold when it is full, for people."""
    rows = int(store.offsets[-1])
    return (
        f"{store.where}: {store.num_images} images, {rows} rows of {store.width} numbers, "
        f"{2 * rows * store.width / 1e9:.3g} GB in {store.num_shards} shards"
    )


def _shards(
    store: TeacherStore, shards: Sequence[int], source: CropDataset, embedder: Embedder, policy: SkipPolicy,
    dist: Dist, workers: int,
) -> Iterator[tuple[int, np.ndarray, int]]:  # fmt: skip
    """(shard, its array, rows embedded), one after another; one loader serves them all."""
    plan = [(shard, row) for shard in shards for row in store.images_of(shard)]
    loader = Loader(
        source, workers=workers, batch_size=None, sampler=[row for _, row in plan],
        **({"prefetch_factor": AHEAD, "persistent_workers": False} if workers else {}),
    )  # fmt: skip
    bar = tqdm(
        total=len(plan), desc="embedding", unit="img", disable=not dist.is_master or not plan, mininterval=1,
        dynamic_ncols=True,
    )  # fmt: skip
    queue: _Queue | None = None
    with bar:
        for position, ((shard, _), sample) in enumerate(zip(plan, loader, strict=True)):
            if queue is None:
                queue = _Queue(store, shard, embedder)
            if isinstance(sample, Skipped):
                policy.name([(sample.file, sample.reason)])
                policy.count(0, 1)
            else:
                policy.count(1, 0)
                queue.add(sample)
            bar.update(1)
            if position + 1 == len(plan) or plan[position + 1][0] != shard:
                yield shard, *queue.finish()
                queue = None


class _Queue:
    """Collects crops of several images, embeds a full batch at a time and puts the rows of a shard into their places.

    An image alone rarely fills the device.
    """

    def __init__(self, store: TeacherStore, shard: int, embedder: Embedder) -> None:
        self.store, self.embedder = store, embedder
        self.array = np.full(store.shape(shard), np.nan, np.float16)
        self.waiting: list[Tensor] = []
        self.places: list[np.ndarray] = []
        self.done: list[Tensor] = []

    def add(self, sample: dict[str, Any]) -> None:
        """Crops of an image."""
        cut = sample["crops"] if "crops" in sample else self.embedder.cut(sample["image"], sample["pixels"])
        count = len(cut) // len(self.embedder.options.crop_scales)
        self.places.append(self.store.rows(sample["row"], np.arange(count))[1])
        self.waiting.append(cut)
        batch = self.embedder.options.batch_size
        while sum(map(len, self.waiting)) >= batch:
            whole = torch.cat(self.waiting) if len(self.waiting) > 1 else self.waiting[0]
            self.done.append(self.embedder.raw(whole[:batch]))
            self.waiting = [whole[batch:]]

    def finish(self) -> tuple[np.ndarray, int]:
        """The shard, and how many rows were embedded."""
        rest = torch.cat(self.waiting) if self.waiting else torch.zeros(0)
        if len(rest):
            self.done.append(self.embedder.raw(rest))
        rows = np.concatenate(self.places) if self.places else np.zeros(0, np.int64)
        if len(rows):
            self.array[rows] = self.embedder.combine(torch.cat(self.done)).half().cpu().numpy()
        return self.array, len(rows)
