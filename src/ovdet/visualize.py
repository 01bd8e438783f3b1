"""Detections drawn into images."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import torch
from PIL import ImageFont
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

LEGIBLE = 480  # pixels of the longer side from which on captions leave room for the image


def class_colors(number: int) -> list[tuple[int, int, int]]:
    """Distinct colours, the same for a class in every image: hues by the golden ratio."""
    hues = [(0.11 + i * 0.618034) % 1 for i in range(number)]
    return [tuple(int(255 * v) for v in colorsys.hsv_to_rgb(h, 0.85, 1.0)) for h in hues]


def draw_detections(
    image: Tensor,
    boxes: Tensor,
    labels: Sequence[int],
    scores: Sequence[float],
    names: Sequence[str],
    masks: Tensor | None = None,
    captions: Sequence[str] | None = None,
) -> Tensor:
    """Boxes with "name 0.93", and masks, on an image; of what overlaps, the surest on top.

    Args:
        image: uint8 ``[3, H, W]``; boxes: ``[N, 4]`` xyxy in its pixels; labels: rows of ``names``; masks: bool
            ``[N, H, W]``.
        captions: in place of the class's name, of each detection.

    Returns:
        uint8 ``[3, H', W']``: a small image is enlarged, lest captions cover it.
    """
    if not len(boxes):
        return image
    factor = max(-(-LEGIBLE // max(image.shape[-2:])), 1)
    if factor > 1:
        image, boxes = _enlarged(image, factor), boxes * factor
        masks = None if masks is None else _enlarged(masks, factor)
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    captions = [captions[i] for i in order] if captions else [names[labels[i]] for i in order]
    boxes, labels, scores = boxes[order], [labels[i] for i in order], [scores[i] for i in order]
    masks = None if masks is None else masks[order]
    palette = class_colors(len(names))
    colors = [palette[label] for label in labels]
    if masks is not None:
        image = draw_segmentation_masks(image, masks, alpha=0.45, colors=colors)
    side = max(image.shape[-2:])
    # Thin boxes would be rejected where rounding turns them over.
    boxes = torch.cat([boxes[:, :2], torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)], dim=1)
    font = ImageFont.load_default(size=max(10, side // 50)) if _sized_default_font() else None
    texts = [f"{caption} {score:.2f}" for caption, score in zip(captions, scores, strict=True)]
    image = draw_bounding_boxes(image, boxes, colors=colors, width=max(1, side // 300))
    return _draw_texts(image, boxes, texts, colors, font)


def _enlarged(image: Tensor, factor: int) -> Tensor:
    return image.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def _draw_texts(
    image: Tensor, boxes: Tensor, texts: Sequence[str], colors: Sequence[tuple[int, int, int]], font: object
) -> Tensor:
    """Captions at the boxes' top left corners, inside the image, on a ground of the box's colour."""
    from PIL import ImageDraw
    from torchvision.transforms.v2 import functional as TF

    picture = TF.to_pil_image(image)
    pen = ImageDraw.Draw(picture)
    for (x, y, _, _), text, color in zip(boxes.tolist(), texts, colors, strict=True):
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        x = min(max(x, 0), max(picture.width - right - 2, 0))
        y = y - bottom - 2 if y > bottom + 2 else y
        pen.rectangle((x, y, x + right + 2, y + bottom + 2), fill=color)
        pen.text((x + 1, y + 1), text, fill=(0, 0, 0), font=font)
    return TF.pil_to_tensor(picture)


def _sized_default_font() -> bool:
    """Pillow 10.1 and newer have a default font of any size, when built with FreeType."""
    try:
        ImageFont.load_default(size=10)
    except (TypeError, OSError, ImportError):
        return False
    return True
