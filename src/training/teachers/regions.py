"""All regions of an image that training may draw, with their crops: what a teacher cache is filled from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from open_clip.transform import crop_region
from training.data.collate import stack_padded
from training.data.datasets import MIN_SIDE, ProposalsDistill
from training.data.proposals import eligible, proposal_regions
from training.data.resample import device_crops
from training.data.samples import Sample, Skipped
from training.engine.data.images import ImageError, read_image, resolve


class TeacherRegions(Dataset):
    """Regions of the images of ``source``; a key is an image's row among the annotations' images.

    A sample has ``row``, ``drawn`` (int64 ``[A]``, the annotations within the size limits), ``stand_in`` (whether the
    region that replaces unusable ones comes last) and ``crops``, as training would make them: a list of uint8
    ``[3, n, n]``; or ``image`` and ``crop_boxes`` for crops on the device.
    """

    def __init__(self, source: ProposalsDistill) -> None:
        self.annotations, self.root, self.options = source.annotations, source.root, source.options

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, row: int) -> Sample | Skipped:
        name, options = self.annotations.file_name(row), self.options
        try:
            image = read_image(resolve(self.root, name))
        except ImageError as error:
            return Skipped(error.file, error.reason)
        height, width = image.shape[-2:]
        if min(height, width) < MIN_SIDE:
            return Skipped(name, f"the image has {width} x {height} pixels")
        annotated = self.annotations.boxes[self.annotations.of(row)]
        drawn = np.flatnonzero(eligible(annotated, options.min_size, options.max_size))
        # Training meets the region that stands in only where a draw can come out empty.
        stand_in = len(drawn) < max(len(annotated), 1)
        _, boxes = proposal_regions(annotated, drawn, width, height)
        if stand_in and len(drawn):
            boxes = np.concatenate([boxes, proposal_regions(annotated, drawn[:0], width, height)[1]])
        sample: Sample = {"row": row, "drawn": drawn, "stand_in": stand_in, "count": len(boxes)}
        if options.crop_on == "device":
            return {**sample, "image": image, "crop_boxes": torch.from_numpy(boxes)}
        return {**sample, "crops": [crop_region(image, box, options.crop_size) for box in boxes]}


class PackRegions:
    """Collates samples of :class:`TeacherRegions`.

    A batch has ``regions`` (a list of row, drawn, stand_in, count), ``crops`` in one uint8 tensor or ``sources`` (image
    and boxes of each), and ``skipped``.
    """

    def __init__(self, crop_size: int) -> None:
        self.crop_size = crop_size

    def __call__(self, samples: list[Sample | Skipped]) -> dict[str, Any]:
        usable = [s for s in samples if not isinstance(s, Skipped)]
        batch: dict[str, Any] = {
            "regions": [(s["row"], s["drawn"], s["stand_in"], s["count"]) for s in usable],
            "skipped": [tuple(s) for s in samples if isinstance(s, Skipped)],
        }
        if usable and "image" in usable[0]:
            return {**batch, "sources": [(s["image"], s["crop_boxes"]) for s in usable]}
        return {**batch, "crops": stack_padded([crop for s in usable for crop in s["crops"]], self.crop_size)}


def crops_of(batch: dict[str, Any], crop_size: int, device: torch.device) -> Tensor:
    """Crops ``[K, 3, n, n]`` of values 0..255 of a batch of :class:`PackRegions`, on the device."""
    if "sources" not in batch:
        return batch["crops"].to(device, non_blocking=True)
    return torch.cat([device_crops(i.to(device, non_blocking=True), b, crop_size) for i, b in batch["sources"]])
