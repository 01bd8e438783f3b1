"""What a sample may have besides image and regions: captions, captions of regions, classes of the image.

All are optional for each single image. An extra gives M values and, for each, what it belongs to: the image (0), or a
region (its place among the image's). Packed batches count on: images, or regions, of the whole batch.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.data.regions import Drawn
from training.engine.data.annotations import Annotations, Strings, read_captions, read_json
from training.engine.errors import UserError

log = logging.getLogger(__name__)

Tokenize = Callable[[list[str]], Tensor]


class Extra:
    """Base of the extras.

    Attributes:
        name: of the batch's entry; ``name + "_of"`` says what each value belongs to.
        unit: ``"image"`` or ``"region"``.
        found: images (of all) that have it.
    """

    name = ""
    unit = "image"
    found = 0

    def __call__(self, row: int, drawn: Drawn, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """(values ``[M, ...]``, int64 ``[M]`` what each belongs to) of image ``row``."""
        raise NotImplementedError

    def none(self) -> Tensor:
        """Values ``[0, ...]``, as a batch without any has them."""
        raise NotImplementedError


class _Texts(Extra):
    def __init__(self, tokenize: Tokenize) -> None:
        self.tokenize, self.length = tokenize, tokenize(["a"]).shape[1]

    def none(self) -> Tensor:
        return torch.zeros(0, self.length, dtype=torch.int64)

    def _tokens(self, texts: list[str]) -> Tensor:
        return self.tokenize(texts) if texts else self.none()


class ImageCaptions(_Texts):
    """One random caption of each image that has any: token ids ``[M, L]``, M at most 1 for an image."""

    name, unit = "captions", "image"

    def __init__(self, captions: list[list[str]], tokenize: Tokenize) -> None:
        super().__init__(tokenize)
        self.offsets = np.cumsum([0, *map(len, captions)])
        self.texts = Strings.of([text for own in captions for text in own])
        self.found = sum(map(bool, captions))

    def __call__(self, row: int, drawn: Drawn, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        first, last = self.offsets[row : row + 2]
        texts = [self.texts[int(rng.integers(first, last))]] if last > first else []
        return self._tokens(texts), torch.zeros(len(texts), dtype=torch.int64)


class RegionCaptions(_Texts):
    """The captions of an image's drawn boxes, where they have one: token ids ``[M, L]``.

    Args:
        captions: of each annotation, in the order of ``annotations.boxes``; "" for none.
    """

    name, unit = "region_captions", "region"

    def __init__(self, annotations: Annotations, captions: list[str], tokenize: Tokenize) -> None:
        super().__init__(tokenize)
        self.starts, self.texts = annotations.offsets[:-1], Strings.of(captions)
        owned = np.concatenate([[0], np.cumsum([bool(c) for c in captions])])[annotations.offsets]
        self.found = int((np.diff(owned) > 0).sum())

    def __call__(self, row: int, drawn: Drawn, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        texts, owners = [], []
        for place, number in enumerate(drawn.annotation.tolist()):
            text = self.texts[int(self.starts[row]) + number] if number >= 0 else ""
            if text:
                texts.append(text)
                owners.append(place)
        return self._tokens(texts), torch.tensor(owners, dtype=torch.int64)


class ImageClasses(Extra):
    """The classes of an image's annotations, each once: labels int64 ``[M]``."""

    name, unit = "classes", "image"

    def __init__(self, annotations: Annotations) -> None:
        self.annotations = annotations
        labelled = np.concatenate([[0], np.cumsum(annotations.labels >= 0)])[annotations.offsets]
        self.found = int((np.diff(labelled) > 0).sum())

    def none(self) -> Tensor:
        return torch.zeros(0, dtype=torch.int64)

    def __call__(self, row: int, drawn: Drawn, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        labels = np.unique(self.annotations.labels[self.annotations.of(row)])
        labels = torch.from_numpy(labels[labels >= 0].astype(np.int64))
        return labels, torch.zeros(len(labels), dtype=torch.int64)


def region_captions(content: dict[str, Any], annotations: Annotations) -> list[str]:
    """Captions of the annotations, from entries with both a box and a ``caption``; "" where there is none.

    Captions that are no text, or whose box is not among the usable annotations, are counted in
    ``annotations.skipped``.
    """
    image_row = {int(i): r for r, i in enumerate(annotations.image_ids)}
    place = {
        (row, *annotations.boxes[i].tolist()): i
        for row in range(len(annotations))
        for i in range(annotations.offsets[row], annotations.offsets[row + 1])
    }
    texts = [""] * len(annotations.boxes)
    bad: Counter[str] = Counter()
    entries = content.get("annotations")
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict) or "caption" not in entry or "bbox" not in entry:
            continue
        try:
            x, y, w, h = map(float, entry["bbox"])
            box = np.array([x, y, x + w, y + h], np.float32).tolist()
            index = place[(image_row[entry["image_id"]], *box)]
        except (KeyError, TypeError, ValueError, OverflowError):
            bad["region caption of a box that is not usable"] += 1
            continue
        if isinstance(entry["caption"], str) and entry["caption"].strip():
            texts[index] = entry["caption"]
        else:
            bad["region caption without text"] += 1
    annotations.skipped.update({k: annotations.skipped.get(k, 0) + n for k, n in bad.items()})
    return texts


def make_extras(
    fields: tuple[str, ...], annotations: Annotations, *, captions_file: str, tokenize: Tokenize | None
) -> list[Extra]:
    """The extras among ``fields``.

    Args:
        captions_file: COCO captions json or URL; "" for the captions of the annotation file itself (entries without a
            box).
        tokenize: texts -> ids ``[M, L]``; needed for captions.

    Raises:
        UserError: an unreadable file, or a field that not one image has.
    """
    path, made = annotations.file, []
    own = read_json(path, "--train-data") if {"captions", "region_captions"} & set(fields) else {}
    if "captions" in fields:
        source = read_json(captions_file, "--captions") if captions_file else own
        entries = source.get("annotations")
        if not captions_file and isinstance(entries, list):
            entries = [e for e in entries if isinstance(e, dict) and "caption" in e and "bbox" not in e]
        made.append(ImageCaptions(read_captions(entries, annotations), tokenize))
    if "region_captions" in fields:
        made.append(RegionCaptions(annotations, region_captions(own, annotations), tokenize))
    if "classes" in fields:
        made.append(ImageClasses(annotations))
    for extra in made:
        if not extra.found:
            where = captions_file if extra.name == "captions" and captions_file else path
            raise UserError(
                f"{where}: no image has any {extra.name.replace('_', ' ')}, which the method learns from: give a file "
                "that has them, or switch off the loss that needs them (weight 0)"
            )
        log.info("%s: %d of %d images have %s", path, extra.found, len(annotations), extra.name.replace("_", " "))
    return made
