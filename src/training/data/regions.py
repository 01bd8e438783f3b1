"""Where the regions of an image come from: cells of a grid, annotated boxes, or both.

A source draws the regions of an image anew in each epoch. Its answers are numbered for each image, so that what a
teacher says of a region can be kept: see :meth:`RegionSource.answer_offsets`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.data.grid import grid_regions
from training.data.options import RegionOptions
from training.data.proposals import draw_proposals, eligible, proposal_regions
from training.engine.data.annotations import Annotations


@dataclass(frozen=True)
class Drawn:
    """K regions of an image.

    Attributes:
        boxes: float32 ``[K, 4]``, xyxy in pixels of the image.
        crop_boxes: float32 ``[K, 4]``, what is shown to a teacher of crops.
        annotation: int64 ``[K]``, the annotation of the image (counted from 0) that a region is; -1 for none.
        answers: int64 ``[K]``, the row of each region among the image's answers.
    """

    boxes: np.ndarray
    crop_boxes: np.ndarray
    annotation: np.ndarray
    answers: np.ndarray


class RegionSource:
    """Base: draws regions of the images of ``annotations``.

    Attributes:
        repeats: whether an image has one finite set of regions over all epochs, so that answers can be kept.
        reads_annotations: whether annotations become regions.
        needs_annotations: whether an image without a usable annotation teaches nothing.
        depends_on: options that decide which regions those are.
    """

    repeats = False
    reads_annotations = False
    needs_annotations = False
    depends_on: tuple[str, ...] = ("max_boxes", "max_split", "grid", "crop_scale")

    def __init__(self, annotations: Annotations, options: RegionOptions) -> None:
        self.annotations, self.options = annotations, options

    def draw(self, row: int, width: int, height: int, rng: np.random.Generator) -> Drawn:
        """Regions of image ``row``, ``width`` x ``height`` pixels, for one epoch."""
        raise NotImplementedError

    def every(self, row: int, width: int, height: int, rng: np.random.Generator) -> Drawn:
        """All regions of an image that training can meet; ``rng`` as :meth:`draw` gets it."""
        return self.draw(row, width, height, rng)

    def answer_offsets(self) -> np.ndarray:
        """int64 ``[N + 1]``: image i has rows ``offsets[i]:offsets[i + 1]`` for answers to its regions."""
        return np.arange(len(self.annotations) + 1, dtype=np.int64) * self.options.max_boxes

    def usable(self) -> np.ndarray:
        """bool ``[N]``: images with something to draw."""
        return np.ones(len(self.annotations), bool)

    def key(self) -> dict[str, object]:
        """What the regions and their crops depend on besides the annotations and the seed, for caches."""
        return {"source": type(self).__name__, **{name: getattr(self.options, name) for name in self.depends_on}}


class GridCells(RegionSource):
    """Cells of one random grid of an image (CLIPSelf, ICLR 2024)."""

    def __init__(self, annotations: Annotations, options: RegionOptions) -> None:
        super().__init__(annotations, options)
        self.repeats = options.fixed_regions

    def draw(self, row: int, width: int, height: int, rng: np.random.Generator) -> Drawn:
        return self.cells(width, height, rng, self.options.max_boxes)

    def cells(self, width: int, height: int, rng: np.random.Generator, most: int) -> Drawn:
        """At most ``most`` cells."""
        options = self.options
        boxes, crops = grid_regions(
            width, height, rng, max_split=options.max_split, max_boxes=most, crop_scale=options.crop_scale,
            kind=options.grid,
        )  # fmt: skip
        return Drawn(boxes, crops, np.full(len(boxes), -1), np.arange(len(boxes)))


class Proposals(RegionSource):
    """Random annotations with enlarged crops; where none is usable, the top-left quarter of the image stands in."""

    repeats = True
    reads_annotations = True
    needs_annotations = True
    depends_on = ("min_size", "max_size")

    def draw(self, row: int, width: int, height: int, rng: np.random.Generator) -> Drawn:
        return self._of(row, self.drawn(row, rng, self.options.max_boxes), width, height)

    def drawn(self, row: int, rng: np.random.Generator, most: int) -> np.ndarray:
        """At most ``most`` annotations of an image, counted from 0; those outside the size limits are left out."""
        options, annotated = self.options, self.annotations.boxes[self.annotations.of(row)]
        return draw_proposals(annotated, rng, max_boxes=most, min_size=options.min_size, max_size=options.max_size)

    def _of(self, row: int, drawn: np.ndarray, width: int, height: int) -> Drawn:
        own = self.annotations.of(row)
        boxes, crops = proposal_regions(self.annotations.boxes[own], drawn, width, height)
        if len(drawn) == 0:  # the last row of an image is that of the region that stands in
            return Drawn(boxes, crops, np.array([-1]), np.array([own.stop - own.start]))
        return Drawn(boxes, crops, drawn, drawn)

    def every(self, row: int, width: int, height: int, rng: np.random.Generator) -> Drawn:
        options, annotated = self.options, self.annotations.boxes[self.annotations.of(row)]
        drawn = np.flatnonzero(eligible(annotated, options.min_size, options.max_size))
        found = self._of(row, drawn, width, height)
        # Training meets the region that stands in only where a draw can come out empty.
        if len(drawn) == 0 or len(drawn) == len(annotated):
            return found
        more = self._of(row, drawn[:0], width, height)
        return Drawn(*(np.concatenate([getattr(found, k), getattr(more, k)]) for k in Drawn.__dataclass_fields__))

    def answer_offsets(self) -> np.ndarray:
        return self.annotations.offsets + np.arange(len(self.annotations) + 1)

    def usable(self) -> np.ndarray:
        kept = eligible(self.annotations.boxes, self.options.min_size, self.options.max_size)
        return np.diff(np.concatenate([[0], np.cumsum(kept)])[self.annotations.offsets]) > 0


class Mixed(GridCells):
    """Annotated boxes and grid cells of one image: boxes for ``proposal_share`` of the regions, cells for the rest."""

    reads_annotations = True
    depends_on = (*GridCells.depends_on, *Proposals.depends_on, "proposal_share")

    def __init__(self, annotations: Annotations, options: RegionOptions) -> None:
        super().__init__(annotations, options)
        self.proposals = Proposals(annotations, options)

    def draw(self, row: int, width: int, height: int, rng: np.random.Generator) -> Drawn:
        most = self.options.max_boxes
        drawn = self.proposals.drawn(row, rng, round(self.options.proposal_share * most))
        cells = self.cells(width, height, rng, most - len(drawn))
        if len(drawn) == 0:
            return cells
        boxes = self.proposals._of(row, drawn, width, height)
        found = {k: np.concatenate([getattr(boxes, k), getattr(cells, k)]) for k in Drawn.__dataclass_fields__}
        return Drawn(**{**found, "answers": np.arange(len(found["boxes"]))})

    def usable(self) -> np.ndarray:
        """bool ``[N]``: images with a box among their regions; the others have cells alone."""
        return self.proposals.usable()


class Labelled(RegionSource):
    """The first annotations of an image that have a category (RegionCLIP); crops are not made."""

    reads_annotations = True
    needs_annotations = True
    repeats = True

    def draw(self, row: int, width: int, height: int, rng: np.random.Generator) -> Drawn:
        own = self.annotations.of(row)
        known = np.flatnonzero(self.annotations.labels[own] >= 0)[: self.options.max_boxes]
        boxes = self.annotations.boxes[own][known].astype(np.float32)
        return Drawn(boxes, boxes, known, known)

    def usable(self) -> np.ndarray:
        kept = np.concatenate([[0], np.cumsum(self.annotations.labels >= 0)])
        return np.diff(kept[self.annotations.offsets]) > 0
