"""What a teacher's store is filled from: images with all the crops that training may draw, or whole images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from open_clip.transform import crop_region, resize_longest
from training.data.datasets import RegionDataset
from training.data.prepare import View, prepare_batch
from training.engine.data.samples import Sample, Skipped, stack_padded


class TeacherPictures(Dataset):
    """Pictures of the images of ``source``; a key is an image's row among the annotations' images.

    A sample has ``row`` and ``answers`` (int64 ``[A]``, the rows of the store that its pictures fill). Of crops it has
    ``crops`` as training would make them (a list of uint8 ``[3, n, n]``), or ``image`` and ``crop_boxes`` for crops on
    the device; of images ``image``, as training would have it.
    """

    def __init__(self, source: RegionDataset, kind: str) -> None:
        self.source, self.kind = source, kind

    def __len__(self) -> int:
        return len(self.source.annotations)

    def __getitem__(self, row: int) -> Sample | Skipped:
        source, options = self.source, self.source.options
        image = source.read(row)
        if isinstance(image, Skipped):
            return image
        on_device = options.crop_on == "device"
        if self.kind == "images":
            return {"row": row, "image": image if on_device else resize_longest(image, options.image_size)}
        height, width = image.shape[-2:]
        drawn = source.source.every(row, width, height, source.rng(0, row))
        sample: Sample = {"row": row, "answers": drawn.answers}
        if on_device:
            return {**sample, "image": image, "crop_boxes": torch.from_numpy(drawn.crop_boxes)}
        return {**sample, "crops": [crop_region(image, box, options.crop_size) for box in drawn.crop_boxes]}


class PackPictures:
    """Collates samples of :class:`TeacherPictures` into ``rows``, ``answers``, ``skipped`` and a batch of pictures."""

    def __init__(self, image_size: int, crop_size: int, crop_on: str) -> None:
        self.image_size, self.crop_size, self.on_device = image_size, crop_size, crop_on == "device"

    def __call__(self, samples: list[Sample | Skipped]) -> dict[str, Any]:
        usable = [s for s in samples if not isinstance(s, Skipped)]
        batch: dict[str, Any] = {
            "rows": [s["row"] for s in usable],
            "answers": [s.get("answers") for s in usable],
            "skipped": [tuple(s) for s in samples if isinstance(s, Skipped)],
            "images": torch.zeros(0, 3, self.image_size, self.image_size, dtype=torch.uint8),
        }
        if usable and "image" in usable[0]:
            images = [s["image"] for s in usable]
            batch["images"] = images if self.on_device else stack_padded(images, self.image_size)
        if usable and "crop_boxes" in usable[0]:
            batch["counts"] = torch.tensor([len(s["crop_boxes"]) for s in usable])
            batch["crop_boxes"] = torch.cat([s["crop_boxes"] for s in usable])
        elif usable and "crops" in usable[0]:
            batch["crops"] = stack_padded([crop for s in usable for crop in s["crops"]], self.crop_size)
        return batch


def pictures_of(batch: dict[str, Any], view: View, device: torch.device) -> Tensor:
    """The pictures of a batch of :class:`PackPictures` as a teacher's view wants them, on the device."""
    return prepare_batch({k: v for k, v in batch.items() if k != "answers"}, {"view": view}, device)["view"]
