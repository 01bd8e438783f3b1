"""Answers of a teacher on disk: float16 arrays that open as memory maps, in shards of images.

What a teacher says of a crop or of an image is the same in every epoch. Each image has rows of its own: one for each
region that training may meet (an embedding of its crop), or one for each cell of a map.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.engine.data.annotations import Annotations
from training.engine.data.images import first_line
from training.engine.errors import UserError

FORMAT = 2
SHARD_IMAGES = 1000


class TeacherStore:
    """A folder of ``shard-NNNNN-CHECKSUM.npy`` and ``key.json``, which says what the answers belong to.

    A shard is written whole or not at all, and its name holds the checksum of its content; so an interrupted filling
    goes on where it was, and a damaged shard is found out. Rows are NaN where an image could not be read.

    Args:
        folder: of the store; made by :meth:`create`.
        offsets: int64 ``[N + 1]``, image i has the rows ``offsets[i]:offsets[i + 1]``.
        width: D, numbers of an answer.
        key: everything that the answers depend on, as plain values (see :func:`annotations_key`).
        unit: ``"region"`` (a row answers for a region) or ``"image"`` (all rows of an image are one answer, a map).
        shard_images: images of a shard.

    Raises:
        UserError: the folder holds a store of another key, or something else.
    """

    def __init__(
        self, folder: str | Path, offsets: np.ndarray, width: int, key: dict[str, Any], *, unit: str = "region",
        shard_images: int = SHARD_IMAGES,
    ) -> None:  # fmt: skip
        self.folder, self.offsets, self.width, self.unit = Path(folder), np.asarray(offsets), int(width), unit
        self.key = {"format": FORMAT, "shard_images": shard_images, "width": self.width, "unit": unit, **key}
        self.shard_images = shard_images
        self.num_images = len(self.offsets) - 1
        self.num_shards = -(-self.num_images // shard_images)
        self._maps: dict[int, np.ndarray] = {}
        self._check()

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
        if shard not in self._maps:
            self._maps[shard] = np.load(self._file(shard), mmap_mode="r")
        return self._maps[shard][places]  # a copy

    def of_image(self, image: int) -> np.ndarray:
        """float16 ``[N, D]``, all answers of an image."""
        return self.answers(image, np.arange(self.offsets[image + 1] - self.offsets[image]))

    def _file(self, shard: int) -> Path | None:
        """Newest file of a shard, None when there is none."""
        files = sorted(self.folder.glob(f"shard-{shard:05d}-*.npy"), key=lambda f: f.stat().st_mtime_ns)
        return files[-1] if files else None

    def is_complete(self, shard: int) -> bool:
        """Whether a shard is there and undamaged (its bytes are read). A damaged one is deleted."""
        file = self._file(shard)
        if file is None:
            return False
        try:
            good = _digest(file) == file.stem.split("-")[2] and np.load(file, mmap_mode="r").shape == self.shape(shard)
        except (OSError, ValueError):
            good = False
        if not good:
            file.unlink(missing_ok=True)
        return good

    # -- writing ------------------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make the folder and say in it what it is for, if that has not been done."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f".key.{os.getpid()}"
            temporary.write_text(json.dumps(self.key, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, self.folder / "key.json")
        except OSError as error:
            raise self._unwritable(error) from error

    def write(self, shard: int, array: np.ndarray) -> None:
        """Write a shard, float16 of :meth:`shape`.

        Raises:
            UserError: the disk is full or not writable; nothing is left behind.
        """
        if array.dtype != np.float16 or array.shape != self.shape(shard):
            raise ValueError(f"shard {shard} must be float16 {self.shape(shard)}, not {array.dtype} {array.shape}")
        temporary = self.folder / f".shard-{shard:05d}.{os.getpid()}"
        try:
            with open(temporary, "wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / f"shard-{shard:05d}-{_digest(temporary)}.npy")
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"--cache-teacher {self.folder} cannot be written ({first_line(error)}): free some space or choose another"
        )

    def _check(self) -> None:
        """UserError when the folder is no store, or one of another key."""
        where, remedy = f"--cache-teacher {self.folder}", "give another folder, or delete this one"
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise UserError(f"{where} is a file: give a folder")
        try:
            found = json.loads((self.folder / "key.json").read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("no dictionary")
        except FileNotFoundError:
            if any(f for f in self.folder.iterdir() if not f.name.startswith(".")):
                raise UserError(f"{where} holds something else (it has no key.json): give another folder") from None
            return
        except (OSError, ValueError) as error:
            raise UserError(f"{where}: key.json is damaged ({first_line(error)}); {remedy}") from None
        differs = [n for n in sorted({*found, *self.key}) if found.get(n) != self.key.get(n)]
        if differs:
            name = differs[0]
            raise UserError(
                f"{where} was made with other {', '.join(differs)} ({name}: {found.get(name)}, now "
                f"{self.key.get(name)}); {remedy}"
            )


def annotations_key(annotations: Annotations, indices: np.ndarray) -> str:
    """Hash of the regions: file names and boxes of all images, and which of the images are used."""
    digest = hashlib.blake2b(digest_size=16)
    arrays = (annotations.name_bytes, annotations.name_offsets, annotations.offsets, annotations.boxes, indices)
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _digest(file: Path) -> str:
    return hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()  # tens of megabytes
