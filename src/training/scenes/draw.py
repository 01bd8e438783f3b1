"""Drawing for the generated scenes: noise textures as stuff, coloured and patterned shapes as things.

Everything is vectorised over the pixels of one image or one object's window, and takes all randomness from the
generator it is given. Images are float32 ``[H, W, 3]`` with values in 0..1 until the very end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Array = NDArray[np.float32]

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.84, 0.13, 0.13),
    "blue": (0.13, 0.25, 0.85),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.55, 0.16, 0.70),
    "green": (0.10, 0.60, 0.18),
    "pink": (0.98, 0.55, 0.75),
    "orange": (0.96, 0.52, 0.08),
    "cyan": (0.15, 0.80, 0.85),
    "white": (0.95, 0.95, 0.95),
    "black": (0.08, 0.08, 0.10),
}
PATTERNS = ("solid", "striped", "dotted", "checked")


@lru_cache(maxsize=256)
def _interpolation(size: int, knots: int) -> Array:
    """Matrix ``[size, knots]`` of cubic-smoothed linear interpolation between equally spaced knots."""
    position = np.linspace(0, knots - 1, size, dtype=np.float32)
    low = np.minimum(position.astype(int), knots - 2)
    t = position - low
    t = t * t * (3 - 2 * t)
    matrix = np.zeros((size, knots), np.float32)
    matrix[np.arange(size), low] = 1 - t
    matrix[np.arange(size), low + 1] = t
    return matrix


def noise(rng: Generator, height: int, width: int, cell_y: float, cell_x: float, octaves: int = 1) -> Array:
    """Smooth value noise ``[height, width]``, about zero mean and unit range; ``cell_*`` is the first octave's size.

    Each further octave halves the size in pixels and the strength.
    """
    out = np.zeros((height, width), np.float32)
    strength = 1.0
    for _ in range(octaves):
        ky = max(2, round(height / max(cell_y, 1)) + 1)
        kx = max(2, round(width / max(cell_x, 1)) + 1)
        grid = rng.random((ky, kx), dtype=np.float32) * 2 - 1
        out += strength * (_interpolation(height, ky) @ grid @ _interpolation(width, kx).T)
        cell_y, cell_x, strength = cell_y / 2, cell_x / 2, strength / 2
    return out


# ---------------------------------------------------------------------------------------------------- stuff


def _mix(low: tuple[float, ...], high: tuple[float, ...], t: Array) -> Array:
    """Blend two colours by a map ``t`` ``[H, W]``, clipped to 0..1."""
    t = np.clip(t, 0, 1)[..., None]
    return np.float32(low) * (1 - t) + np.float32(high) * t


def _sky(rng: Generator, h: int, w: int, unit: float) -> Array:
    clouds = noise(rng, h, w, 20 * unit, 34 * unit, 3)
    return _mix((0.36, 0.60, 0.92), (0.93, 0.95, 0.98), 0.25 + 0.55 * clouds + np.linspace(-0.2, 0.25, h)[:, None])


def _grass(rng: Generator, h: int, w: int, unit: float) -> Array:
    t = 0.5 + 0.25 * noise(rng, h, w, 24 * unit, 24 * unit) + 0.45 * noise(rng, h, w, 5 * unit, 1.6 * unit)
    return _mix((0.10, 0.27, 0.06), (0.50, 0.66, 0.22), t)


def _water(rng: Generator, h: int, w: int, unit: float) -> Array:
    bend = 2.5 * noise(rng, h, w, 16 * unit, 22 * unit)
    wave = np.sin(np.arange(h, dtype=np.float32)[:, None] / unit * 0.9 + bend + rng.random() * 6)
    return _mix(
        (0.03, 0.22, 0.34), (0.30, 0.62, 0.68), 0.42 + 0.28 * wave + 0.25 * noise(rng, h, w, 3 * unit, 9 * unit)
    )


def _sand(rng: Generator, h: int, w: int, unit: float) -> Array:
    t = 0.5 + 0.25 * noise(rng, h, w, 14 * unit, 26 * unit, 2) + 0.3 * noise(rng, h, w, 1.5 * unit, 1.5 * unit)
    return _mix((0.70, 0.56, 0.36), (0.94, 0.85, 0.64), t)


def _brick(rng: Generator, h: int, w: int, unit: float) -> Array:
    bh, bw = 7 * unit * rng.uniform(0.85, 1.2), 15 * unit * rng.uniform(0.85, 1.2)
    y = np.arange(h, dtype=np.float32)[:, None] + rng.uniform(0, bh)
    row = np.floor(y / bh)
    x = np.arange(w, dtype=np.float32)[None] + rng.uniform(0, bw) + (row % 2) * bw / 2
    column = np.floor(x / bw)
    edge = np.minimum(np.minimum(y % bh, bh - y % bh), np.minimum(x % bw, bw - x % bw))
    shade = 0.5 + 0.5 * np.sin(row * 12.9898 + column * 78.233 + rng.random() * 6)  # one shade per brick
    wall = _mix((0.45, 0.17, 0.12), (0.68, 0.33, 0.22), 0.2 + 0.5 * shade + 0.3 * noise(rng, h, w, 2 * unit, 2 * unit))
    mortar = np.clip(1.4 - edge / unit, 0, 1)[..., None]
    return wall * (1 - mortar) + np.float32((0.76, 0.72, 0.66)) * mortar


def _wood(rng: Generator, h: int, w: int, unit: float) -> Array:
    y = np.arange(h, dtype=np.float32)[:, None] / unit
    grain = np.sin(y * 1.1 + 5 * noise(rng, h, w, 14 * unit, 60 * unit))
    plank = np.where((y + rng.uniform(0, 24)) % 24 < 1.2, -0.5, 0.0)
    t = 0.5 + 0.25 * grain + 0.25 * noise(rng, h, w, 1.5 * unit, 12 * unit) + plank
    return _mix((0.30, 0.17, 0.08), (0.72, 0.50, 0.28), t)


def _gravel(rng: Generator, h: int, w: int, unit: float) -> Array:
    t = 0.5 + 0.75 * noise(rng, h, w, 4.5 * unit, 4.5 * unit, 2) + 0.15 * noise(rng, h, w, 30 * unit, 30 * unit)
    return _mix((0.22, 0.22, 0.24), (0.70, 0.69, 0.68), t)


def _snow(rng: Generator, h: int, w: int, unit: float) -> Array:
    t = 0.65 + 0.4 * noise(rng, h, w, 18 * unit, 30 * unit, 3)
    return _mix((0.70, 0.77, 0.88), (0.97, 0.98, 1.0), t)


TEXTURES: dict[str, Callable[[Generator, int, int, float], Array]] = {
    "grass": _grass,
    "sky": _sky,
    "sand": _sand,
    "water": _water,
    "brick wall": _brick,
    "wood": _wood,
    "gravel": _gravel,
    "snow": _snow,
}


# --------------------------------------------------------------------------------------------------- things
# A shape is a function of coordinates (u to the right, v down) that is positive inside; the object's half side is 1,
# and near the border the value is about the distance, so that it also gives a smooth edge.


def _circle(u: Array, v: Array) -> Array:
    return 0.9 - np.hypot(u, v)


def _square(u: Array, v: Array) -> Array:
    return 0.78 - np.maximum(np.abs(u), np.abs(v))


def _triangle(u: Array, v: Array) -> Array:
    return 0.5 - np.maximum(v - 0.22, np.abs(u) * 0.866 - (v - 0.22) * 0.5)


def _star(u: Array, v: Array) -> Array:
    angle = np.arctan2(u, -v) % (2 * np.pi / 5)
    angle = np.minimum(angle, 2 * np.pi / 5 - angle)  # angle to the nearest point of the star
    r = np.hypot(u, v)
    inner = 0.45
    point, notch = np.array([1.0, 0.0]), inner * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    edge = notch - point
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return (1 - r * np.cos(angle)) * normal[0] - r * np.sin(angle) * normal[1]


def _cross(u: Array, v: Array) -> Array:
    a, b = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(0.95 - a, 0.3 - b), np.minimum(0.3 - a, 0.95 - b))


def _ring(u: Array, v: Array) -> Array:
    return 0.25 - np.abs(np.hypot(u, v) - 0.7)


def _heart(u: Array, v: Array) -> Array:
    d, c = 0.8, 0.083  # a square on its corner (half diagonal d, centre c) and a half circle on each upper side
    corner = (d - np.abs(u) - np.abs(v - c)) * 0.7071
    return np.maximum(corner, d * 0.7071 - np.hypot(np.abs(u) - d / 2, v - (c - d / 2)))


def _moon(u: Array, v: Array) -> Array:
    return np.minimum(0.95 - np.hypot(u, v), np.hypot(u - 0.5, v) - 0.75)


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "star": _star,
    "square": _square,
    "cross": _cross,
    "triangle": _triangle,
    "ring": _ring,
    "heart": _heart,
    "moon": _moon,
}


def _pattern(rng: Generator, kind: str, u: Array, v: Array) -> Array:
    """Share of the second colour, 0..1, per pixel. The pattern turns and shifts with every object."""
    if kind == "solid":
        return np.zeros_like(u)
    wave = pattern_wave(rng, kind, u, v)
    return np.clip((np.sign(wave) if kind == "checked" else wave) * 3 + 0.5, 0, 1).astype(np.float32)


def pattern_wave(rng: Generator, kind: str, u: Array, v: Array) -> Array:
    """The wave behind a pattern: positive where the second colour is."""
    angle, shift, period = rng.uniform(0, np.pi), rng.uniform(0, 1, 2), rng.uniform(0.38, 0.52)
    a = (np.cos(angle) * u + np.sin(angle) * v) / period + shift[0]
    b = (np.cos(angle) * v - np.sin(angle) * u) / period + shift[1]
    if kind == "striped":
        wave = np.sin(2 * np.pi * a)
    elif kind == "dotted":
        wave = np.hypot(a % 1 - 0.5, b % 1 - 0.5) * -4 + 1.2
    elif kind == "waved":
        wave = np.sin(2 * np.pi * (a + 0.25 * np.sin(2 * np.pi * b)))
    else:
        wave = np.sin(np.pi * a) * np.sin(np.pi * b)
    return wave


def _colored(rng: Generator, color: str, pattern: str, u: Array, v: Array) -> Array:
    """An object's body ``[h, w, 3]`` in its colour and pattern."""
    base = np.clip(np.float32(COLORS[color]) + rng.normal(0, 0.035, 3).astype(np.float32), 0, 1)
    # Patterns mix in white, or black where the colour itself is light, so that the colour stays the one in the name.
    second = np.float32((0.96, 0.96, 0.96)) if base.mean() < 0.72 else np.float32((0.12, 0.12, 0.14))
    second_share = _pattern(rng, pattern, u, v)[..., None]
    return base * (1 - second_share) + second * second_share


