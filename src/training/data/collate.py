"""Samples to batches: regions packed end to end, never padded; pixels stay uint8."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from training.data.samples import Sample, Skipped


def stack_padded(images: Sequence[Tensor], size: int) -> Tensor:
    """Images uint8 ``[3, h_i, w_i]``, padded right and bottom with black: ``[B, 3, size, size]``.

    The colour channel is innermost in memory, as decoders and resizing leave it. In a loader's worker the batch lies in
    shared memory from the start, which saves a copy on its way to the training process.
    """
    shape = (len(images), size, size, 3)
    if get_worker_info() is None:
        batch = torch.zeros(shape, dtype=torch.uint8)
    else:  # as torch's own collate does; new shared memory is zero
        storage = torch.UntypedStorage._new_shared(math.prod(shape))
        batch = torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
    batch = batch.permute(0, 3, 1, 2)
    for square, image in zip(batch, images, strict=True):
        square[:, : image.shape[1], : image.shape[2]] = image
    return batch


class Collate:
    """Callable that packs samples (picklable, for worker processes).

    The batch: ``images`` (uint8 ``[B, 3, S, S]``, padded right and bottom; or a list of originals for crops on the
    device), ``boxes`` float32 ``[K, 4]``, ``counts`` int64 ``[B]``, ``crops`` / ``crop_boxes`` / ``labels`` /
    ``teacher_features`` ``[K, ...]``, ``texts`` ``[B, L]``, ``image_ids``, ``indices``, ``samples`` (the number of
    usable ones) and ``skipped``: (file, reason) of those left out. A batch with nothing left is one black image without
    regions, so that every process takes part in every step.

    Args:
        image_size: side S.
        crop_size: side of a crop.
        crop_on: ``"worker"`` or ``"device"``.
        kind: dataset type; says which entries an empty batch has.
    """

    def __init__(self, *, image_size: int, crop_size: int, crop_on: str, kind: str, context_length: int = 0) -> None:
        self.image_size, self.crop_size, self.crop_on, self.kind = image_size, crop_size, crop_on, kind
        self.context_length = context_length

    def __call__(self, samples: list[Sample | Skipped]) -> dict[str, Any]:
        usable = [s for s in samples if not isinstance(s, Skipped)]
        batch = self._pack(usable) if usable else self._empty()
        batch["skipped"] = [tuple(s) for s in samples if isinstance(s, Skipped)]
        batch["samples"] = len(usable)
        return batch

    def _pack(self, samples: list[Sample]) -> dict[str, Any]:
        images = [s["image"] for s in samples]
        batch: dict[str, Any] = {
            "image_ids": torch.tensor([s["image_id"] for s in samples]),
            "indices": torch.tensor([s["index"] for s in samples]),
        }
        if self.kind == "contrastive":
            texts = torch.stack([s["text"] for s in samples])
            return {**batch, "images": stack_padded(images, self.image_size), "texts": texts}
        batch["images"] = images if self.crop_on == "device" else stack_padded(images, self.image_size)
        batch["counts"] = torch.tensor([len(s["boxes"]) for s in samples])
        if "crops" in samples[0]:
            batch["crops"] = stack_padded([crop for s in samples for crop in s["crops"]], self.crop_size)
        for name in ("boxes", "crop_boxes", "labels", "teacher_features"):
            if name in samples[0]:
                batch[name] = torch.cat([s[name] for s in samples])
        return batch

    def _empty(self) -> dict[str, Any]:
        black = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8)
        none = torch.zeros(0, dtype=torch.int64)
        batch: dict[str, Any] = {"images": black, "image_ids": none, "indices": none}
        if self.kind == "contrastive":
            return {**batch, "images": black[:0], "texts": torch.zeros(0, self.context_length, dtype=torch.int64)}
        batch |= {"boxes": torch.zeros(0, 4), "counts": torch.zeros(1, dtype=torch.int64)}
        if self.kind == "region_clip":
            batch["labels"] = none
        elif self.crop_on == "device":
            batch["crop_boxes"] = torch.zeros(0, 4)
        else:
            batch["crops"] = torch.zeros(0, 3, self.crop_size, self.crop_size, dtype=torch.uint8)
        if self.crop_on == "device":
            batch["images"] = [black[0]]
        return batch
