"""What the public calls demand of images, texts, boxes and masks, each said in one sentence.

Shapes and types are looked at always, which costs nothing. Values are looked at where that costs nothing either: in
ordinary tensors on the CPU. On another device it would halt the queue, and while a graph is traced there are no values.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

#: Coordinates may leave the image by as much as random shifts and rounding do; pixels leave it by more.
_BOX_MARGIN = 1.0


def values_are_at_hand(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be read without waiting for a device or breaking a traced graph."""
    ordinary = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"
    return ordinary and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def _describe(value: object) -> str:
    kind = type(value).__name__
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value):
        return f"a {kind} of {type(value[0]).__name__}"
    return f"a {kind}"


def check_images(image: Tensor) -> None:
    """Refuse what is not a normalised float batch ``[B, 3, H, W]``. TypeError or ValueError in one sentence."""
    if not isinstance(image, Tensor):
        raise TypeError(
            f"the image is {_describe(image)}: give a float tensor [B, 3, H, W], as preprocess(image)[None]"
        )
    shape = tuple(image.shape)
    if image.dim() == 3:
        raise ValueError(f"the image has shape {shape}, without a batch dimension: give image[None]")
    if image.dim() != 4 or image.shape[1] != 3:
        raise ValueError(f"the images have shape {shape}: give [B, 3, H, W], colours red, green and blue")
    if not image.is_floating_point():
        raise TypeError(
            f"the images are {str(image.dtype).removeprefix('torch.')}: give normalised floats, as preprocess or "
            "dense_transform make them"
        )


def check_texts(text: Tensor, context_length: int, vocab_size: int) -> None:
    """Refuse what is not a batch of token ids ``[B, L]`` that the text tower knows."""
    if not isinstance(text, Tensor):
        raise TypeError(f"the texts are {_describe(text)}: give token ids, as tokenizer(texts) makes them")
    if text.dim() != 2:
        raise ValueError(f"the token ids have shape {tuple(text.shape)}: give [B, L], as tokenizer(texts) makes them")
    if text.is_floating_point() or text.dtype == torch.bool:
        raise TypeError(f"the token ids are {str(text.dtype).removeprefix('torch.')}: give whole numbers (int64)")
    if text.shape[1] > context_length:
        raise ValueError(f"{text.shape[1]} tokens a text, but the model takes {context_length} at most")
    if text.numel() and values_are_at_hand(text):
        low, high = (int(v) for v in text.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"token ids run from {low} to {high}, but the model knows 0 to {vocab_size - 1}: use "
                "open_clip.get_tokenizer of its name"
            )


def _check_lists(regions: Sequence[Tensor], count: int, kind: str, shape: str) -> None:
    if len(regions) != count:
        raise ValueError(f"{len(regions)} lists of {kind} for {count} images: give one (possibly empty) each")
    for i, one in enumerate(regions):
        if not isinstance(one, Tensor):
            raise TypeError(
                f"the {kind} of image {i} are {_describe(one)}: give a tensor {shape}, torch.tensor({kind})"
            )


def check_boxes(normed_boxes: Sequence[Tensor], count: int | None = None, *, values: bool = True) -> None:
    """Refuse what is not one ``[K, 4]`` of xyxy in 0..1 per image.

    Args:
        count: number of images.
        values: whether coordinates are looked at; a detector's own proposals may lie anywhere.
    """
    _check_lists(normed_boxes, len(normed_boxes) if count is None else count, "boxes", "[K, 4]")
    for i, boxes in enumerate(normed_boxes):
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(
                f"the boxes of image {i} have shape {tuple(boxes.shape)}: give [K, 4] for each image, K may be 0"
            )
        if not values or not len(boxes) or not values_are_at_hand(boxes):
            continue
        if not boxes.isfinite().all():
            raise ValueError(f"the boxes of image {i} are not all finite: leave those out")
        low, high = (float(v) for v in boxes.aminmax())
        if low < -_BOX_MARGIN or high > 1 + _BOX_MARGIN:
            raise ValueError(
                f"the boxes of image {i} run from {low:g} to {high:g}: give shares 0..1 of the (padded) input image, "
                "as normed_boxes of dense_transform makes them from pixels"
            )
        reversed_ = (boxes[:, 2:] < boxes[:, :2]).any(1)
        if reversed_.any():
            k = int(reversed_.nonzero()[0])
            corners = ", ".join(f"{v:g}" for v in boxes[k].tolist())
            raise ValueError(f"box {k} of image {i} is ({corners}), its corners reversed: give x1, y1, x2, y2")


def check_masks(masks: Sequence[Tensor], count: int, grid: tuple[int, int], *, pooled: bool = True) -> None:
    """Refuse what is not one ``[K, h, w]`` per image on the grid of cells.

    Args:
        pooled: whether masks average a map; those without a cell are then told of, once a call.
    """
    _check_lists(masks, count, "masks", "[K, h, w]")
    empty = 0
    for i, mask in enumerate(masks):
        if mask.dim() != 3:
            raise ValueError(f"the masks of image {i} have shape {tuple(mask.shape)}: give [K, h, w], K may be 0")
        if tuple(mask.shape[-2:]) != tuple(grid):
            raise ValueError(f"masks of {tuple(mask.shape[-2:])} cells for a dense map of {tuple(grid)}")
        if pooled and len(mask) and values_are_at_hand(mask):
            empty += int((~(mask.flatten(1) != 0).any(1)).sum())  # of uint8, any() is a number
    if empty:
        log.warning("%d masks have no cell: their embeddings are zero and fit no class", empty)


def check_names(names: Sequence[str]) -> None:
    """Refuse what is not a list of class names, none of them empty."""
    if isinstance(names, str):
        raise TypeError(f'the class names are the text "{names}": give a list, ["{names}"]')
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"class name {i} is {_describe(name)}: give texts")
        if not name.strip():
            raise ValueError(f"class name {i} of {len(names)} is empty: remove it")