def paint_object(
    rng: Generator,
    image: Array,
    *,
    color: str,
    shape: str,
    pattern: str,
    center: tuple[float, float],
    half_side: float,
    mask_only: bool = False,
    angle: float = 0.0,
    body: Callable[[Array, Array, NDArray[np.bool_]], Array] | None = None,
) -> tuple[tuple[slice, slice], NDArray[np.bool_]] | None:
    """Paint one object (with its shadow) into ``image`` ``[H, W, 3]`` in place.

    ``center`` is (x, y) and ``half_side`` half the side of the shape's square, in pixels; ``angle`` in radians.
    Returns the window (rows, columns) and the mask ``[h, w]`` of the object in it, or None when it lies outside.
    With ``mask_only`` nothing is painted, and no randomness is used. ``body`` paints the object instead of its colour
    and pattern: (u, v, mask) -> ``[h, w, 3]``.
    """
    height, width = image.shape[:2]
    reach = half_side * 1.45 + 2
    x0, x1 = max(0, int(center[0] - reach)), min(width, int(center[0] + reach) + 1)
    y0, y1 = max(0, int(center[1] - reach)), min(height, int(center[1] + reach) + 1)
    if x0 >= x1 or y0 >= y1:
        return None
    x = (np.arange(x0, x1, dtype=np.float32)[None] + 0.5 - center[0]) / half_side
    y = (np.arange(y0, y1, dtype=np.float32)[:, None] + 0.5 - center[1]) / half_side
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = cos * x + sin * y, cos * y - sin * x
    depth = SHAPES[shape](u, v)
    window = (slice(y0, y1), slice(x0, x1))
    mask = depth > 0
    if mask_only:
        return window, mask
    if body is None:
        painted = _colored(rng, color, pattern, u, v)
        strength = 0.22
    else:
        painted, strength = body(u, v, mask), 0.06
    light = rng.uniform(0, 2 * np.pi)
    shade = 1 + strength * (np.cos(light) * x + np.sin(light) * y) + 0.08 * noise(rng, *mask.shape, 6, 6)
    painted = np.clip(painted * shade[..., None], 0, 1)
    alpha = np.clip(depth * half_side + 0.5, 0, 1)[..., None]
    dx, dy = rng.uniform(-0.12, 0.12), rng.uniform(0.04, 0.16)
    shadow = np.clip(SHAPES[shape](u - dx, v - dy) * 5 + 0.3, 0, 1)[..., None] * (1 - alpha) * rng.uniform(0.2, 0.5)
    patch = image[window] * (1 - shadow)
    image[window] = patch * (1 - alpha) + painted * alpha
    return window, mask


def camera(rng: Generator, image: Array) -> NDArray[np.uint8]:
    """Exposure, contrast, a slight colour cast and sensor noise; the result is uint8 ``[H, W, 3]``."""
    gain = rng.uniform(0.85, 1.12) * rng.normal(1, 0.02, 3)
    image = (image - 0.5) * rng.uniform(0.88, 1.08) + 0.5
    image = image * gain.astype(np.float32) + rng.normal(0, 0.015, image.shape).astype(np.float32)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
