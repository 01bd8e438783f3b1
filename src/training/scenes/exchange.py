"""Scenes that colour cannot take apart: every segment wears the same two colours, and only pattern and shape differ.

Correlations of a foundation model cannot help where plain colour separates segments as well as it does. Here a scene
has two colours; each texture and pattern is brought to the same distribution between them, at random the one or the
other way round, without anything coarser than a patch.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.random import Generator

from training.scenes.draw import Array

PATTERNS = ("striped", "dotted", "checked", "waved")  # a solid object would have one colour
Tone = tuple[Array, Array]  # two colours, float32 [3] in 0..1

COARSE = 0.05  # of the longer side: structure of this size and above is taken out of a texture


def draw_tone(rng: Generator) -> Tone:
    """Two random colours, one light and one dark."""
    dark, light = rng.uniform(0.05, 0.45, 3), rng.uniform(0.55, 0.95, 3)
    return dark.astype(np.float32), light.astype(np.float32)


def balanced(values: Array, inside: np.ndarray, rng: Generator) -> Array:
    """Values ``[h, w]`` as their ranks among those ``inside`` (bool): uniform in 0..1, up or down at random."""
    out = np.full(values.shape, 0.5, np.float32)
    count = int(inside.sum())
    if count:
        order = np.argsort(values[inside] + 1e-6 * rng.random(count))
        ranks = np.empty(count, np.float32)
        ranks[order] = (np.arange(count, dtype=np.float32) + 0.5) / count
        out[inside] = ranks if rng.random() < 0.5 else 1 - ranks
    return out


def wear(share: Array, tone: Tone) -> Array:
    """An image ``[h, w, 3]`` that is the second colour by ``share`` ``[h, w]`` and the first by the rest."""
    return tone[0] * (1 - share[..., None]) + tone[1] * share[..., None]


@lru_cache(maxsize=32)
def _blur(length: int, sigma: float) -> Array:
    """Gaussian smoothing of a line of ``length`` pixels as a matrix; rows add up to 1 at the ends too."""
    x = np.arange(length, dtype=np.float32)
    weights = np.exp(-0.5 * ((x[:, None] - x[None]) / sigma) ** 2)
    return weights / weights.sum(1, keepdims=True)


def texture_in_tone(image: Array, inside: np.ndarray, tone: Tone, rng: Generator) -> Array:
    """A painted texture ``[h, w, 3]`` in the scene's colours: its fine structure alone."""
    grey = image.mean(-1)
    coarse = grey
    for axis in (0, 1):
        blur = _blur(grey.shape[axis], COARSE * max(grey.shape))
        coarse = np.moveaxis(np.tensordot(blur, coarse, (1, axis)), 0, axis)
    fine = grey - coarse
    return wear(balanced(fine, inside, rng), tone)


def pattern_in_tone(wave: Array, inside: np.ndarray, tone: Tone, rng: Generator) -> Array:
    """An object's body ``[h, w, 3]``: as much of one colour as of the other, with soft edges between them."""
    share = balanced(wave, inside, rng)
    return wear(np.clip((share - 0.5) * 4 + 0.5, 0, 1), tone)
