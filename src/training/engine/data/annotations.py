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
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from training.engine.data.images import first_line, is_url
from training.engine.errors import UserError

log = logging.getLogger(__name__)

FORMAT = 4  # of the cache; older ones are built anew
CACHE_FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "open_clip" / "annotations"
CACHED_FROM = 16 * 2**20  # bytes; smaller files are read as fast as a cache of them


@dataclass
class Strings:
    """Many texts, utf-8, end to end in one array: text i is ``data[offsets[i]:offsets[i + 1]]``.

    A list of strings would be copied into every worker as Python touches its reference counts.
    """

    data: np.ndarray  # uint8
    offsets: np.ndarray  # int64 [N + 1]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Strings:
        """Pack texts. Characters that utf-8 cannot hold (lone surrogates) become question marks."""
        encoded = [text.encode("utf-8", "replace") for text in texts]
        return cls(np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([0, *map(len, encoded)], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        start, end = self.offsets[index : index + 2]
        return self.data[start:end].tobytes().decode("utf-8")


@dataclass
class Annotations:
    """Images with their annotations, as arrays. Image i owns annotations ``offsets[i]:offsets[i + 1]``.

    Attributes:
        image_ids: int64 ``[N]``.
        sizes: int32 ``[N, 2]``, (width, height); 0 where the file does not say.
        name_bytes, name_offsets: file names, utf-8, end to end; see :meth:`file_name`.
        offsets: int64 ``[N + 1]``.
        boxes: float32 ``[A, 4]``, xyxy in pixels.
        areas: float32 ``[A]``, as annotated (width times height when the file does not say).
        labels: int32 ``[A]``, rows of ``category_ids``; -1 without a category.
        category_ids: int64 ``[C]``, ascending.
        names: class names by label.
        skipped: bad entries that were left out, by reason.
    """

    image_ids: np.ndarray
    sizes: np.ndarray
    name_bytes: np.ndarray
    name_offsets: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    labels: np.ndarray
    category_ids: np.ndarray
    names: list[str]
    skipped: dict[str, int]
    file: str = ""

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, index: int) -> str:
        """File name of image ``index``, relative to the image root."""
        return Strings(self.name_bytes, self.name_offsets)[index]

    def of(self, index: int) -> slice:
        """Annotations of image ``index``, in the file's order."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))


def read_json(path: str, flag: str) -> dict[str, Any]:
    """An annotation file (or URL) as a dict.

    Raises:
        UserError: it is missing, not json, or without a list ``images``; names the flag.
    """
    try:
        with fsspec.open(path, "rb") if is_url(path) else open(path, "rb") as file:
            content = json.loads(file.read().decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{flag} {path}: no such file; give a COCO-style json") from None
    except (ValueError, RecursionError) as error:  # bad json, wrong encoding, integers of thousands of digits
        raise UserError(f"{flag} {path}: not a json file ({first_line(error)})") from None
    except Exception as error:  # fsspec's backends raise whatever their libraries do
        raise UserError(f"{flag} {path}: cannot be read ({type(error).__name__}: {first_line(error)})") from None
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(f'{flag} {path}: no list "images" in it; give a COCO-style json')
    if not content["images"]:
        raise UserError(f"{flag} {path}: it lists no image")
    return content


def load_annotations(path: str, *, flag: str = "--train-data", cache_dir: str | None = None) -> Annotations:
    """Annotations of a COCO or LVIS file, from the cache when there is a valid one.

    Bad entries (missing keys, wrong types, NaN, empty boxes, dangling references, repeated ids) are left out and
    counted by reason. Crowd annotations are kept, as the published code keeps them.

    Args:
        cache_dir: folder of the cache; None for ``CACHE_FOLDER`` and files of ``CACHED_FROM`` bytes or more only, ""
            for no cache: the json is read each time. A damaged cache is built anew, with a warning.

    Raises:
        UserError: no such file, not json, or not one usable image.
    """
    if cache_dir == "" or is_url(path):
        return parse(read_json(path, flag), path, flag)
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path}: no such file; give a COCO-style json")
    info = os.stat(path)
    if cache_dir is None:
        if info.st_size < CACHED_FROM:
            return parse(read_json(path, flag), path, flag)
        cache_dir = str(CACHE_FOLDER.expanduser())
    key = hashlib.sha256(f"{FORMAT}|{os.path.realpath(path)}|{info.st_size}|{info.st_mtime_ns}".encode()).hexdigest()
    folder = Path(cache_dir) / f"{Path(path).stem}-{key[:16]}"
    if folder.is_dir():
        try:
            return _read_cache(folder, path)
        except Exception as error:  # numpy and json raise many kinds; whatever it is, the source is still there
            log.warning("annotation cache %s is damaged (%s): it is built anew", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
    annotations = parse(read_json(path, flag), path, flag)
    try:
        _write_cache(annotations, folder)
    except OSError as error:
        log.warning("annotation cache %s cannot be written (%s): the json is read each time", folder, error)
        return annotations
    return _read_cache(folder, path)


# -- parsing ----------------------------------------------------------------------------------------------------------


def image_file_name(image: dict[str, Any]) -> str | None:
    """Path below the image root: ``file_name``, or the last two parts of ``coco_url`` (LVIS)."""
    name = image.get("file_name")
    if isinstance(name, str) and name:
        return name
    url = image.get("coco_url")
    if isinstance(url, str) and url.count("/") >= 2:
        return "/".join(url.split("/")[-2:])
    return None


def _integer(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) >= 2**62:
        return None
    return int(value) if value == int(value) else None


def parse(content: dict[str, Any], path: str, flag: str = "--train-data") -> Annotations:
    """Arrays of an annotation dict; see :func:`load_annotations`."""
    skipped: Counter[str] = Counter()
    rows: dict[int, int] = {}
    names, sizes = [], []
    for image in content["images"]:
        identity = _integer(image.get("id")) if isinstance(image, dict) else None
        name = image_file_name(image) if identity is not None else None
        if identity is None or name is None:
            skipped["image without id or file name"] += 1
        elif identity in rows:
            skipped["image with a repeated id"] += 1
        else:
            rows[identity] = len(names)
            names.append(name)
            sides = [_integer(image.get(k)) or 0 for k in ("width", "height")]
            sizes.append([min(max(s, 0), 2**31 - 1) for s in sides])
    if not rows:
        raise UserError(f"{flag} {path}: none of its {len(content['images'])} images has an id and a file name")
    labels, class_names = _categories(content.get("categories"), skipped)
    table = _annotation_table(content.get("annotations"), rows, labels, sizes, skipped, path, flag)
    packed = Strings.of(names)
    order = np.argsort(table["row"], kind="stable")
    counts = np.bincount(table["row"], minlength=len(names))
    return Annotations(
        image_ids=np.fromiter(rows, np.int64, len(rows)),
        sizes=np.array(sizes, np.int32).reshape(-1, 2),
        name_bytes=packed.data,
        name_offsets=packed.offsets,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=table["box"][order],
        areas=table["area"][order],
        labels=table["label"][order],
        category_ids=np.fromiter(labels, np.int64, len(labels)),
        names=class_names,
        skipped=dict(skipped),
        file=path,
    )


def _categories(entries: Any, skipped: Counter[str]) -> tuple[dict[int, int], list[str]]:
    """(category id -> label, in ascending order of the ids; names by label)."""
    names: dict[int, str] = {}
    for entry in entries if isinstance(entries, list) else []:
        identity = _integer(entry.get("id")) if isinstance(entry, dict) else None
        if identity is None or identity in names:
            skipped["category without an id of its own"] += 1
        else:
            names[identity] = str(entry.get("name", identity))
    ordered = sorted(names)
    return {c: i for i, c in enumerate(ordered)}, [names[c] for c in ordered]


def _annotation_table(
    entries: Any,
    rows: dict[int, int],
    labels: dict[int, int],
    sizes: list[list[int]],
    skipped: Counter[str],
    path: str,
    flag: str,
) -> dict[str, np.ndarray]:
    if entries is None:
        entries = []
    if not isinstance(entries, list):
        raise UserError(f'{flag} {path}: "annotations" is no list')
    row, box, area, label = [], [], [], []
    seen: set[int] = set()
    for entry in entries:
        reason, values = _annotation(entry, rows, labels, seen)
        if not reason and _outside(values[1], *sizes[values[0]]):
            reason = "box outside its image"
        if reason:
            skipped[reason] += 1
            continue
        row.append(values[0])
        box.append(values[1])
        area.append(values[2])
        label.append(values[3])
    return {
        "row": np.array(row, np.int64),
        "box": np.array(box, np.float32).reshape(-1, 4),
        "area": np.array(area, np.float32),
        "label": np.array(label, np.int32),
    }


def _annotation(entry: Any, rows: dict[int, int], labels: dict[int, int], seen: set[int]) -> tuple[str, tuple]:
    """(reason to leave it out, or ""; (image row, xyxy, area, label))."""
    if not isinstance(entry, dict):
        return "annotation that is no object", ()
    identity = _integer(entry.get("id"))
    if identity is not None:
        if identity in seen:
            return "annotation with a repeated id", ()
        seen.add(identity)
    image = _integer(entry.get("image_id"))
    if image is None or image not in rows:
        return "annotation of an image that is not listed", ()
    bbox = entry.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(type(v) in (int, float) for v in bbox):
        return "annotation without a box of four numbers", ()
    if not all(abs(v) < 1e7 for v in bbox):  # also false for NaN
        return "box with a coordinate that is no finite pixel", ()
    x, y, w, h = map(float, bbox)
    if w <= 0 or h <= 0:
        return "box of zero or negative size", ()
    area = entry.get("area")
    if type(area) not in (int, float) or not 0 <= area < 1e14:
        area = w * h
    category = entry.get("category_id")
    label = labels.get(_integer(category), -1) if category is not None else -1
    return "", (rows[image], (x, y, x + w, y + h), float(area), label)


def _outside(box: tuple[float, float, float, float], width: int, height: int) -> bool:
    """Whether a box shares nothing with its image; False where the file does not give the image's size."""
    return bool(width and height) and (box[0] >= width or box[1] >= height or box[2] <= 0 or box[3] <= 0)


def read_captions(entries: Any, annotations: Annotations) -> list[list[str]]:
    """Captions of each image, from the ``annotations`` of a COCO captions file; bad entries are left out, counted."""
    row = {int(i): r for r, i in enumerate(annotations.image_ids)}
    captions: list[list[str]] = [[] for _ in row]
    bad = 0
    for entry in entries if isinstance(entries, list) else []:
        text = entry.get("caption") if isinstance(entry, dict) else None
        image = _integer(entry.get("image_id")) if isinstance(text, str) and text.strip() else None
        if image in row:
            captions[row[image]].append(text)
        else:
            bad += 1
    if bad:
        annotations.skipped["caption without text or image"] = bad
    return captions


# -- cache ------------------------------------------------------------------------------------------------------------

_ARRAYS = tuple(f.name for f in fields(Annotations) if f.name not in ("names", "skipped", "file"))


def _write_cache(annotations: Annotations, folder: Path) -> None:
    """Arrays as ``.npy`` files in a folder that appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".annotations-"))
    try:
        sums = {}
        for name in _ARRAYS:
            np.save(temporary / f"{name}.npy", getattr(annotations, name))
            sums[name] = _checksum(temporary / f"{name}.npy")
        meta = json.dumps({"names": annotations.names, "skipped": annotations.skipped, "sums": sums})
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
    return Annotations(**arrays, names=meta["names"], skipped=meta["skipped"], file=path)
