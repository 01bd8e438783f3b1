"""Recall of Flickr30k Entities: is a box of the phrase among the first few that are answered?

Sentences are lines with marked phrases, ``[/EN#5/people A hand] touches ...``; boxes are XML files by image.
"""

from __future__ import annotations

import logging
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.engine.errors import UserError

log = logging.getLogger(__name__)

RANKS = (1, 5, 10)
MATCH = 0.5  # IoU of a hit
_MARKED = re.compile(r"\[/EN#(\d+)/(\S+) ([^\]]*)\]")


@dataclass(frozen=True)
class MarkedPhrase:
    """A phrase of a sentence: its words, the entity that it means, and the entity's types."""

    text: str
    entity: str
    kinds: tuple[str, ...]
    span: tuple[int, int]  # characters of the sentence without marks


def parse_sentence(line: str) -> tuple[str, list[MarkedPhrase]]:
    """(sentence without marks, its phrases)."""
    text, phrases, place = "", [], 0
    for found in _MARKED.finditer(line):
        text += line[place : found.start()]
        phrases.append(
            MarkedPhrase(found[3], found[1], tuple(found[2].split("/")), (len(text), len(text) + len(found[3])))
        )
        text += found[3]
        place = found.end()
    return text + line[place:], phrases


def read_boxes(path: Path) -> dict[str, list[list[float]]]:
    """Boxes (xyxy) of each entity in an annotation file; those only said to be in the picture have none.

    Raises:
        UserError: missing or damaged.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f"data.sentences: {path} cannot be read ({error}); give Flickr30k Entities' folder") from error
    boxes: dict[str, list[list[float]]] = defaultdict(list)
    for entry in root.iter("object"):
        box = entry.find("bndbox")
        if box is None:
            continue
        corners = [float(box.findtext(k, "nan")) - 1 for k in ("xmin", "ymin", "xmax", "ymax")]
        for name in entry.iter("name"):
            boxes[name.text or ""].append(corners)
    return dict(boxes)


def read_entities(folder: str | Path, images: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, dict]]:
    """(sentences of each image, boxes of each image's entities) from ``Sentences`` and ``Annotations`` of a folder.

    Raises:
        UserError: missing or damaged files.
    """
    folder = Path(folder)
    sentences, boxes = {}, {}
    for image in images:
        file = folder / "Sentences" / f"{image}.txt"
        try:
            sentences[image] = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            reason = f"{file} cannot be read ({error}); give Flickr30k Entities' folder"
            raise UserError(f"data.sentences: {reason}") from error
        boxes[image] = read_boxes(folder / "Annotations" / f"{image}.xml")
    return sentences, boxes


def boxes_by_phrase(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, phrases: int) -> list[list[list[float]]]:
    """Detections of an image as lists by phrase, best first, each closed by an empty box, as the recall expects.

    Args:
        boxes: ``[N, 4]`` xyxy; labels: ``[N]``, 0..phrases-1.
    """
    order = np.argsort(-scores, kind="stable")
    result: list[list[list[float]]] = [[] for _ in range(phrases)]
    for i in order:
        result[int(labels[i])].append([float(v) for v in boxes[i]])
    return [[*found, [0.0, 0.0, 0.0, 0.0]] for found in result]


def _overlaps(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """IoU ``[N, M]``; coordinates are of pixels, the last one inside."""
    low, high = np.maximum(found[:, None, :2], truth[:, :2]), np.minimum(found[:, None, 2:], truth[:, 2:])
    shared = np.clip(high - low + 1, 0, None).prod(-1)
    area = [(b[:, 2:] - b[:, :2] + 1).prod(-1) for b in (found, truth)]
    return shared / (area[0][:, None] + area[1] - shared)


def merge_boxes(boxes: Sequence[Sequence[float]]) -> list[list[float]]:
    """The box around all boxes."""
    values = np.asarray(boxes, float)
    return [[*values[:, :2].min(0).tolist(), *values[:, 2:].max(0).tolist()]]


def recall(
    sentences: Mapping[str, Sequence[str]],
    boxes: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    answers: Mapping[tuple[str, int], Sequence[Sequence[Sequence[float]]]],
    *,
    merged: bool = False,
) -> dict[str, dict[str, float]]:
    """Share of phrases of which one of the first k boxes overlaps a true one by half.

    Args:
        sentences: of each image, marked; boxes: of each image's entities.
        answers: (image, number of the sentence) to the boxes of each phrase with true boxes, best first, in the order
            of the sentence.
        merged: judge against the box around all of a phrase's, instead of any of them.

    Returns:
        ``"R@1"``, ``"R@5"``, ``"R@10"`` and ``"upper bound"`` (any number), each by type of phrase and for ``"all"``.

    Raises:
        UserError: answers for another number of phrases than a sentence has.
    """
    ranks = {f"R@{k}": k for k in RANKS} | {"upper bound": None}
    hits: dict[str, dict[str, list[bool]]] = {name: defaultdict(list) for name in ranks}
    for image, lines in sentences.items():
        for number, line in enumerate(lines):
            phrases = [p for p in parse_sentence(line)[1] if boxes[image].get(p.entity)]
            answer = answers.get((image, number), [[] for _ in phrases])
            if len(answer) != len(phrases):
                raise UserError(
                    f"image {image}, sentence {number}: {len(answer)} phrases answered, but {len(phrases)} have boxes"
                )
            for phrase, found in zip(phrases, answer, strict=True):
                true = boxes[image][phrase.entity]
                true = np.asarray(merge_boxes(true) if merged else true, float).reshape(-1, 4)
                good = _overlaps(np.asarray(found, float).reshape(-1, 4), true).max(1, initial=0) >= MATCH
                for name, k in ranks.items():
                    hit = bool(good[:k].any())
                    for kind in ("all", *phrase.kinds):
                        hits[name][kind].append(hit)
    return {name: {kind: float(np.mean(values)) for kind, values in kinds.items()} for name, kinds in hits.items()}
