"""Composing a scene: which stuff and things it holds, where, and the sentence that describes it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from training.scenes import exchange
from training.scenes.draw import COLORS, PATTERNS, SHAPES, TEXTURES, camera, noise, paint_object, pattern_wave

PHRASES = (
    *("a photo of {}.",) * 14, "a picture of {}.", "there is {} in the scene.", "this is a photo of {}.", "itap of {}.",
    "{}.", "a bad photo of {}.", "this is {}.", "a close-up photo of {}.", "a cropped photo of {}.", "{} in the scene.",
)  # fmt: skip


@dataclass(frozen=True)
class Category:
    """One class. ``color`` and ``shape`` are empty for stuff; an empty ``pattern`` means any."""

    id: int
    name: str
    is_thing: bool
    color: str = ""
    shape: str = ""
    pattern: str = ""


@dataclass(frozen=True)
class SceneOptions:
    """What a scene may hold. Sizes of objects are shares of the image's longer side.

    Attributes:
        size: longer side in pixels.
        things, stuff: numbers of classes (at most 80 and 8).
        colors: number of colours that the thing classes use (0: about the square root of ``things``).
        pattern_names: the pattern is part of the class ("red striped circle"); otherwise each object's is random.
        min_object, max_object: side of an object's square.
        max_objects: objects per scene, 1 to this many.
        min_aspect, max_aspect: the shorter side is a random share of the longer one, between these.
        pair_size: side of the pictures in ``pairs/``, in pixels.
        exchange_colors: all segments of a scene wear the same two colours (:mod:`training.scenes.exchange`), and a
            thing's class is its pattern and shape ("dotted star").
    """

    size: int = 128
    things: int = 20
    stuff: int = 8
    colors: int = 0
    pattern_names: bool = False
    min_object: float = 0.22
    max_object: float = 0.42
    max_objects: int = 5
    min_aspect: float = 1.0
    max_aspect: float = 1.0
    pair_size: int = 64
    exchange_colors: bool = False

    def __post_init__(self) -> None:
        if min(self.size, self.pair_size) < 16:
            raise ValueError(f"size {self.size}, pair_size {self.pair_size}: scenes have at least 16 pixels")
        if not 0 < self.min_object <= self.max_object <= 1:
            raise ValueError(
                f"min_object {self.min_object:g}, max_object {self.max_object:g}: shares of the image, the first no "
                "more than the second"
            )
        if not 0 < self.min_aspect <= self.max_aspect <= 1 or self.max_objects < 1:
            raise ValueError(
                f"aspects {self.min_aspect:g} to {self.max_aspect:g}, max_objects {self.max_objects}: above 0 to 1 and "
                "ascending, and 1 or more"
            )


@dataclass
class Segment:
    """One thing or one stuff region of a scene; ``mask`` bool ``[H, W]`` is what shows, ``full_area`` the whole."""

    category: Category
    mask: NDArray[np.bool_]
    full_area: int


@dataclass
class Scene:
    """``image`` uint8 ``[H, W, 3]`` and its segments, which cover every pixel once."""

    image: NDArray[np.uint8]
    segments: list[Segment] = field(default_factory=list)


def categories(options: SceneOptions) -> list[Category]:
    """Thing classes, then stuff classes, with ids from 1.

    The things walk along the diagonals of the colour-by-shape table, so that any first few use many of both. With
    ``pattern_names`` each pair of colour and shape also has a pattern of its own, which all its objects wear.

    Raises:
        ValueError: more classes are asked for than there are.
    """
    limit = len(COLORS) * len(SHAPES) if not options.exchange_colors else len(exchange.PATTERNS) * len(SHAPES)
    if not 1 <= options.things <= limit:
        raise ValueError(f"{options.things} thing classes: there are 1 to {limit}")
    if not 1 <= options.stuff <= len(TEXTURES):
        raise ValueError(f"{options.stuff} stuff classes: there are 1 to {len(TEXTURES)}")
    stuff = [Category(options.things + k + 1, name, False) for k, name in enumerate(list(TEXTURES)[: options.stuff])]
    if options.exchange_colors:
        kinds = [(exchange.PATTERNS[(i + i // len(exchange.PATTERNS) // 2) % len(exchange.PATTERNS)],
                  list(SHAPES)[i % len(SHAPES)]) for i in range(limit)][: options.things]  # fmt: skip
        return [Category(i + 1, f"{p} {s}", True, "", s, p) for i, (p, s) in enumerate(kinds)] + stuff
    n_colors = options.colors or min(len(COLORS), math.ceil(math.sqrt(options.things)))
    n_colors = max(n_colors, math.ceil(options.things / len(SHAPES)))
    rows = math.ceil(options.things / n_colors)
    if n_colors > len(COLORS):
        raise ValueError(f"{n_colors} colours: there are {len(COLORS)}")
    # With patterns in the names, 4 or 8 shapes: then colour, pattern and shape each tell something about a class.
    n_shapes = len(SHAPES) if options.pattern_names and rows > 2 else rows
    colors, shapes = list(COLORS)[:n_colors], list(SHAPES)[:n_shapes]
    out: list[Category] = []
    for number in range(options.things):
        row, color = divmod(number, n_colors)
        shape = shapes[(color + row) % n_shapes]
        pattern = PATTERNS[row % len(PATTERNS)] if options.pattern_names else ""
        name = " ".join([colors[color], *([pattern] if pattern else []), shape])
        out.append(Category(len(out) + 1, name, True, colors[color], shape, pattern))
    return out + stuff


def _background(
    rng: Generator, h: int, w: int, unit: float, stuff: Sequence[Category], tone: exchange.Tone | None = None
) -> tuple[np.ndarray, list[Segment]]:
    """One to three textures with irregular borders, one above the other, beside it, or anywhere."""
    count = int(rng.choice([1, 2, 3], p=[0.3, 0.5, 0.2]))
    chosen = [stuff[i] for i in rng.permutation(len(stuff))[:count]]
    ramp_y, ramp_x = np.linspace(-1, 1, h)[:, None], np.linspace(-1, 1, w)[None]
    fields = []
    for _ in chosen:
        slope = rng.normal(0, 1.6, 2)
        fields.append(slope[0] * ramp_y + slope[1] * ramp_x + noise(rng, h, w, h / 2.5, w / 2.5, 3))
    owner = np.argmax(np.stack(fields), axis=0)
    image = np.zeros((h, w, 3), np.float32)
    segments = []
    for i, category in enumerate(chosen):
        mask = owner == i
        if mask.any():
            texture = TEXTURES[category.name](rng, h, w, unit * rng.uniform(0.75, 1.3))
            if tone is not None:
                texture = exchange.texture_in_tone(texture, mask, tone, rng)
            image[mask] = texture[mask]
            segments.append(Segment(category, mask, int(mask.sum())))
    return image, segments


def draw_scene(rng: Generator, options: SceneOptions, classes: Sequence[Category] | None = None) -> Scene:
    """Draw one scene. An object hides at most 30 % of another, and at most 35 % of it lies outside the image."""
    classes = categories(options) if classes is None else classes
    things = [c for c in classes if c.is_thing]
    size = options.size
    short = max(1, round(size * rng.uniform(options.min_aspect, options.max_aspect)))
    h, w = (size, short) if rng.random() < 0.5 else (short, size)
    tone = exchange.draw_tone(rng) if options.exchange_colors else None
    image, segments = _background(rng, h, w, size / 128, [c for c in classes if not c.is_thing], tone)
    backdrop = len(segments)
    for _ in range(int(rng.integers(1, options.max_objects + 1))):
        category = things[int(rng.integers(len(things)))]
        for _ in range(8):
            half = 0.5 * size * math.exp(rng.uniform(math.log(options.min_object), math.log(options.max_object)))
            place = dict(
                color=category.color,
                shape=category.shape,
                center=(rng.uniform(0.4 * half, w - 0.4 * half), rng.uniform(0.4 * half, h - 0.4 * half)),
                half_side=half,
                angle=rng.uniform(-0.45, 0.45),
                pattern=category.pattern or PATTERNS[int(rng.integers(len(PATTERNS)))],
            )
            found = paint_object(rng, image, mask_only=True, **place)
            # The whole object, to know how much of it lies outside the image.
            big = np.broadcast_to(np.float32(0), (int(4 * half) + 4, int(4 * half) + 4, 3))
            whole = paint_object(rng, big, mask_only=True, **{**place, "center": (big.shape[1] / 2, big.shape[0] / 2)})
            if found is None or whole is None:
                continue
            window, mask = found
            area, full = int(mask.sum()), int(whole[1].sum())
            hidden = [int((s.mask[window] & mask).sum()) for s in segments[backdrop:]]
            if area < 0.65 * full or any(
                over > 0.3 * s.full_area or over > 0.5 * s.mask.sum()
                for over, s in zip(hidden, segments[backdrop:], strict=True)
            ):
                continue
            body = None if tone is None else partial(_in_tone, rng, category.pattern, tone)
            paint_object(rng, image, **place, body=body)
            for s in segments:
                s.mask[window] &= ~mask
            placed = np.zeros((h, w), bool)
            placed[window] = mask
            segments.append(Segment(category, placed, full))
            break
    return Scene(camera(rng, image), [s for s in segments if s.mask.any()])


def _in_tone(rng: Generator, pattern: str, tone: exchange.Tone, u: np.ndarray, v: np.ndarray, mask: np.ndarray):
    """Body of an object in the scene's two colours."""
    return exchange.pattern_in_tone(pattern_wave(rng, pattern, u, v), mask, tone, rng)


