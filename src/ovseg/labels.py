"""From scores at cells to the label of every pixel, in bands of rows: no map of C classes at full size is ever made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ovseg.pamr import BUDGET as PAMR_BUDGET
from ovseg.pamr import bands, refine_rows
from ovseg.windows import AxisMap, Windows, interpolation, spread

BUDGET = 32 * 2**20  # bytes of the scores of a band; larger ones leave the caches of a CPU and are slower
CUDA_BUDGET = 512 * 2**20  # on a GPU each band is some dozen kernels, whose launches would take longer than small ones


@dataclass(frozen=True)
class ScoreMap:
    """Scores of W words on the cells of an image, and how they lie on its pixels.

    Attributes:
        cells: float32 ``[W, a, b]``, the cells of all windows side by side.
        rows, columns: maps ``[H, a]`` and ``[W, b]`` to the pixels, see :meth:`ovseg.windows.Axis.matrix`.
        probability: whether the scores are probabilities (after key smoothing) instead of cosines.
    """

    cells: Tensor
    rows: AxisMap
    columns: AxisMap
    probability: bool = False

    @classmethod
    def of(cls, maps: Tensor, windows: Windows, height: int, width: int, probability: bool = False) -> ScoreMap:
        """Scores ``[windows, W, h, w]`` of one image whose labels are to be ``height`` x ``width`` pixels."""
        h, w = maps.shape[-2:]
        rows, columns = windows.rows.matrix(height, h), windows.columns.matrix(width, w)
        return cls(windows.join(maps), AxisMap.of(rows, maps.device), AxisMap.of(columns, maps.device), probability)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pixels."""
        return len(self.rows), len(self.columns)

    def band(self, start: int, stop: int) -> Tensor:
        """Scores ``[W, stop - start, width]`` of some rows of pixels."""
        return spread(self.cells, self.rows[start:stop], self.columns)

    def only(self, words: Tensor) -> ScoreMap:
        """The map of some of the words (indices or a mask)."""
        return replace(self, cells=self.cells[words])


@dataclass(frozen=True)
class Smoothing:
    """PAMR after upsampling.

    Attributes:
        image: float ``[3, h, w]``, the network's input; it is resized bilinearly to the labels' size.
        steps, dilations: see :func:`ovseg.pamr.pamr`.
    """

    image: Tensor
    steps: int
    dilations: Sequence[int]

    def bands(self, scores: ScoreMap, budget: int = PAMR_BUDGET) -> Iterator[tuple[int, int, Tensor]]:
        """(first row, end, refined scores) of every band."""
        height, width = scores.size
        rows, columns = (
            AxisMap.of(interpolation(source, target).float(), self.image.device)
            for source, target in zip(self.image.shape[-2:], scores.size, strict=True)
        )
        for start, stop, low, high in bands(height, width, self.dilations, self.steps, budget):
            pixels = spread(self.image.float(), rows[low:high], columns)
            band = refine_rows(pixels, scores.band(low, high), self.dilations, self.steps, budget=budget)
            yield start, stop, band[:, start - low : stop - low]


@dataclass(frozen=True)
class LabelRule:
    """How the scores of words become the label of a pixel.

    Attributes:
        scale: factor of cosines before the softmax over words.
        background: label of everything unnamed; None for none.
        threshold: where the largest probability of a class is below, the label becomes ``background``.
        area: a foreground class with no more than this share of all foreground pixels is left out (SCLIP).
    """

    scale: float = 40.0
    background: int | None = None
    threshold: float | None = None
    area: float | None = None

    def __post_init__(self) -> None:
        if self.background is None and (self.threshold or self.area):
            raise ValueError("a background threshold and an area rule need a background class")


@dataclass(frozen=True)
class Labels:
    """What :func:`label_pixels` returns.

    Attributes:
        labels: uint8 ``[H, W]``.
        confidence: float32 ``[H, W]``, the probability of the best word of the label's class; None if not asked for.
    """

    labels: Tensor
    confidence: Tensor | None = None


