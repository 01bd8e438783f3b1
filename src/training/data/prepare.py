"""Batches onto the device: copied as uint8, resized or cropped there if asked, normalised there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from open_clip.transform import normalize
from training.data.resample import device_crops, device_image


def prepare_batch(
    batch: dict[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
    crop_size: int,
) -> dict[str, Any]:
    """A collated batch on the device, ready for a method.

    Args:
        batch: see :class:`training.data.collate.Collate`.
        dtype: of the images and crops. Boxes are always float32: in bfloat16 they would move by up to 1.6 pixels.
        image_size, crop_size: sides, for batches whose images and crops are made on the device.

    Returns:
        The batch with ``images`` ``[B, 3, S, S]`` and ``crops`` ``[K, 3, n, n]`` normalised in ``dtype``, ``boxes`` as
        a list of float32 ``[K_i, 4]``, other tensors moved, and the rest as it was.
    """
    out = dict(batch)
    images = batch["images"]
    if isinstance(images, list):
        originals = [image.to(device, non_blocking=True) for image in images]
        pixels = torch.stack([device_image(image, image_size) for image in originals])
        if "crop_boxes" in batch:
            boxes = batch["crop_boxes"].split(batch["counts"].tolist())
            crops = torch.cat([device_crops(i, b, crop_size) for i, b in zip(originals, boxes, strict=True)])
            out["crops"] = normalize(crops, mean, std, dtype)
            del out["crop_boxes"]
    else:
        pixels = images.to(device, non_blocking=True)
        if "crops" in batch:
            out["crops"] = normalize(batch["crops"].to(device, non_blocking=True), mean, std, dtype)
    out["images"] = normalize(pixels, mean, std, dtype)
    if "boxes" in batch:
        out["boxes"] = list(batch["boxes"].to(device, torch.float32, non_blocking=True).split(batch["counts"].tolist()))
    for name in ("labels", "texts", "teacher_features"):
        if batch.get(name) is not None:
            out[name] = batch[name].to(device, non_blocking=True)
    return out


class DevicePrefetcher:
    """Iterates over prepared batches, one ahead: on CUDA the next one is copied and prepared on a side stream.

    Args:
        loader: collated batches.
        prepare: collated batch -> prepared batch.
        device: where to.
    """

    def __init__(self, loader: Iterable, prepare: Callable[[dict], dict], device: torch.device) -> None:
        self.loader, self.prepare, self.device = loader, prepare, device

    def __iter__(self) -> Iterator[dict]:
        if self.device.type != "cuda":
            yield from map(self.prepare, self.loader)
            return
        stream = torch.cuda.Stream(self.device)
        ahead = None
        for batch in self.loader:
            with torch.cuda.stream(stream):
                following = self.prepare(batch)
            if ahead is not None:
                yield self._hand_over(*ahead)
            ahead = (following, stream.record_event())
        if ahead is not None:
            yield self._hand_over(*ahead)

    def _hand_over(self, batch: dict, ready: torch.cuda.Event) -> dict:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(ready)
        for value in batch.values():
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, Tensor) and tensor.is_cuda:
                    tensor.record_stream(current)  # its memory is not reused before the current stream is done
        return batch
