"""Data sets as sources of examples: an image file, its boxes, a text, and the characters of each box's phrase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.random import Generator

from ovdet.glip.data.classes import ClassTexts
from ovdet.glip.data.fewshot import choose_shots
from ovdet.glip.data.packing import draw_number, pack
from ovdet.glip.data.records import Records
from ovdet.glip.data.tsv import TsvImages
from ovdet.glip.tokens import Span, Tokenizer
from training.engine.data.images import resolve
from training.engine.data.records import Annotations
from training.engine.errors import UserError

LEAST_SIDE = 1.0  # an object that trains has longer sides, in pixels


@dataclass
class Example:
    """One image with its text.

    Attributes:
        image: path, or the bytes of the file; name: for messages.
        boxes: float32 ``[N, 4]``, xyxy in pixels of the image.
        text: all of it; spans: the characters of each box's phrase.
        image_id: as annotated.
    """

    image: str | bytes
    name: str
    boxes: np.ndarray
    text: str
    spans: list[list[Span]]
    image_id: int


class Source(Protocol):
    """What a training set is made of."""

    def __len__(self) -> int: ...

    def read(self, index: int, rng: Generator) -> Example:
        """Example of a row; random choices come from ``rng``. ImageError for a file name outside of the root."""
        ...


class DetectionSource:
    """Objects with classes; the text is written from class names.

    Args:
        annotations: COCO-style, crowds are left out.
        root: image root.
        texts: writes class names, by label.
        shots: images for each class, 0 for all; shot_seed: see :func:`ovdet.glip.data.fewshot.choose_shots`.
        keep_empty: images without objects as well.
        key: what the set was given as, for messages.

    Raises:
        UserError: no image is left.
    """

    def __init__(
        self,
        annotations: Annotations,
        *,
        root: str,
        texts: ClassTexts,
        shots: int = 0,
        shot_seed: int | None = None,
        keep_empty: bool = False,
        key: str = "data set",
    ) -> None:
        self.annotations, self.root, self.texts = annotations, root, texts
        sides = annotations.boxes[:, 2:] - annotations.boxes[:, :2]
        self.usable = ~annotations.crowd & (sides > LEAST_SIDE).all(1) & np.isin(annotations.labels, texts.labels)
        present = {
            row: annotations.labels[annotations.of(row)][self.usable[annotations.of(row)]].tolist()
            for row in range(len(annotations))
        }
        if shots:
            by_id = {int(annotations.image_ids[row]): labels for row, labels in present.items()}
            chosen = set(choose_shots(by_id, texts.labels, shots, shot_seed))
            self.rows = [row for row in present if int(annotations.image_ids[row]) in chosen]
        else:
            self.rows = [row for row, labels in present.items() if labels or keep_empty]
        if not self.rows:
            raise UserError(f"{key} {annotations.file}: no image has an object that can be used")

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int, rng: Generator) -> Example:
        """Objects of an image with a prompt of their classes and sampled others."""
        row, data = self.rows[index], self.annotations
        chosen = np.arange(data.offsets[row], data.offsets[row + 1])
        chosen = chosen[self.usable[chosen]]
        text, spans = self.texts.write(data.labels[chosen].tolist(), rng)
        chosen = chosen[[label in spans for label in data.labels[chosen].tolist()]] if len(chosen) else chosen
        name = data.file_name(row)
        return Example(
            image=resolve(self.root, name),
            name=name,
            boxes=data.boxes[chosen],
            text=text,
            spans=[[spans[label]] for label in data.labels[chosen].tolist()],
            image_id=int(data.image_ids[row]),
        )

    def shot_counts(self) -> Counter[str]:
        """How many objects of each class the chosen images hold."""
        data = self.annotations
        return Counter(data.names[i] for r in self.rows for i in data.labels[data.of(r)][self.usable[data.of(r)]])


class GroundingSource:
    """Captions whose phrases have boxes.

    Args:
        records: those without boxes are left out: what their phrases mean is not known.
        root: image root; unused with ``pictures``.
        tokenizer: counts tokens for packing.
        packing: put other captions of the set around an image's own.
        pictures: where pictures come from, if not from files.

    Raises:
        UserError: no record has a box.
    """

    def __init__(
        self,
        records: Records,
        *,
        root: str,
        tokenizer: Tokenizer,
        packing: bool = False,
        pictures: TsvImages | None = None,
        key: str = "data set",
    ) -> None:
        self.records, self.root, self.tokenizer, self.packing, self.pictures = (
            records,
            root,
            tokenizer,
            packing,
            pictures,
        )
        self.rows: Sequence[int] = np.flatnonzero(np.diff(records.offsets)).tolist()
        if not self.rows:
            raise UserError(f"{key} {records.file}: no caption has a phrase with a box")

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int, rng: Generator) -> Example:
        """Boxes of an image with its caption."""
        row, data = self.rows[index], self.records
        boxes, name, text = data.of(row), data.images[row], data.captions[row]
        spans = [data.spans_of(i) for i in range(boxes.start, boxes.stop)]
        if self.packing:

            def other() -> str:
                return data.captions[int(rng.integers(0, len(data)))]

            text, spans = pack(text, spans, other, draw_number(rng), self.tokenizer, rng)
        image = resolve(self.root, name) if self.pictures is None else self.pictures.content(name)
        return Example(image, name, data.boxes[boxes], text, spans, int(data.ids[row]))
