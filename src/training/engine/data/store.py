"""Answers of a teacher on disk: float16 arrays that open as memory maps, in shards of images.

What a teacher says of a crop or of an image is the same in every epoch. Each image has rows of its own: one for each
region that training may meet (an embedding of its crop), or one for each cell of a map.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.engine.data.annotations import Annotations
from training.engine.data.keyed import NAME, check_key, write_key, writing
from training.engine.errors import UserError

FORMAT = 2
SHARD_IMAGES = 1000
LEFT_OVER = 600  # seconds after which an unfinished shard is no longer being written


class TeacherStore:
    """A folder of ``shard-NNNNN-CHECKSUM.npy`` and ``key.json``, which says what the answers belong to.

    A shard is written whole or not at all, and its name holds the checksum of its content; so an interrupted filling
    goes on where it was, and a damaged shard is found out. Rows are NaN where an image could not be read.

    Args:
        folder: of the store; made by :meth:`create`.
        offsets: int64 ``[N + 1]``, image i has the rows ``offsets[i]:offsets[i + 1]``.
        width: D, numbers of an answer.
        key: everything that the answers depend on, as plain values (see :func:`annotations_key`,
            :func:`images_key`).
        unit: ``"region"`` (a row answers for a region) or ``"image"`` (all rows of an image are one answer, a map).
        shard_images: images of a shard.
        flag: the option that names the folder, for messages.

    Raises:
        UserError: the folder holds a store of another key, or something else.
    """

    def __init__(
        self, folder: str | Path, offsets: np.ndarray, width: int, key: dict[str, Any], *, unit: str = "region",
        shard_images: int = SHARD_IMAGES, flag: str = "--cache-teacher",
    ) -> None:  # fmt: skip
        self.folder, self.offsets, self.width, self.unit = Path(folder), np.asarray(offsets), int(width), unit
        self.where = f"{flag} {folder}"
        self.key = {"format": FORMAT, "shard_images": shard_images, "width": self.width, "unit": unit, **key}
        self.shard_images = shard_images
        self.num_images = len(self.offsets) - 1
        self.num_shards = -(-self.num_images // shard_images)
        self._maps: dict[int, np.ndarray] = {}
        self._files: dict[int, Path] = {}
        check_key(self.folder, self.key, self.where)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a worker opens its own

    # -- layout -------------------------------------------------------------------------------------------------------

    def images_of(self, shard: int) -> range:
        """Images that a shard holds."""
        return range(shard * self.shard_images, min((shard + 1) * self.shard_images, self.num_images))

    def shape(self, shard: int) -> tuple[int, int]:
        """(rows, D) of a shard."""
        images = self.images_of(shard)
        return int(self.offsets[images.stop] - self.offsets[images.start]), self.width

    def rows(self, image: int, answers: Sequence[int] | np.ndarray) -> tuple[int, np.ndarray]:
        """(shard, rows in it) of an image's answers, which are counted from 0."""
        shard = image // self.shard_images
        first = self.offsets[image] - self.offsets[self.images_of(shard).start]
        return shard, first + np.asarray(answers, np.int64)

    # -- reading ------------------------------------------------------------------------------------------------------

    def answers(self, image: int, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """float16 ``[K, D]``, answers of an image by their numbers; NaN where the image could not be read."""
        shard, places = self.rows(image, rows)
        return self._map(shard)[places]  # a copy

    def of_image(self, image: int) -> np.ndarray:
        """float16 ``[N, D]``, all answers of an image."""
        shard, _ = self.rows(image, ())
        start = self.offsets[self.images_of(shard).start]
        return np.array(self._map(shard)[self.offsets[image] - start : self.offsets[image + 1] - start])

    def nothing(self) -> np.ndarray:
        """float16 answers for a batch of which nothing is left: no rows, or zeros in place of one image's map."""
        if self.unit == "region":
            return np.zeros((0, self.width), np.float16)
        return np.zeros((1, int(self.offsets[1]), self.width), np.float16)

    def _map(self, shard: int) -> np.ndarray:
        """A shard as a memory map.

        Raises:
            UserError: it is not there, or cannot be read.
        """
        if shard not in self._maps:
            if shard not in self._files:
                self.look()
            try:
                self._maps[shard] = np.load(self._files[shard], mmap_mode="r")
            except (KeyError, OSError, ValueError) as error:
                raise UserError(f"{self.where}: shard {shard} is missing or damaged ({error}): fill it again") from None
        return self._maps[shard]

    def look(self) -> None:
        """See which shards are there now; of several files of one, the newest counts."""
        found: dict[int, tuple[int, Path]] = {}
        for file in self.folder.glob("shard-*-*.npy"):
            number = file.stem.split("-")[1]
            if number.isdigit():
                found[int(number)] = max(found.get(int(number), (-1, file)), (file.stat().st_mtime_ns, file))
        self._files = {shard: file for shard, (_, file) in found.items()}

    def missing(self, shards: Iterable[int] | None = None, *, read: bool = False, delete: bool = True) -> list[int]:
        """Shards, of all or of some, that are not there, or damaged.

        Args:
            read: see :meth:`is_complete`.
            delete: damaged ones, so that they can be made anew.

        Raises:
            UserError: a damaged one cannot be deleted.
        """
        self.look()
        every = range(self.num_shards) if shards is None else shards
        return [s for s in every if not self._is_good(s, read, delete)]

    def is_complete(self, shard: int, *, read: bool = True) -> bool:
        """Whether a shard is there and undamaged. A damaged one is deleted.

        Args:
            read: its bytes are read and compared with its checksum; otherwise its size and shape must do.
        """
        self.look()
        return self._is_good(shard, read)

    def _is_good(self, shard: int, read: bool, delete: bool = True) -> bool:
        file = self._files.get(shard)
        if file is None:
            return False
        try:
            content = np.load(file, mmap_mode="r")
            good = content.shape == self.shape(shard) and content.dtype == np.float16
            good = good and file.stat().st_size == content.offset + content.nbytes
            good = good and (not read or _digest(file) == file.stem.split("-")[2])
        except (OSError, ValueError):
            good = False
        if not good and delete:
            with writing(self.where):
                file.unlink(missing_ok=True)
            self._files.pop(shard)
        return good

    # -- writing ------------------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make the folder and say in it what it is for, if that has not been done; leftovers of killed writers go.

        Nothing is written where nothing need be: a complete store may lie on a disk that can only be read.
        """
        if not (self.folder / NAME).is_file():  # it was compared when this was made
            with writing(self.where):
                write_key(self.folder, self.key)
        with contextlib.suppress(OSError):  # they are in nobody's way
            for left in self.folder.glob(".shard-*"):
                if time.time() - left.stat().st_mtime > LEFT_OVER:
                    left.unlink(missing_ok=True)

    def write(self, shard: int, array: np.ndarray) -> None:
        """Write a shard, float16 of :meth:`shape`.

        Raises:
            UserError: the disk is full or not writable; nothing is left behind.
        """
        if array.dtype != np.float16 or array.shape != self.shape(shard):
            raise ValueError(f"shard {shard} must be float16 {self.shape(shard)}, not {array.dtype} {array.shape}")
        temporary = self.folder / f".shard-{shard:05d}.{os.getpid()}"
        try:
            with writing(self.where):
                with open(temporary, "wb") as file:
                    np.save(file, array)
                    file.flush()
                    os.fsync(file.fileno())
                target = self.folder / f"shard-{shard:05d}-{_digest(temporary)}.npy"
                os.replace(temporary, target)
                self._files[shard] = target
        finally:
            temporary.unlink(missing_ok=True)


def annotations_key(annotations: Annotations, indices: np.ndarray) -> str:
    """Hash of the regions: file names and boxes of all images, and which of the images are used."""
    a = annotations
    return _hash(a.name_bytes, a.name_offsets, a.offsets, a.boxes, indices)


def images_key(annotations: Annotations, indices: np.ndarray) -> str:
    """Hash of the images, whatever their regions: file names, and which of them are used."""
    return _hash(annotations.name_bytes, annotations.name_offsets, indices)


def _hash(*arrays: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _digest(file: Path) -> str:
    return hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()  # tens of megabytes
