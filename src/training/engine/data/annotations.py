"""COCO and LVIS annotation files as compact arrays, shared by all worker processes.

A file of 118,000 images and 860,000 annotations is 450 MB of json and 2 GB of dictionaries; the arrays are 40 MB, and a
cache of them opens as a memory map.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from dataclasses import fields
from pathlib import Path

import numpy as np

from training.engine.data.images import is_url
from training.engine.data.parsing import image_file_name, parse, read_captions, read_json, usable
from training.engine.data.records import Annotations, Strings
from training.engine.distributed import many, on_master
from training.engine.errors import UserError

__all__ = [
    "Annotations",
    "Strings",
    "image_file_name",
    "load_annotations",
    "parse",
    "read_captions",
    "read_json",
    "usable",
]

log = logging.getLogger(__name__)

FORMAT = 6  # of the cache; older ones are built anew
CACHE_FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "open_clip" / "annotations"
CACHED_FROM = 16 * 2**20  # bytes; smaller files are read as fast as a cache of them
MOST_LEFT_OUT = 0.5  # share of a file's annotations; a file of which more cannot be used is not what it seems


def load_annotations(
    path: str,
    *,
    flag: str = "--train-data",
    cache_dir: str | None = None,
    masks: bool = False,
    labelled: bool = False,
    images_only: bool = False,
) -> Annotations:
    """Annotations of a COCO or LVIS file, from the cache when there is a valid one.

    Bad entries (missing keys, wrong types, NaN, empty boxes, dangling references, repeated image ids) are left out and
    counted by reason. Crowd annotations are kept and marked. Ids of annotations play no part: some tools begin them
    anew in each image.

    Every process calls it. Process 0 reads first, the others wait and then open its cache, or receive what it read.

    Args:
        flag: where the path comes from, for messages.
        cache_dir: folder of the cache; None for ``CACHE_FOLDER`` and files of ``CACHED_FROM`` bytes or more only, ""
            for no cache: the json is read each time. A damaged cache is built anew, with a warning.
        masks: keep segmentations.
        labelled: annotations without a listed category are left out as well.
        images_only: whatever the annotations are like, they are not needed.

    Raises:
        UserError: no such file, not json, not one usable image, or more than half of the annotations are unusable.
    """

    def load() -> tuple[Annotations, bool]:
        annotations, cached = _load(path, flag, cache_dir, masks, labelled)
        if not images_only:
            _check_share(annotations, path, flag)
        return annotations, cached

    if not many():
        return load()[0]
    mine: list[Annotations] = []

    def first() -> Annotations | None:
        annotations, cached = load()
        mine.append(annotations)
        return None if cached else annotations

    received = on_master(first)
    if received is not None:
        return received
    return mine[0] if mine else load()[0]


def _load(path: str, flag: str, cache_dir: str | None, masks: bool, labelled: bool) -> tuple[Annotations, bool]:
    """(annotations; whether they come from a cache, which other processes can open)."""

    def read() -> Annotations:
        return parse(read_json(path, flag), path, flag, masks=masks, labelled=labelled)

    if cache_dir == "" or is_url(path):
        return read(), False
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path}: no such file; give a COCO-style json")
    info = os.stat(path)
    if cache_dir is None:
        if info.st_size < CACHED_FROM:
            return read(), False
        cache_dir = str(CACHE_FOLDER.expanduser())
    parts = f"{FORMAT}|{os.path.realpath(path)}|{info.st_size}|{info.st_mtime_ns}|{masks}|{labelled}"
    key = hashlib.sha256(parts.encode()).hexdigest()
    folder = Path(cache_dir) / f"{Path(path).stem}-{key[:16]}"
    if folder.is_dir():
        try:
            return _read_cache(folder, path), True
        except Exception as error:  # numpy and json raise many kinds; whatever it is, the source is still there
            log.warning("annotation cache %s is damaged (%s): it is built anew", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
    annotations = read()
    try:
        _write_cache(annotations, folder)
    except OSError as error:
        log.warning("annotation cache %s cannot be written (%s): the json is read each time", folder, error)
        return annotations, False
    try:
        return _read_cache(folder, path), True
    except Exception as error:  # one that could not be replaced, such as another user's that is closed to this one
        log.warning("annotation cache %s cannot be read (%s): the json is read each time", folder, error)
        return annotations, False


def _check_share(annotations: Annotations, path: str, flag: str) -> None:
    reasons = {k: v for k, v in annotations.skipped.items() if k.startswith(("annotation", "box"))}
    left_out, number = sum(reasons.values()), sum(reasons.values()) + len(annotations.boxes)
    if left_out > MOST_LEFT_OUT * number:
        most = max(reasons, key=reasons.get)
        raise UserError(
            f"{flag} {path}: {left_out} of its {number} annotations cannot be used, most often: {most} "
            f"({reasons[most]} times); mend the file"
        )


# -- cache ------------------------------------------------------------------------------------------------------------

_LISTS = ("names", "frequencies", "skipped", "unannotated")
_ARRAYS = tuple(f.name for f in fields(Annotations) if f.name not in (*_LISTS, "file"))


def _write_cache(annotations: Annotations, folder: Path) -> None:
    """Arrays as ``.npy`` files in a folder that appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".annotations-{uuid.uuid4().hex}"
    temporary.mkdir()  # open to whom the umask allows, not as tempfile makes it: several users may share a cache
    try:
        sums = {}
        for name in _ARRAYS:
            np.save(temporary / f"{name}.npy", getattr(annotations, name))
            sums[name] = _checksum(temporary / f"{name}.npy")
        meta = json.dumps({**{name: getattr(annotations, name) for name in _LISTS}, "sums": sums})
        # The first line of the description is its own checksum.
        (temporary / "meta").write_bytes(f"{_digest(meta.encode())}\n{meta}".encode())
        if not folder.exists():
            os.replace(temporary, folder)
    except OSError:
        if not folder.is_dir():  # another process may have been first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _checksum(path: Path) -> str:
    return _digest(path.read_bytes())  # tens of megabytes


def _read_cache(folder: Path, path: str) -> Annotations:
    checksum, description = (folder / "meta").read_bytes().split(b"\n", 1)
    if _digest(description) != checksum.decode():
        raise ValueError("its description has changed")
    meta = json.loads(description)
    arrays = {}
    for name in _ARRAYS:
        if _checksum(folder / f"{name}.npy") != meta["sums"][name]:
            raise ValueError(f"{name}.npy has changed")
        arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
    return Annotations(**arrays, **{name: meta[name] for name in _LISTS}, file=path)
