"""Open-vocabulary region classification: mean accuracy of boxes, masks and crops on COCO panoptic.

Three predictions per segment, each the class whose text embedding is nearest by cosine: ``rois`` (RoIAlign of the dense
map), ``maskpool`` (mean of the dense map over the mask) and ``crops`` (global embedding of the segment's crop, what the
dense embeddings are distilled from). Boxes and masks share one dense pass per input size; crops do not depend on it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from open_clip.transform import normalize
from training.engine.distributed import all_reduce_sum
from training.engine.errors import UserError
from training.evaluation.metrics import KINDS, TOP_K, MeanAccuracy, SegmentRows, topk_correct
from training.evaluation.panoptic import MAX_SIZE, MIN_SIZE

logger = logging.getLogger(__name__)

CROP_CHUNK = {"cuda": 256}  # crops per forward pass, by kind of device; small images fill a GPU only in large numbers
CROP_CHUNK_DEFAULT = 32
NAMED_SKIPS = 10  # unusable images named in the log; the others are counted


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    eval_data: Any,
    class_embeddings: Tensor,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
    per_class_file: str | Path | None = None,
    rows: SegmentRows | None = None,
) -> dict[str, float]:
    """Mean accuracy of a model over an evaluation set; every process calls it and gets the same result.

    Args:
        model: ``visual.image_mean``, ``visual.image_std``, ``encode_image`` and ``encode_regions`` are used. It is in
            eval mode during the call and as before afterwards.
        eval_data: ``training.evaluation.panoptic.EvalData``, this process's share of the images.
        class_embeddings: float ``[C, D]``, unit length, in the order of ``eval_data.class_names``.
        device: where to compute; the model is there already.
        dtype: autocast dtype; float32 for none. Cosines are computed in float32.
        rank, world_size: this process and how many there are. Only process 0 shows progress and writes.
        progress: show a progress bar.
        per_class_file: json file for the accuracy of each class.
        rows: filled with what was said of each segment of this process.

    Returns:
        Accuracies in 0..1 by name, ``{rois,maskpool,crops}.{thing,stuff}.macc{1,5}``. With several input sizes those of
        rois and maskpool begin with the size (``512.rois.thing.macc1``). A kind without segments has no key. Also
        ``count.images``, ``count.thing``, ``count.stuff`` (segments) and ``count.skipped`` (images).

    Raises:
        UserError: more images were unusable than ``eval_data.max_skipped`` allows, or no segment at all was found.
    """
    device = torch.device(device)
    embeddings = F.normalize(class_embeddings.to(device, torch.float32), dim=-1)
    if len(embeddings) != len(eval_data.class_names):
        raise ValueError(f"{len(embeddings)} class embeddings for {len(eval_data.class_names)} classes")
    counters: dict[str, MeanAccuracy] = {}
    totals = torch.zeros(3, dtype=torch.int64)  # images, skipped images, annotated segments without a pixel
    skipped: list[tuple[str, str]] = []

    def count(name: str, features: Tensor, labels: Tensor, is_thing: Tensor) -> None:
        correct = topk_correct(features.float() @ embeddings.T, labels, TOP_K)
        counters[name].update(correct, labels, is_thing)
        if rows is not None:
            rows.add(name, correct)

    sizes = list(eval_data.image_sizes)
    region_names = {
        size: [f"{size}.{kind}" if len(sizes) > 1 else kind for kind in ("rois", "maskpool")] for size in sizes
    }
    # Made beforehand, so that a process without images takes part in the sums.
    for name in [*itertools.chain(*region_names.values()), "crops"]:
        counters[name] = MeanAccuracy(len(embeddings), device=device)
    crops = _CropQueue(model, device, dtype, lambda *args: count("crops", *args))

    with eval_mode(model), _bar(eval_data, progress and rank == 0) as bar:
        for batch in eval_data.loader:
            skipped += batch["skipped"]
            counts = batch["counts"].tolist()
            totals += torch.tensor([len(counts), len(batch["skipped"]), batch["absent_segments"]])
            if counts:
                labels, is_thing = (batch[key].to(device, non_blocking=True) for key in ("labels", "is_thing"))
                if rows is not None:
                    ids = batch["image_ids"].repeat_interleave(batch["counts"])
                    rows.add_segments(ids, batch["labels"], batch["is_thing"])
                for size in sizes:
                    boxes, masks = (
                        batch[key][size].to(device, non_blocking=True).split(counts) for key in ("boxes", "masks")
                    )
                    with autocast(device, dtype):
                        pixels = pixels_of(model, batch["images"][size], device)
                        where = batch["sizes" if getattr(model.visual, "drop_padding", False) else "reach"][size]
                        features = model.encode_regions(pixels, boxes, masks, normalize=True, sizes=where)
                    for name, feature in zip(region_names[size], features, strict=True):
                        count(name, feature, labels, is_thing)
                crops.add(batch["crops"], labels, is_thing)
            bar.update(len(counts) + len(batch["skipped"]))
        crops.flush()

    totals = all_reduce_sum(totals.to(device)).tolist()
    for counter in counters.values():
        counter.reduce()
    segments = counters["crops"].num_segments()
    _report_skipped(eval_data, skipped, totals)
    if not sum(segments.values()):
        raise UserError(f"{eval_data.annotation_file}: no segment of {MIN_SIZE} to {MAX_SIZE} pixels in it")
    results = {f"{name}.{key}": value for name, counter in counters.items() for key, value in counter.compute().items()}
    if per_class_file is not None and rank == 0:
        records = {name: counter.per_class(eval_data.class_names) for name, counter in counters.items()}
        Path(per_class_file).write_text(json.dumps(records, indent=1) + "\n")
    return {
        **results,
        "count.images": totals[0],
        "count.skipped": totals[1],
        **{f"count.{kind}": segments[kind] for kind in KINDS},
    }


class _CropQueue:
    """Collects crops of several images and batches, and embeds them in passes of equal size."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype, count: Any) -> None:
        self.model, self.device, self.dtype, self.count = model, device, dtype, count
        self.chunk = CROP_CHUNK.get(device.type, CROP_CHUNK_DEFAULT)
        self.waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self.length = 0

    def add(self, crops: Tensor, labels: Tensor, is_thing: Tensor) -> None:
        """Add uint8 ``[K, 3, n, n]`` with their labels and kinds."""
        self.waiting.append((crops.to(self.device, non_blocking=True), labels, is_thing))
        self.length += len(crops)
        if self.length >= self.chunk:
            self._embed(self.length - self.length % self.chunk)

    def flush(self) -> None:
        """Embed what is left."""
        if self.length:
            self._embed(self.length)

    def _embed(self, number: int) -> None:
        crops, labels, is_thing = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
        for start in range(0, number, self.chunk):
            part = slice(start, min(start + self.chunk, number))
            with autocast(self.device, self.dtype):
                features = self.model.encode_image(pixels_of(self.model, crops[part], self.device), normalize=True)
            self.count(features, labels[part], is_thing[part])
        self.waiting = [(crops[number:], labels[number:], is_thing[number:])]
        self.length -= number


