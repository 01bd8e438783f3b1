"""Samples to batches: regions packed end to end, never padded; pixels stay uint8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from open_clip.transform import detection_size
from training.engine.data.samples import Sample, Skipped, reach, stack_padded


class Collate:
    """Callable that packs samples (picklable, for worker processes).

    The batch: ``images`` (uint8 ``[B, 3, S, S]``, padded right and bottom; or a list of originals for crops on the
    device), ``sizes`` (per image the pixels (height, width) that it takes of its square), ``reach`` (the same of it and
    of its boxes), ``boxes`` float32 ``[K, 4]``, ``counts`` int64 ``[B]``, ``crops`` / ``crop_boxes`` / ``labels``
    ``[K, ...]``, ``texts`` ``[B, L]``, ``answers`` (kept answers of teachers by name, ``[K, D]`` or ``[B, N, D]``),
    extras (see :mod:`training.data.extras`; ``NAME`` ``[M, ...]`` and ``NAME_of`` ``[M]``), ``image_ids``, ``indices``,
    ``samples`` (the number of usable ones) and ``skipped``: (file, reason) of those left out. A batch with nothing left
    is one black image without regions, so that every process takes part in every step.

    Args:
        image_size: side S.
        crop_size: side of a crop.
        crop_on: ``"worker"`` or ``"device"``.
        empty: further entries of a batch with nothing left, each with no rows (``labels``, ``crops``, ...).
        units: what the values of each extra belong to: ``"image"`` or ``"region"``.
        regions: False for whole images with a text.
    """

    def __init__(
        self,
        *,
        image_size: int,
        crop_size: int,
        crop_on: str = "worker",
        empty: Mapping[str, Tensor] | None = None,
        units: Mapping[str, str] | None = None,
        regions: bool = True,
    ) -> None:
        self.image_size, self.crop_size, self.regions = image_size, crop_size, regions
        self.on_device = crop_on == "device" and regions
        self.empty, self.units = dict(empty or {}), dict(units or {})

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
            "images": images if self.on_device else stack_padded(images, self.image_size),
        }
        if "text" in samples[0]:
            batch["texts"] = torch.stack([s["text"] for s in samples])
        if "boxes" in samples[0]:
            batch["counts"] = torch.tensor([len(s["boxes"]) for s in samples])
            side = self.image_size
            batch["sizes"] = [detection_size(*image.shape[-2:], side)[:2] for image in images]
            batch["reach"] = [reach(own, s["boxes"], side) for own, s in zip(batch["sizes"], samples, strict=True)]
        if "crops" in samples[0]:
            batch["crops"] = stack_padded([crop for s in samples for crop in s["crops"]], self.crop_size)
        for name in ("boxes", "crop_boxes", "labels"):
            if name in samples[0]:
                batch[name] = torch.cat([s[name] for s in samples])
        if "answers" in samples[0]:
            parts = {name: [s["answers"][name] for s in samples] for name in samples[0]["answers"]}
            batch["answers"] = {name: torch.cat(part) for name, part in parts.items()}
        for name, unit in self.units.items():
            batch |= _packed(name, [s[name] for s in samples], batch["counts"].tolist() if unit == "region" else None)
        return batch

    def _empty(self) -> dict[str, Any]:
        black = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8)
        none = torch.zeros(0, dtype=torch.int64)
        batch: dict[str, Any] = {"images": black, "image_ids": none, "indices": none, **self.empty}
        batch |= {f"{name}_of": none for name in self.units}
        if not self.regions:
            return {**batch, "images": black[:0]}
        batch |= {"boxes": torch.zeros(0, 4), "counts": torch.zeros(1, dtype=torch.int64)}
        batch["sizes"] = batch["reach"] = [(self.image_size, self.image_size)]
        return {**batch, "images": [black[0]]} if self.on_device else batch


def _packed(name: str, parts: Sequence[tuple[Tensor, Tensor]], counts: Sequence[int] | None) -> dict[str, Tensor]:
    """Values of all samples, and what they belong to counted over the batch; ``counts`` of units, None for 1 each."""
    starts = [0, *accumulate(counts if counts is not None else [1] * len(parts))]
    owners = [of + start for (_, of), start in zip(parts, starts, strict=False)]
    return {name: torch.cat([values for values, _ in parts]), f"{name}_of": torch.cat(owners)}
