"""From pictures to a model's dense input and back: pixels of the original image in, maps of its size out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from .transform import normalize, pad_to, resize
from .whole_images import INTERPOLATIONS

_MODES = ("pad", "stretch")


@dataclass(frozen=True)
class Placement:
    """Where an original image lies in a dense input.

    A point (x, y) of the original, in pixels, is at ``(x, y) * scale + offset`` of the input.

    Attributes:
        size: (height, width) of the original.
        scale: (x, y) factors.
        offset: (x, y) shift in pixels of the input.
        inner: (height, width) that the image takes in the input; the rest is padding.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]
    inner: tuple[int, int]


@dataclass(frozen=True)
class DenseInput:
    """A batch for dense and region calls, which knows where its images came from.

    Attributes:
        image: normalised float32 ``[B, 3, H, W]``, for ``encode_dense``, ``encode_pseudo_boxes``, ``encode_masks``.
        placements: one :class:`Placement` per image.
        patch_size: pixels of a cell.
    """

    image: Tensor
    placements: tuple[Placement, ...]
    patch_size: int

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> DenseInput:
        """The same with its images on a device (and in a type)."""
        return DenseInput(self.image.to(device, dtype), self.placements, self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Cells (h, w) of the dense map."""
        return self.image.shape[-2] // self.patch_size, self.image.shape[-1] // self.patch_size

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels that each image takes of the input, for the ``sizes`` of dense and region calls."""
        return [place.inner for place in self.placements]

    def _each(self, values: Sequence | Tensor, what: str) -> list:
        if len(values) != len(self.placements):
            raise ValueError(f"{len(values)} {what} for {len(self.placements)} images: give one (possibly empty) each")
        return list(values)

    def normed_boxes(self, boxes: Sequence[Tensor | Sequence]) -> list[Tensor]:
        """Boxes of the originals as the model takes them.

        Args:
            boxes: one ``[K_i, 4]`` (or list of boxes) per image, xyxy in pixels of the original.

        Returns:
            One float32 ``[K_i, 4]`` per image, in 0..1 of the input, on the images' device.

        Raises:
            ValueError: another count or shape, reversed corners, or a box outside its image.
        """
        height, width = self.image.shape[-2:]
        out = []
        for i, (box, place) in enumerate(zip(self._each(boxes, "lists of boxes"), self.placements, strict=True)):
            box = torch.as_tensor(np.asarray(box) if not isinstance(box, Tensor) else box, dtype=torch.float32).cpu()
            box = box.reshape(-1, 4) if box.numel() == 0 else box
            if box.dim() != 2 or box.shape[1] != 4:
                raise ValueError(f"the boxes of image {i} have shape {tuple(box.shape)}: give [K, 4]")
            limit = torch.tensor([place.size[1], place.size[0]] * 2)
            if (box[:, 2:] < box[:, :2]).any():
                raise ValueError(f"boxes of image {i} have reversed corners: give x1, y1, x2, y2 in pixels")
            if ((box[:, 2:] <= 0) | (box[:, :2] >= limit[:2])).any():
                raise ValueError(f"boxes of image {i} lie outside it ({place.size[1]}x{place.size[0]} pixels)")
            box = box * torch.tensor(place.scale * 2) + torch.tensor(place.offset * 2)
            out.append((box / torch.tensor([width, height] * 2)).to(self.image.device))
        return out

    def pixel_boxes(self, normed_boxes: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of :meth:`normed_boxes`: boxes in pixels of the originals."""
        height, width = self.image.shape[-2:]
        out = []
        for box, place in zip(self._each(normed_boxes, "lists of boxes"), self.placements, strict=True):
            box = box.float() * box.new_tensor([width, height] * 2, dtype=torch.float32)
            offset, scale = (box.new_tensor(v * 2) for v in (place.offset, place.scale))
            out.append((box - offset) / scale)
        return out

    def cell_masks(self, masks: Sequence[Tensor | np.ndarray]) -> list[Tensor]:
        """Masks of the originals on the grid of cells, for ``encode_masks``.

        Args:
            masks: one bool ``[K_i, height, width]`` per image, of the original's size.

        Returns:
            One bool ``[K_i, h, w]`` per image: cells of which the mask covers at least half, or, for a mask that covers
            half of none, the cell that it covers most.

        Raises:
            ValueError: another count or size, or a mask without a pixel.
        """
        out = []
        for i, (mask, place) in enumerate(zip(self._each(masks, "lists of masks"), self.placements, strict=True)):
            mask = torch.as_tensor(mask).to(self.image.device).float()
            if mask.dim() != 3 or tuple(mask.shape[-2:]) != place.size:
                raise ValueError(
                    f"the masks of image {i} have shape {tuple(mask.shape)}: give [K, {place.size[0]}, {place.size[1]}]"
                )
            if len(mask) and not mask.flatten(1).any(1).all():
                raise ValueError(f"a mask of image {i} has no pixel: leave it out")
            share = F.interpolate(mask[:, None], size=place.inner, mode="area")[:, 0] if len(mask) else mask
            canvas = share.new_zeros(len(mask), *self.image.shape[-2:])
            left, top = (round(v) for v in place.offset)
            canvas[:, top : top + place.inner[0], left : left + place.inner[1]] = share if len(mask) else 0
            cells = (
                F.avg_pool2d(canvas[:, None], self.patch_size)[:, 0] if len(mask) else canvas.new_zeros(0, *self.grid)
            )
            most = cells.flatten(1).amax(1)[:, None, None] if len(mask) else cells
            out.append((cells >= 0.5) | ((most < 0.5) & (cells == most)))
        return out

    def restore(self, maps: Tensor, size: str | tuple[int, int] = "original") -> list[Tensor]:
        """Dense maps without the padding, each at the size of its original.

        Args:
            maps: ``[B, C, h, w]`` on the grid of cells (or any multiple of it). With many channels this takes C times
                the memory of the image in float32: reduce to what is looked at first, such as similarities.
            size: ``"original"``, ``"cells"`` (cut to the cells that the image touches), or (height, width).

        Returns:
            One ``[C, height, width]`` per image, bilinear.
        """
        out = []
        input_height, input_width = self.image.shape[-2:]
        for one, place in zip(self._each(maps, "maps"), self.placements, strict=True):
            h, w = one.shape[-2:]
            # Exact places of the image's border on the map, which need not be on a border of cells.
            y, x = h / input_height, w / input_width
            top, left = place.offset[1] * y, place.offset[0] * x
            bottom, right = top + place.inner[0] * y, left + place.inner[1] * x
            if size == "cells":
                out.append(one[:, int(top) : -int(-bottom // 1), int(left) : -int(-right // 1)])
                continue
            target = place.size if size == "original" else tuple(size)
            out.append(_sample(one, (top, bottom), (left, right), target))
        return out


def _sample(one: Tensor, rows: tuple[float, float], columns: tuple[float, float], size: tuple[int, int]) -> Tensor:
    """Bilinear samples of a map ``[C, h, w]`` at the pixel centres of a window given in cells: ``[C, *size]``."""
    h, w = one.shape[-2:]
    centres = []
    for (start, end), count, cells in ((rows, size[0], h), (columns, size[1], w)):
        place = start + (torch.arange(count, device=one.device, dtype=torch.float32) + 0.5) * ((end - start) / count)
        centres.append(place * (2 / cells) - 1)  # -1 and 1 are the outer borders of the map
    y, x = torch.meshgrid(*centres, indexing="ij")
    grid = torch.stack([x, y], dim=-1)[None]
    sampled = F.grid_sample(one[None].float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled[0].to(one.dtype)


class DenseTransform:
    """Pictures to :class:`DenseInput`; see :func:`dense_transform`."""

    def __init__(
        self,
        size: int,
        patch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        mode: str = "pad",
        interpolation: str = "bicubic",
    ) -> None:
        if mode not in _MODES:
            raise ValueError(f'mode is "{mode}": use {" or ".join(_MODES)}')
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f'interpolation is "{interpolation}": use {" or ".join(INTERPOLATIONS)}')
        if size < patch_size or size % patch_size:
            below = max(size // patch_size, 1) * patch_size
            raise ValueError(f"size is {size}: give a multiple of the patch size {patch_size}, such as {below}")
        self.size, self.patch_size, self.mode, self.interpolation = size, patch_size, mode, interpolation
        self.mean, self.std = tuple(mean), tuple(std)

    def __repr__(self) -> str:
        return f"DenseTransform(size={self.size}, patch_size={self.patch_size}, mode={self.mode!r})"

    def __call__(self, images: Image.Image | np.ndarray | Tensor | Sequence) -> DenseInput:
        """One picture or several.

        Args:
            images: PIL image, uint8 array ``[H, W, 3]``, uint8 tensor ``[3, H, W]``; a list of these, of any sizes; or
                a uint8 batch ``[B, 3, H, W]``.

        Raises:
            TypeError, ValueError: something else, or nothing.
        """
        one = isinstance(images, (Image.Image, np.ndarray)) or (isinstance(images, Tensor) and images.dim() == 3)
        pixels = [_pixels(image, i) for i, image in enumerate([images] if one else images)]
        if not pixels:
            raise ValueError("there are no images: give at least one")
        placed = [self._place(image) for image in pixels]
        batch = torch.stack([image for image, _ in placed])
        image = normalize(batch, self.mean, self.std).contiguous()
        return DenseInput(image, tuple(place for _, place in placed), self.patch_size)

    def _place(self, image: Tensor) -> tuple[Tensor, Placement]:
        height, width = image.shape[-2:]
        if self.mode == "stretch":
            inner = (self.size, self.size)
        else:
            scale = self.size / max(height, width)
            inner = (max(round(height * scale), 1), max(round(width * scale), 1))
        resized = pad_to(resize(image, *inner, self.interpolation), self.size)
        scales = (inner[1] / width, inner[0] / height)
        return resized, Placement(size=(height, width), scale=scales, offset=(0.0, 0.0), inner=inner)


def _pixels(image: object, index: int) -> Tensor:
    """A picture as uint8 ``[3, H, W]``."""
    if isinstance(image, Image.Image):
        return TF.pil_to_tensor(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise TypeError(f"image {index} is an array {image.dtype} {image.shape}: give uint8 [H, W, 3], RGB")
        return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    if isinstance(image, Tensor):
        if image.dim() != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
            kind = str(image.dtype).removeprefix("torch.")
            raise TypeError(f"image {index} is a tensor {kind} {tuple(image.shape)}: give uint8 [3, H, W], RGB")
        return image
    raise TypeError(f"image {index} is a {type(image).__name__}: give a PIL image, an array or a tensor")


def dense_transform(
    model: nn.Module, size: int | None = None, mode: str = "pad", interpolation: str = "bicubic"
) -> DenseTransform:
    """Preparation of pictures for a model's dense and region calls, as in training and evaluation.

    ::

        prepare = open_clip.dense_transform(model, 1024)
        inputs = prepare(Image.open("street.jpg"))                    # or a list of images
        regions = model.encode_pseudo_boxes(inputs.image, inputs.normed_boxes([[(40, 30, 200, 180)]]), normalize=True)
        similar = torch.einsum("bdhw,cd->bchw", model.encode_dense(inputs.image, keep_shape=True), classes)
        heat = inputs.restore(similar)[0]                             # [C, height, width] of the photograph

    EXIF rotations are not applied: pass ``ImageOps.exif_transpose(image)`` where boxes are meant that way.

    Args:
        model: a model of :func:`create_model`, or its image tower.
        size: side of the square input in pixels; the multiple of the patch nearest to 1024 when None.
        mode: ``"pad"`` (longest side to ``size``, zeros on the right and at the bottom) or ``"stretch"`` (both sides
            to ``size``).
        interpolation: ``"bicubic"`` or ``"bilinear"``, with antialias.

    Raises:
        ValueError: a size that is no multiple of the patch, or an unknown mode.
    """
    visual = getattr(model, "visual", model)
    patch = visual.patch_size
    side = round(1024 / patch) * patch if size is None else size
    return DenseTransform(side, patch, visual.image_mean, visual.image_std, mode, interpolation)
