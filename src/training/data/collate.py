"""Samples to batches: regions packed end to end, never padded; pixels stay uint8."""

from __future__ import annotations

from typing import Any

import torch

from open_clip.transform import pad_to
from training.data.samples import Sample, Skipped


class Collate:
    """Callable that packs samples (picklable, for worker processes).

    The batch: ``images`` (uint8 ``[B, 3, S, S]``, padded right and bottom; or a list of originals for crops on the
    device), ``boxes`` float32 ``[K, 4]``, ``counts`` int64 ``[B]``, ``crops`` / ``crop_boxes`` / ``labels``
    ``[K, ...]``, ``texts`` ``[B, L]``, ``image_ids``, ``indices``, and ``skipped``: (file, reason) of samples that were left out. A
    batch with nothing left is one black image without regions, so that every process takes part in every step.

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
            return {**batch, "images": torch.stack(images), "texts": torch.stack([s["text"] for s in samples])}
        batch["images"] = images if self.crop_on == "device" else torch.stack(
            [pad_to(image, self.image_size) for image in images]
        )  # fmt: skip
        batch["counts"] = torch.tensor([len(s["boxes"]) for s in samples])
        for name, entry in (("boxes", "boxes"), ("crops", "crops"), ("crop_boxes", "crop_boxes"), ("labels", "labels")):
            if entry in samples[0]:
                batch[name] = torch.cat([s[entry] for s in samples])
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
