"""Proposals of all images of a data set in a folder of arrays, which open as memory maps whatever their number."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.engine.data.images import first_line
from training.engine.data.keyed import check_key, write_key, writing
from training.engine.data.records import Annotations, Strings
from training.engine.errors import UserError
from training.engine.files import replacing

FORMAT = 1
ARRAYS = ("image_ids", "name_bytes", "name_offsets", "offsets", "boxes", "scores")
PART_IMAGES = 1000  # images of a part, while the list is being made


@dataclass
class ProposalList:
    """Boxes by image, each image's best first. Image i has the rows ``offsets[i]:offsets[i + 1]``.

    Attributes:
        folder: where they are; hash: of all arrays, 32 hexadecimal digits; key: what they were made with.
        image_ids: int64 ``[N]``; names: file names.
        offsets: int64 ``[N + 1]``; boxes: float32 ``[R, 4]``, xyxy in pixels of the upright image; scores: float32
            ``[R]``, objectness in 0..1.
    """

    folder: str
    hash: str
    key: dict[str, Any]
    image_ids: np.ndarray
    names: Strings
    offsets: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.image_ids)

    def of(self, row: int) -> slice:
        """Rows of an image."""
        return slice(int(self.offsets[row]), int(self.offsets[row + 1]))

    @classmethod
    def open(cls, folder: str | Path, flag: str = "data.proposals") -> ProposalList:
        """A list that is complete; boxes and scores stay on disk until they are asked for.

        Raises:
            UserError: there is none, or it is incomplete or damaged.
        """
        where, remedy = f"{flag} {folder or '(empty)'}", "ViLD/make_proposals.py makes it"
        if not folder or not Path(folder).is_dir():
            raise UserError(f"{where}: no such folder; {remedy}")
        try:
            head = json.loads((Path(folder) / "list.json").read_text(encoding="utf-8"))
            if head["format"] != FORMAT:
                raise ValueError(f"format {head['format']}")
            arrays = {name: np.load(Path(folder) / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        except FileNotFoundError:
            raise UserError(f"{where}: holds no complete list of proposals; {remedy}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where}: is damaged ({first_line(error)}); delete it, {remedy}") from None
        for name in ("image_ids", "offsets", "name_bytes", "name_offsets"):
            arrays[name] = np.array(arrays[name])
        names = Strings(arrays.pop("name_bytes"), arrays.pop("name_offsets"))
        made = cls(str(folder), head["hash"], head["key"], names=names, **arrays)
        shapes = (len(made.offsets) - 1, len(names), len(made.boxes), len(made.scores))
        if shapes != (len(made), len(made), made.offsets[-1], made.offsets[-1]):
            raise UserError(f"{where}: is damaged (its arrays do not fit each other); delete it, {remedy}")
        return made

    def is_undamaged(self) -> bool:
        """Whether the arrays are what they were when the list was written; all bytes are read."""
        return self.hash == _hash(self._arrays())

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            "image_ids": self.image_ids, "name_bytes": self.names.data, "name_offsets": self.names.offsets,
            "offsets": self.offsets, "boxes": self.boxes, "scores": self.scores,
        }  # fmt: skip

    def rows_of(self, annotations: Annotations) -> np.ndarray:
        """Row in this list of each image of an annotation file, int64 ``[N]``.

        Raises:
            UserError: an image is not in the list, or under another file name.
        """
        known = {int(i): row for row, i in enumerate(self.image_ids)}
        rows = np.array([known.get(int(i), -1) for i in annotations.image_ids], np.int64)
        lacking = np.flatnonzero(rows < 0)
        if len(lacking):
            raise UserError(
                f"data.proposals {self.folder}: no proposals of {len(lacking)} of the {len(rows)} images of "
                f"{annotations.file} (first: {annotations.file_name(int(lacking[0]))}); make them for this file"
            )
        for image, row in enumerate(rows):
            if annotations.file_name(image) != self.names[int(row)]:
                raise UserError(
                    f"data.proposals {self.folder}: image {annotations.image_ids[image]} is {self.names[int(row)]} "
                    f"there, and {annotations.file_name(image)} in {annotations.file}; make them for this file"
                )
        return rows


class ProposalWriter:
    """Makes a :class:`ProposalList` in parts, by several processes, and goes on where an earlier one was interrupted.

    Args:
        folder: of the list.
        annotations: its images.
        key: everything that proposals depend on, as plain values; a folder with others is refused.

    Raises:
        UserError: the folder holds a list made with another key, or something else.
    """

    def __init__(self, folder: str | Path, annotations: Annotations, key: dict[str, Any]) -> None:
        self.folder, self.annotations = Path(folder), annotations
        names = annotations.file_names
        images = {"image_ids": annotations.image_ids, "name_bytes": names.data, "name_offsets": names.offsets}
        self.key = {**key, "images": _hash(images)}
        self.parts = -(-len(annotations) // PART_IMAGES)
        self.where = f"--out {folder}"
        check_key(self.folder, self.key, self.where)

    @property
    def is_complete(self) -> bool:
        """Whether the list is there."""
        return (self.folder / "list.json").is_file()

    def images_of(self, part: int) -> range:
        """Images of a part."""
        return range(part * PART_IMAGES, min((part + 1) * PART_IMAGES, len(self.annotations)))

    def missing(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Parts that this process has to make."""
        return [p for p in range(rank, self.parts, world_size) if not self._part(p).is_file()]

    def create(self) -> None:
        """Make the folder and say in it what it is for. UserError where that cannot be done."""
        with writing(self.where):
            write_key(self.folder, self.key)
            (self.folder / "parts").mkdir(exist_ok=True)

    def write(self, part: int, found: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Keep (boxes ``[K, 4]``, scores ``[K]``) of each image of a part.

        Raises:
            UserError: the disk is full or not writable; nothing is left behind.
        """
        content = io.BytesIO()
        np.savez(
            content, counts=np.array([len(b) for b, _ in found], np.int64),
            boxes=np.concatenate([b for b, _ in found] or [np.zeros((0, 4))]).astype(np.float32),
            scores=np.concatenate([s for _, s in found] or [np.zeros(0)]).astype(np.float32),
        )  # fmt: skip
        self._save(self._part(part), content.getvalue())

    def finish(self) -> ProposalList:
        """Put the parts together, when all are there, and open the list; process 0 calls it."""
        parts = [np.load(self._part(p)) for p in range(self.parts)]
        names = self.annotations.file_names
        arrays = {
            "image_ids": np.asarray(self.annotations.image_ids),
            "name_bytes": np.asarray(names.data),
            "name_offsets": np.asarray(names.offsets),
            "offsets": np.cumsum(np.concatenate([[0], *(p["counts"] for p in parts)]), dtype=np.int64),
            "boxes": np.concatenate([p["boxes"] for p in parts]),
            "scores": np.concatenate([p["scores"] for p in parts]),
        }
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array)
            self._save(self.folder / f"{name}.npy", content.getbuffer())
        head = {"format": FORMAT, "hash": _hash(arrays), "boxes": len(arrays["boxes"]), "key": self.key}
        self._save(self.folder / "list.json", (json.dumps(head, indent=1) + "\n").encode())
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        return ProposalList.open(self.folder, "--out")

    def _part(self, part: int) -> Path:
        return self.folder / "parts" / f"{part:05d}.npz"

    def _save(self, path: Path, content: bytes | memoryview) -> None:
        with writing(self.where), replacing(path) as file:
            file.write(content)


def _hash(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(arrays.items()):
        digest.update(name.encode())
        for start in range(0, max(len(array), 1), 2**22):  # a map is read in pieces
            digest.update(np.ascontiguousarray(array[start : start + 2**22]))
    return digest.hexdigest()
