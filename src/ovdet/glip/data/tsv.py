"""TSV sets: pictures as base64 text in one large file, labels in another, found by byte offsets.

A YAML file names them: ``img`` (key, base64 of the file), ``label`` (key, json), and optionally ``hw`` and
``linelist`` (rows of ``img`` to use, in order). Each has a ``.lineidx`` beside it; it is built where it is missing.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ovdet.glip.data.captions import add_caption
from ovdet.glip.data.records import Builder, Records
from training.engine.errors import UserError

log = logging.getLogger(__name__)


class TsvFile:
    """Rows of a TSV file by number. Every process opens it for itself.

    Args:
        path: the ``.tsv``; its ``.lineidx`` holds the byte offset of each row, one a line.

    Raises:
        UserError: missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; the YAML of a TSV set names files beside itself")
        index = self.path.with_suffix(".lineidx")
        self.offsets = np.loadtxt(index, dtype=np.int64, ndmin=1) if index.is_file() else self._index()
        self._opened: tuple[int, BinaryIO] | None = None

    def _index(self) -> np.ndarray:
        log.info("%s has no .lineidx: its rows are counted", self.path)
        offsets, place = [], 0
        with open(self.path, "rb") as file:
            for line in file:
                offsets.append(place)
                place += len(line)
        return np.array(offsets, np.int64)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def row(self, number: int) -> list[str]:
        """Fields of a row."""
        if self._opened is None or self._opened[0] != os.getpid():  # a fork would share the position in the file
            self._opened = (os.getpid(), open(self.path, "rb"))
        file = self._opened[1]
        file.seek(int(self.offsets[number]))
        return file.readline().decode("utf-8").rstrip("\r\n").split("\t")


class TsvImages:
    """Pictures of a TSV set by key."""

    def __init__(self, images: TsvFile, rows: dict[str, int]) -> None:
        self.file, self.rows = images, rows

    def content(self, key: str) -> bytes:
        """Bytes of a picture's file. ValueError where the row holds no base64."""
        try:
            return base64.b64decode(self.file.row(self.rows[key])[1], validate=True)
        except (binascii.Error, IndexError) as error:
            raise ValueError(f"row {self.rows[key]} of {self.file.path} holds no base64") from error


def load_tsv(path: str, *, key: str, score: float = 0.0, overlap: float = -1.0) -> tuple[Records, TsvImages]:
    """Captions and pictures of a TSV set.

    Args:
        path: the YAML file; others: see :func:`ovdet.glip.data.captions.load_captions`.

    Raises:
        UserError: missing files, another form, or no usable record.
    """
    import yaml

    try:
        names = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{key} {path}: cannot be read ({' '.join(str(error).split())[:120]})") from error
    if not isinstance(names, dict) or not {"img", "label"} <= names.keys():
        raise UserError(f"{key} {path}: names no img and label; give the YAML of a TSV set")
    folder = Path(path).parent
    images, labels = TsvFile(folder / names["img"]), TsvFile(folder / names["label"])
    if names.get("linelist"):
        lines = (folder / names["linelist"]).read_text(encoding="utf-8").split()
        chosen = [int(line) for line in lines]
    else:
        chosen = list(range(len(images)))
    if len(labels) < len(images):
        raise UserError(f"{key} {path}: {len(labels)} labels for {len(images)} pictures; one of the files is cut off")
    builder, rows = Builder(path), {}
    for identity, row in enumerate(chosen):
        name, *rest = labels.row(row)
        try:
            entry = json.loads(rest[0]) if rest else None
        except ValueError:
            entry = None
        if isinstance(entry, list):  # one caption with its objects
            entry = entry[0] if entry else None
        rows[name] = row
        add_caption(builder, entry, identity=identity, image=name, score=score, overlap=overlap)
    return builder.finish(key), TsvImages(images, rows)
