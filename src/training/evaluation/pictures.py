"""What the dense map sees in a few evaluation images, for TensorBoard: labels with their legend, and components."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from training.engine.data.samples import Skipped, stack_padded
from training.engine.pictures import distinct_colours, overlay, principal_components
from training.evaluation.evaluate import autocast, eval_mode, pixels_of

LEGEND = 12  # classes named beside a map, those with the largest areas
LEAST_AREA = 0.005  # of an image, for a class to be named
SIDE = 384  # pixels of a panel's longest side, at least, lest the legend be larger than the picture
GAP = 6  # pixels between panels


@torch.inference_mode()
def evaluation_pictures(
    model: nn.Module,
    eval_data: Any,
    class_embeddings: Tensor,
    count: int,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[str, Tensor]]:
    """Pictures of evenly spaced evaluation images, at the first input size: photograph, label map, components.

    The label of a pixel is the class of largest cosine, with no background and no threshold: pixels of none of the
    classes get the nearest one. The colours of a class are the same in all pictures and at every step.

    Args:
        model: ``visual.image_mean``, ``visual.image_std`` and ``encode_dense`` are used; in eval mode meanwhile.
        eval_data: ``training.evaluation.panoptic.EvalData``.
        class_embeddings: float ``[C, D]`` in the order of ``eval_data.class_names``.
        count: how many; fewer where images are fewer or cannot be used.
        device, dtype: where the model is, and its autocast dtype; float32 for none.

    Yields:
        The image's file name, and a picture uint8 ``[3, H, W]``.
    """
    device, dataset, size = torch.device(device), eval_data.loader.dataset, eval_data.image_sizes[0]
    embeddings = F.normalize(class_embeddings.to(device, torch.float32), dim=-1)
    colours = distinct_colours(len(embeddings))
    chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)
    with eval_mode(model):
        for index in chosen.tolist():
            sample = dataset[index]
            if isinstance(sample, Skipped):  # the evaluation itself has named it
                continue
            image = sample["images"][size]
            pixels = pixels_of(model, stack_padded([image], size), device)
            with autocast(device, dtype):
                sizes = [tuple(image.shape[-2:])]
                dense = model.encode_dense(pixels, normalize=True, keep_shape=True, sizes=sizes)[0].float()
            yield dataset.files(index)[0], draw(image, dense, embeddings, eval_data.class_names, colours)


def draw(image: Tensor, dense: Tensor, embeddings: Tensor, names: list[str], colours: np.ndarray) -> Tensor:
    """One picture: photograph, label map with the names of its largest classes, principal components.

    Args:
        image: uint8 ``[3, h, w]``, without padding.
        dense: unit cells ``[D, g, g]`` of the image, padded right and bottom to a square.
        embeddings: unit length ``[C, D]``; ``names`` and ``colours`` (uint8 ``[C, 3]``) in their order.

    Returns:
        uint8 ``[3, H, W]``.
    """
    height, width = image.shape[-2:]
    side = max(height, width)

    def at_pixels(values: Tensor) -> Tensor:
        square = F.interpolate(values[None], size=(side, side), mode="bilinear", align_corners=False)
        return square[0, :, :height, :width]

    labels = at_pixels(torch.einsum("dhw,cd->chw", dense, embeddings)).argmax(0).cpu().numpy()
    # Cells of the padding alone would take a component for themselves.
    rows, columns = (-(-dense.shape[-1] * n // side) for n in (height, width))
    parts = principal_components(dense[:, :rows, :columns])
    parts = F.pad(parts, (0, dense.shape[-1] - columns, 0, dense.shape[-2] - rows), mode="replicate")
    photograph = image.permute(1, 2, 0).cpu().numpy()
    components = (at_pixels(parts) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    panels = [photograph, overlay(photograph, labels, colours), components]
    scale = max(1.0, SIDE / side)
    shape = (round(width * scale), round(height * scale))
    pictures = [Image.fromarray(p).resize(shape, Image.Resampling.NEAREST) for p in panels]
    area = np.bincount(labels.ravel(), minlength=len(names)) / labels.size
    largest = [i for i in area.argsort(kind="stable")[::-1][:LEGEND].tolist() if area[i] >= LEAST_AREA]
    pictures.insert(2, _legend([(f"{names[i]} {area[i]:.0%}", tuple(colours[i].tolist())) for i in largest]))
    canvas = Image.new("RGB", (sum(p.width + GAP for p in pictures) - GAP, max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, 0))
        left += picture.width + GAP
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def _legend(entries: list[tuple[str, tuple[int, ...]]]) -> Image.Image:
    """Coloured squares with their texts, one below the other."""
    font, line = ImageFont.load_default(size=14), 20
    wide = max((round(font.getlength(text)) for text, _ in entries), default=0)
    picture = Image.new("RGB", (line + wide + 8, line * max(len(entries), 1)), "white")
    draw = ImageDraw.Draw(picture)
    for i, (text, colour) in enumerate(entries):
        draw.rectangle((2, i * line + 3, 15, i * line + 16), fill=colour, outline="black")
        draw.text((line, i * line + 1), text, fill="black", font=font)
    return picture