def pixels_of(model: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """uint8 ``[B, 3, H, W]`` to the model's normalised input on its device."""
    weight = next(model.parameters(), None)
    dtype = torch.float32 if weight is None else weight.dtype  # a model cast as a whole takes its own dtype
    images = images.to(device, non_blocking=True)
    return normalize(images, model.visual.image_mean, model.visual.image_std, dtype=dtype)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to a dtype; none for float32."""
    return torch.autocast(device.type, dtype=dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for the time being; afterwards each module (frozen parts may differ) is as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _bar(eval_data: Any, show: bool) -> tqdm:
    return tqdm(total=eval_data.num_local_images, desc="evaluate", unit="img", disable=not show, leave=False)


def _report_skipped(eval_data: Any, skipped: list[tuple[str, str]], totals: list[int]) -> None:
    """Name this process's unusable images in the log; stop when they are too many over all processes."""
    for file, reason in skipped[:NAMED_SKIPS]:
        logger.warning("skipped %s: %s", file, reason)
    if len(skipped) > NAMED_SKIPS:
        logger.warning("skipped %d more images", len(skipped) - NAMED_SKIPS)
    images, bad, absent = totals
    if absent:
        logger.warning("%s: %d segments have no pixel in their PNG", eval_data.annotation_file, absent)
    if bad > eval_data.max_skipped * (images + bad):
        example = f" (for example {skipped[0][0]}: {skipped[0][1]})" if skipped else ""
        raise UserError(
            f"{eval_data.annotation_file}: {bad} of {images + bad} images could not be used{example}, more than the "
            f"share {eval_data.max_skipped:g} of --max-skipped; mend the data or raise the share"
        )


def format_table(results: Mapping[str, float]) -> str:
    """The results of :func:`evaluate` as a table in per cent, one line per kind of prediction and input size.

    A kind without segments shows "-".
    """
    columns = [(f"{kind} top-{k}", f"{kind}.macc{k}") for kind in KINDS for k in TOP_K]
    lines, names = [], []
    for key in results:
        name = key.rsplit(".", 2)[0]
        if not key.startswith("count.") and name not in names:
            names.append(name)
    width = max([len("prediction"), *(len(_row_title(name)) for name in names)])
    lines.append("  ".join([f"{'mAcc (%)':<{width}}", *(f"{title:>11}" for title, _ in columns)]))
    for name in names:
        cells = (
            f"{100 * results[k]:11.2f}" if (k := f"{name}.{key}") in results else f"{'-':>11}" for _, key in columns
        )
        lines.append("  ".join([f"{_row_title(name):<{width}}", *cells]))
    if "count.images" in results:
        images, things, stuff, skipped = (
            int(results[f"count.{key}"]) for key in ("images", "thing", "stuff", "skipped")
        )
        line = f"{images} images, {things} thing and {stuff} stuff segments"
        lines.append(line + (f"; {skipped} images skipped" if skipped else ""))
    return "\n".join(lines)


def _row_title(name: str) -> str:
    size, _, kind = name.rpartition(".")
    return f"{kind} at {size}" if size else kind
