"""Images with captions, and boxes with the characters they stand for, as compact arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ovdet.glip.tokens import Span
from training.engine.data.records import Strings, log_left_out
from training.engine.errors import UserError


@dataclass
class Records:
    """Captioned images. Record i owns the boxes ``offsets[i]:offsets[i + 1]``, box j the spans of ``span_offsets``.

    Arrays rather than dicts: worker processes share them, and a caption set has millions of boxes.

    Attributes:
        file: where they come from, for messages.
        ids: int64 ``[N]``; images: N file names; captions: N texts.
        boxes: float32 ``[A, 4]``, xyxy in pixels of the image; scores: float32 ``[A]``, 1 where the file has none.
        spans: int32 ``[S, 2]``, characters of the caption; span_offsets: int64 ``[A + 1]``.
        extra: further values by record, such as the sentence of an image.
        skipped: what was left out, by reason.
    """

    file: str
    ids: np.ndarray
    images: Strings
    captions: Strings
    offsets: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    spans: np.ndarray
    span_offsets: np.ndarray
    extra: list[dict[str, Any]]
    skipped: dict[str, int]

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, index: int) -> slice:
        """Boxes of a record."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def spans_of(self, box: int) -> list[Span]:
        """Spans of a box."""
        begin, end = self.span_offsets[box : box + 2]
        return [(int(b), int(e)) for b, e in self.spans[begin:end]]


@dataclass
class Builder:
    """Collects records; what cannot be used is counted by reason.

    Attributes:
        file: stands in messages.
        extra: whether further values are kept.
    """

    file: str
    extra: bool = False
    skipped: Counter[str] = field(default_factory=Counter)
    _ids: list[int] = field(default_factory=list)
    _images: list[str] = field(default_factory=list)
    _captions: list[str] = field(default_factory=list)
    _counts: list[int] = field(default_factory=list)
    _boxes: list[Sequence[float]] = field(default_factory=list)
    _scores: list[float] = field(default_factory=list)
    _spans: list[list[Span]] = field(default_factory=list)
    _extra: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        identity: int,
        image: str,
        caption: str,
        objects: Sequence[tuple[Sequence[float], float, Sequence[Span]]],
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Add an image: ``objects`` are (box xyxy, score, spans), checked by :func:`read_object`."""
        self._ids.append(identity)
        self._images.append(image)
        self._captions.append(caption)
        self._counts.append(len(objects))
        for box, score, spans in objects:
            self._boxes.append(box)
            self._scores.append(score)
            self._spans.append(list(spans))
        if self.extra:
            self._extra.append(extra or {})

    def finish(self, key: str) -> Records:
        """The records; ``key`` is what the file was given as, for messages. UserError when there are none."""
        log_left_out(f"{key} {self.file}", self.skipped)
        if not self._ids:
            raise UserError(f"{key} {self.file}: holds no image with a caption; give a grounding or caption file")
        spans = [span for group in self._spans for span in group]
        return Records(
            file=self.file,
            ids=np.array(self._ids, np.int64),
            images=Strings.of(self._images),
            captions=Strings.of(self._captions),
            offsets=np.cumsum([0, *self._counts], dtype=np.int64),
            boxes=np.array(self._boxes, np.float32).reshape(-1, 4),
            scores=np.array(self._scores, np.float32),
            spans=np.array(spans, np.int32).reshape(-1, 2),
            span_offsets=np.cumsum([0, *map(len, self._spans)], dtype=np.int64),
            extra=self._extra,
            skipped=dict(self.skipped),
        )


def is_id(value: Any) -> bool:
    """Whether a json value can be an id."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**62


def read_box(value: Any, *, xywh: bool) -> tuple[str, tuple[float, ...]]:
    """(reason to leave a box out, or ""; its xyxy)."""
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        return "box without four numbers", ()
    if not all(type(v) in (int, float) and abs(v) < 1e7 for v in value):
        return "box without four finite numbers", ()
    x1, y1, x2, y2 = (float(v) for v in value)
    if xywh:
        x2, y2 = x1 + x2, y1 + y2
    if x2 <= x1 or y2 <= y1:
        return "box of zero or negative size", ()
    return "", (x1, y1, x2, y2)


def read_spans(value: Any, caption: str) -> tuple[str, list[Span]]:
    """(reason to leave a box out for its phrase, or ""; the phrase's spans): ``[[begin, end], ...]``."""
    if isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value):
        value = [value]
    if not isinstance(value, list) or not value:
        return "box without a phrase", []
    spans = []
    for pair in value:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(type(v) is int for v in pair):
            return "phrase whose span is no pair of whole numbers", []
        begin, end = pair
        if not 0 <= begin < end <= len(caption):
            return "phrase whose span is outside of the caption", []
        spans.append((begin, end))
    if not any(caption[b:e].strip() for b, e in spans):
        return "phrase of white space", []
    return "", spans