def describe(rng: Generator, segments: Sequence[tuple[Category, int, int]], pixels: int) -> str:
    """A caption of what is to be seen: up to three things, largest first, and the largest stuff.

    ``segments`` are (category, visible pixels, pixels of the whole segment). A thing is mentioned when a good part
    of it is to be seen; otherwise the caption would teach to recognise what is not there.
    """
    ranked = sorted(segments, key=lambda s: -s[1])
    things = [c for c, seen, full in ranked if c.is_thing and seen >= 0.45 * full and seen > 0.03 * pixels][:3]
    stuff = [c for c, seen, _ in ranked if not c.is_thing and seen > 0.06 * pixels]
    names = []
    for c in things:
        names.append(f"{'an' if c.name[0] in 'aeiou' else 'a'} {c.name}")
    if things:
        text = " and ".join(names)
        if stuff and rng.random() < 0.5:
            text += f" on {stuff[0].name}"
    elif stuff:
        text = " and ".join(c.name for c in stuff[:2])
    else:
        text = "something"
    return PHRASES[int(rng.integers(len(PHRASES)))].format(text)


def _cut(scene: Scene, box: tuple[int, int, int, int], size: int) -> NDArray[np.uint8]:
    """The window ``box`` (xyxy, pixels), longest side brought to ``size``, centred on black."""
    x0, y0, x1, y1 = box
    scale = size / max(x1 - x0, y1 - y0)
    w, h = max(1, round((x1 - x0) * scale)), max(1, round((y1 - y0) * scale))
    small = Image.fromarray(scene.image[y0:y1, x0:x1]).resize((w, h), Image.Resampling.BICUBIC)
    out = np.zeros((size, size, 3), np.uint8)
    out[(size - h) // 2 : (size - h) // 2 + h, (size - w) // 2 : (size - w) // 2 + w] = small
    return out


def draw_pairs(rng: Generator, options: SceneOptions, classes: Sequence[Category]) -> Iterator[tuple[np.ndarray, str]]:
    """Pictures uint8 ``[pair_size, pair_size, 3]`` with captions, cut from one scene.

    Every object in two loose, jittered windows; a cell of a random grid, as CLIPSelf cuts its patches; and now and
    then the whole scene. So the crops that the trained model is later shown look like its training pictures.
    """
    scene = draw_scene(rng, options, classes)
    h, w = scene.image.shape[:2]
    boxes: list[tuple[float, float, float, float]] = []
    for s in [s for s in scene.segments if s.category.is_thing] * 2:
        ys, xs = np.nonzero(s.mask)
        side_x, side_y = xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()
        grow = rng.uniform(0.9, 1.7)
        cx = (xs.max() + 1 + xs.min()) / 2 + rng.normal(0, 0.1) * side_x
        cy = (ys.max() + 1 + ys.min()) / 2 + rng.normal(0, 0.1) * side_y
        half_x, half_y = side_x * grow / 2, side_y * grow / 2
        boxes.append((cx - half_x, cy - half_y, cx + half_x, cy + half_y))
    rows = int(rng.integers(1, 6))
    columns = int(rng.integers(math.ceil(rows / 2), min(2 * rows, 6) + 1))
    r, c = int(rng.integers(rows)), int(rng.integers(columns))
    boxes.append((c * w / columns, r * h / rows, (c + 1) * w / columns, (r + 1) * h / rows))
    if rng.random() < 0.2:
        boxes.append((0, 0, w, h))
    for x0, y0, x1, y1 in boxes:
        box = (max(0, round(x0)), max(0, round(y0)), min(w, round(x1)), min(h, round(y1)))
        if box[2] - box[0] < 4 or box[3] - box[1] < 4:
            continue
        seen = [(s.category, int(s.mask[box[1] : box[3], box[0] : box[2]].sum()), s.full_area) for s in scene.segments]
        pixels = (box[2] - box[0]) * (box[3] - box[1])
        yield _cut(scene, box, options.pair_size), describe(rng, [s for s in seen if s[1]], pixels)
