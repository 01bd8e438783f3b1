"""Batches onto the device: copied once as uint8, then made into the views that student and teachers look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_clip.transform import normalize, resize
from training.data.resample import device_crops, device_image


@dataclass(frozen=True)
class View:
    """What a model wants to see.

    Attributes:
        source: ``"images"`` or ``"crops"``.
        size: side of the square input, pixels.
        mean, std: pixel normalisation (RGB, of values in 0..1).
        dtype: of the pixels.
    """

    source: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: torch.dtype = torch.float32


def prepare_batch(batch: dict[str, Any], views: Mapping[str, View], device: torch.device) -> dict[str, Any]:
    """A collated batch on the device, ready for a method.

    Args:
        batch: see :class:`training.data.collate.Collate`.
        views: what is to be made of its images and crops, by name.

    Returns:
        The batch with each view's name as an entry, ``[B or K, 3, size, size]`` normalised (left out where the batch
        has no crops), ``boxes`` as a list of float32 ``[K_i, 4]`` (in bfloat16 they would move by up to 1.6 pixels),
        other tensors moved, and the rest as it was.
    """
    out = dict(batch)
    images, crops, crop_boxes = (out.pop(name, None) for name in ("images", "crops", "crop_boxes"))
    if isinstance(images, list):
        images = [image.to(device, non_blocking=True) for image in images]
        if crop_boxes is not None:
            crop_boxes = crop_boxes.split(batch["counts"].tolist())
    else:
        images = images.to(device, non_blocking=True)
        crops = None if crops is None else crops.to(device, non_blocking=True)
    for name, view in views.items():
        if view.source == "images":
            pixels = _whole(images, view.size)
        elif crop_boxes is not None:
            parts = [device_crops(i, b, view.size) for i, b in zip(images, crop_boxes, strict=True)]
            pixels = torch.cat(parts)
        elif crops is not None:
            pixels = _resized(crops, view.size)
        else:
            continue
        out[name] = normalize(pixels, view.mean, view.std, view.dtype)
    if "boxes" in batch:
        out["boxes"] = list(batch["boxes"].to(device, torch.float32, non_blocking=True).split(batch["counts"].tolist()))
    for name, value in batch.items():
        if isinstance(value, Tensor) and name not in ("images", "crops", "crop_boxes", "boxes", *_ON_CPU):
            out[name] = value.to(device, non_blocking=True)
    if "answers" in batch:
        out["answers"] = {name: value.to(device, non_blocking=True) for name, value in batch["answers"].items()}
    return out


_ON_CPU = ("counts", "image_ids", "indices")  # only read as numbers


def _whole(images: Tensor | list[Tensor], size: int) -> Tensor:
    """Padded squares ``[B, 3, size, size]`` of values 0..255, from originals or from padded uint8 squares.

    Black borders stay black but for the rim where the kernel reaches into the picture.
    """
    if isinstance(images, list):
        return torch.stack([device_image(image, size) for image in images])
    return _resized(images, size)


def _resized(pixels: Tensor, size: int) -> Tensor:
    return resize(pixels, size, size) if len(pixels) else pixels.new_zeros(0, 3, size, size)


class DevicePrefetcher:
    """Iterates over prepared batches; on CUDA each is copied and prepared on a side stream.

    It may be iterated over again and again, and should be where there are several epochs: its stream has memory of its
    own, which PyTorch gives to no other stream.

    A batch is asked for when the step before is queued whole, backward pass and all, and is made ready while the GPU is
    busy with that. Nothing waits for a batch before the one that is already here is used.

    Args:
        loader: collated batches.
        prepare: collated batch -> prepared batch.
        device: where to.
    """

    def __init__(self, loader: Iterable, prepare: Callable[[dict], dict], device: torch.device) -> None:
        self.loader, self.prepare, self.device = loader, prepare, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[dict]:
        if self.stream is None:
            yield from map(self.prepare, self.loader)
            return
        for batch in self.loader:
            with torch.cuda.stream(self.stream):
                prepared = self.prepare(batch)
            yield self._hand_over(prepared, self.stream.record_event())

    def _hand_over(self, batch: dict, ready: torch.cuda.Event) -> dict:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(ready)
        for tensor in _tensors(batch):
            if tensor.is_cuda:
                tensor.record_stream(current)  # its memory is not reused before the current stream is done
        return batch


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