def label_pixels(
    scores: ScoreMap,
    word_classes: Tensor,
    num_classes: int,
    rule: LabelRule,
    *,
    smoothing: Smoothing | None = None,
    confidence: bool = False,
    budget: int | None = None,
) -> Labels:
    """The label of every pixel.

    Softmax over words of ``scale`` times the cosine; a class has the largest probability among its words; the label is
    the class with the largest. Scores that are probabilities already are divided by their sum. Then the area rule, then
    the threshold.

    Args:
        word_classes: int64 ``[words]``, ascending: the class of each word.
        confidence: return the probability as well.
        budget: bytes of the largest tensors; by default what suits the device of the scores.
    """
    height, width = scores.size
    device = scores.cells.device
    if budget is None:
        budget = CUDA_BUDGET if device.type == "cuda" else BUDGET
    labels = torch.empty(height, width, dtype=torch.uint8, device=device)
    kept = torch.empty(height, width, device=device) if confidence else None
    allowed = None
    merge = _WordMerge(word_classes, num_classes, device)
    if rule.area is not None:
        areas = torch.zeros(num_classes, dtype=torch.int64, device=device)
        one = areas.new_ones(())
        for _, _, band in _bands(scores, smoothing, budget):
            found = merge(band).max(0).indices.flatten()
            areas.index_add_(0, found, one.expand_as(found))  # unlike bincount, which waits for the largest label
        areas[rule.background] = 0
        allowed = areas > rule.area * areas.sum()
        allowed[rule.background] = True
    for start, stop, band in _bands(scores, smoothing, budget):
        if confidence or rule.threshold:
            total = _total(band, scores.probability, rule.scale)
        classes = merge(band)
        if allowed is not None:
            classes.masked_fill_(~allowed[:, None, None], float("-inf"))
        best, label = classes.max(0)
        if confidence or rule.threshold:
            probability = best / total if scores.probability else (rule.scale * best - total).exp()
            if rule.threshold:
                label = torch.where(probability < rule.threshold, rule.background, label)
            if kept is not None:
                kept[start:stop] = probability
        labels[start:stop] = label
    return Labels(labels, kept)


def _bands(scores: ScoreMap, smoothing: Smoothing | None, budget: int) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, end, scores [words, rows, width]) of every band of an image."""
    if smoothing is not None and smoothing.steps:
        yield from smoothing.bands(scores, max(budget, PAMR_BUDGET))
        return
    height, width = scores.size
    # Three tensors of a band live at a time: the scores, their classes, and those that are put together.
    rows = max(1, budget // (3 * 4 * width * len(scores.cells)))
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        yield start, stop, scores.band(start, stop)


def _total(band: Tensor, probability: bool, scale: float) -> Tensor:
    """``[rows, width]``: log of the denominator of the softmax over words; of probabilities, their sum."""
    return band.clamp(min=0).sum(0).clamp(min=1e-12) if probability else (scale * band).logsumexp(0)


class _WordMerge:
    """Scores of words to scores of classes: the largest of each class's words."""

    def __init__(self, word_classes: Tensor, num_classes: int, device: torch.device) -> None:
        counts = torch.bincount(word_classes, minlength=num_classes)
        if (word_classes.diff() < 0).any() or (counts == 0).any():
            raise ValueError("words must stand in the order of their classes, at least one for each")
        first = counts.cumsum(0) - counts
        words = zip(first.tolist(), counts.tolist(), strict=True)
        self.several = [(label, start, start + n) for label, (start, n) in enumerate(words) if n > 1]
        self.first = first.to(device, non_blocking=True)

    def __call__(self, band: Tensor) -> Tensor:
        """``[words, ...] -> [classes, ...]``; the same tensor where no class has synonyms."""
        if not self.several:
            return band
        merged = band[self.first]
        for label, start, end in self.several:
            torch.amax(band[start:end], 0, out=merged[label])
        return merged
