"""Pictures of what was grounded: boxes with names, and the caption below with its phrases in the same colours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ovdet.glip.phrases import Phrase
from ovdet.visualize import class_colors

SMALLEST = 640  # pictures whose longer side is less are enlarged, or names would cover them
INK, PAPER = (0, 0, 0), (255, 255, 255)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Place = tuple[float, float, float, float]


def draw(
    image: Tensor,
    boxes: Tensor,
    labels: Sequence[int],
    scores: Sequence[float],
    names: Sequence[str],
    *,
    caption: str = "",
    phrases: Sequence[Phrase] = (),
) -> Image.Image:
    """A picture of detections.

    Args:
        image: uint8 ``[3, H, W]``; boxes: ``[N, 4]`` xyxy in its pixels.
        labels: rows of ``names``; scores: 0..1.
        caption, phrases: written below; phrase i has the colour of label i.
    """
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    scale = max(SMALLEST / max(picture.size), 1.0)
    if scale > 1:
        size = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    font = ImageFont.load_default(size=max(12, max(picture.size) // 45))
    palette = class_colors(max(len(names), 1))
    pen, line = ImageDraw.Draw(picture), max(2, max(picture.size) // 300)
    limit = torch.tensor([picture.width, picture.height] * 2) - 1
    places = torch.minimum((boxes.float() * scale).clamp(min=0), limit).tolist()
    # Weak ones first, so that strong ones lie above them.
    order = sorted(range(len(places)), key=lambda i: scores[i])
    for i in order:
        x1, y1, x2, y2 = places[i]
        pen.rectangle((x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)), outline=palette[labels[i]], width=line)
    taken: list[Place] = []
    for i in reversed(order):
        text = f"{names[labels[i]]} {scores[i]:.2f}"
        taken.append(_write_name(pen, text, places[i], palette[labels[i]], font, picture.size, taken))
    if caption:
        picture = _with_caption(picture, caption, phrases, palette, font)
    return picture


def _write_name(
    pen: ImageDraw.ImageDraw, text: str, box: Sequence[float], color: tuple[int, int, int], font: Font,
    size: tuple[int, int], taken: Sequence[Place],
) -> Place:  # fmt: skip
    """Write a name at the box's upper left corner: above it, or inside, moved where another name stands already."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right + 4, bottom + 3
    x = min(max(box[0], 0), max(size[0] - width, 0))
    above, inside = box[1] - height, box[1]
    # Upwards from above the box; then downwards from its upper edge.
    tries = [above - height * i for i in range(3)] + [inside + height * i for i in range(6)]
    tries = [y for y in tries if 0 <= y <= size[1] - height] or [min(max(inside, 0), max(size[1] - height, 0))]
    y = next((y for y in tries if not any(_overlap((x, y, x + width, y + height), t) for t in taken)), tries[0])
    pen.rectangle((x, y, x + width, y + height), fill=color)
    pen.text((x + 2, y + 1), text, fill=_ink(color), font=font)
    return x, y, x + width, y + height


def _overlap(a: Place, b: Place) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _ink(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever is read better on a colour."""
    return INK if 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 110 else PAPER


def _with_caption(
    picture: Image.Image, caption: str, phrases: Sequence[Phrase], palette: Sequence[tuple[int, int, int]], font: Font
) -> Image.Image:
    """The picture over a strip with the caption, broken into lines; phrases stand on their colours."""
    owner: list[int | None] = [None] * len(caption)
    for i, phrase in enumerate(phrases):
        for begin, end in phrase.spans:
            owner[begin:end] = [i] * (end - begin)
    measure = ImageDraw.Draw(picture)
    gap = measure.textlength(" ", font=font)
    height = measure.textbbox((0, 0), "Ag", font=font)[3] + 8
    margin, x, y = 8.0, 8.0, 6.0
    placed = []
    place = 0
    for word in caption.split():
        place = caption.index(word, place)
        width = measure.textlength(word, font=font)
        if x + width > picture.width - margin and x > margin:
            x, y = margin, y + height
        placed.append((x, y, width, word, owner[place], place))
        x += width + gap
        place += len(word)
    strip = Image.new("RGB", (picture.width, int(y + height + 6)), PAPER)
    pen = ImageDraw.Draw(strip)
    for i, (x, y, width, word, phrase, start) in enumerate(placed):
        if phrase is not None:
            # A phrase of several words is one stretch of colour.
            end = start + len(word)
            follows = i + 1 < len(placed) and placed[i + 1][1] == y and placed[i + 1][4] == phrase
            joined = follows and all(o == phrase for o in owner[end : placed[i + 1][5]])
            right = placed[i + 1][0] if joined else x + width + 2
            pen.rectangle((x - 2, y, right, y + height - 3), fill=palette[phrase])
    for x, y, _, word, phrase, _ in placed:
        pen.text((x, y + 1), word, fill=INK if phrase is None else _ink(palette[phrase]), font=font)
    joined_picture = Image.new("RGB", (picture.width, picture.height + strip.height), PAPER)
    joined_picture.paste(picture, (0, 0))
    joined_picture.paste(strip, (0, picture.height))
    return joined_picture
