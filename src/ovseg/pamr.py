"""PAMR (Araslanov and Roth, CVPR 2020): scores pulled along the image's own colours; no parameters.

Each step replaces a pixel's score by a mean over its neighbours, weighted by how alike their colours are. Work is done
in bands of rows, and within a band a few classes at a time, so memory depends on neither classes nor height.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BUDGET = 256 * 2**20  # bytes of the largest tensors of a band
_EPSILON = 1e-8


def _shifts(dilations: Sequence[int], centre: bool) -> Iterator[tuple[int, int]]:
    """(down, right) of the 8 neighbours (9 with the pixel itself) at each distance."""
    for d in dilations:
        for down in (-d, 0, d):
            for right in (-d, 0, d):
                if centre or down or right:
                    yield down, right


def _shifted(padded: Tensor, margin: int, down: int, right: int) -> Tensor:
    """The view of a padded map that holds the neighbours at (down, right) of every pixel."""
    height, width = (side - 2 * margin for side in padded.shape[-2:])
    return padded[..., margin + down : margin + down + height, margin + right : margin + right + width]


def affinity(image: Tensor, dilations: Sequence[int]) -> Tensor:
    """Weights of the neighbours of every pixel: ``[3, H, W] -> [8 * len(dilations), H, W]``, adding up to 1.

    Softmax over neighbours of ``-|x_p - x_n| / (1e-8 + 0.1 s)``, averaged over channels; s is the unbiased deviation of
    the channel over the pixel and its neighbours (the pixel counts once per dilation). Borders are repeated.
    """
    margin = max(dilations)
    padded = F.pad(image, [margin] * 4, mode="replicate")
    logits = image.new_zeros(8 * len(dilations), *image.shape[1:])
    for channel, around in zip(image, padded, strict=True):
        values = torch.stack([_shifted(around, margin, *shift) for shift in _shifts(dilations, True)])
        deviation = values.std(0)
        del values
        for row, shift in zip(logits, _shifts(dilations, False), strict=True):
            row -= (channel - _shifted(around, margin, *shift)).abs_() / (_EPSILON + 0.1 * deviation)
    return logits.div_(len(image)).softmax(0)


def propagate(weights: Tensor, scores: Tensor, dilations: Sequence[int], steps: int) -> Tensor:
    """``steps`` times: each score becomes the weighted mean of its neighbours'. ``[C, H, W] -> [C, H, W]``."""
    margin = max(dilations)
    for _ in range(steps):
        padded = F.pad(scores, [margin] * 4, mode="replicate")
        scores = torch.zeros_like(scores)
        for weight, shift in zip(weights, _shifts(dilations, False), strict=True):
            scores.addcmul_(weight, _shifted(padded, margin, *shift))
    return scores


def halo(dilations: Sequence[int], steps: int) -> int:
    """Rows around a band that its result depends on."""
    return max(dilations) * steps


def refine_rows(image: Tensor, scores: Tensor, dilations: Sequence[int], steps: int, *, budget: int = BUDGET) -> Tensor:
    """PAMR of one band: image ``[3, H, W]`` and scores ``[C, H, W]`` of the same size, a few classes at a time.

    ``scores`` are overwritten with the result.
    """
    weights = affinity(image, dilations)
    chunk = max(1, budget // (3 * scores[0].numel() * scores.element_size()))
    for start in range(0, len(scores), chunk):
        part = slice(start, start + chunk)
        scores[part] = propagate(weights, scores[part], dilations, steps)
    return scores


def bands(height: int, width: int, dilations: Sequence[int], steps: int, budget: int = BUDGET) -> list[tuple[int, ...]]:
    """Bands (first row, end, first row read, end of rows read) that keep the weights of a band within the budget."""
    around = halo(dilations, steps)
    row = 4 * width * (8 * len(dilations) + 9 * len(dilations) + 8)
    # At least as many rows as are read for nothing, so that bands at most triple the work.
    rows = max(budget // row - 2 * around, 2 * around, 1)
    return [
        (start, min(start + rows, height), max(start - around, 0), min(start + rows + around, height))
        for start in range(0, height, rows)
    ]


def pamr(
    image: Tensor,
    scores: Tensor,
    *,
    steps: int = 10,
    dilations: Sequence[int] = (8, 16),
    budget: int = BUDGET,
) -> Tensor:
    """Refine scores of any size along an image.

    Args:
        image: float ``[B, 3, H, W]``, on any scale; normalised pixels in the published use.
        scores: float ``[B, C, h, w]``; another size is first resized bilinearly with corners aligned.
        steps: rounds; 0 only resizes.
        dilations: distances of the neighbours in pixels.
        budget: bytes of the largest tensors besides the result.

    Returns:
        ``[B, C, H, W]``.

    Raises:
        ValueError: no dilation, one below 1, or a negative number of steps.
    """
    if not dilations or min(dilations) < 1 or steps < 0:
        raise ValueError(f"PAMR of {steps} steps with dilations {tuple(dilations)}: both must be positive")
    if scores.shape[-2:] != image.shape[-2:]:
        scores = F.interpolate(scores, image.shape[-2:], mode="bilinear", align_corners=True)
    if not steps:
        return scores
    height, width = image.shape[-2:]
    refined = torch.empty_like(scores)
    for out, pixels, values in zip(refined, image, scores, strict=True):
        for start, stop, low, high in bands(height, width, dilations, steps, budget):
            band = refine_rows(pixels[:, low:high], values[:, low:high].clone(), dilations, steps, budget=budget)
            out[:, start:stop] = band[:, start - low : stop - low]
    return refined
