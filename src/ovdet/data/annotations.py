"""COCO and LVIS annotation files as compact arrays."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from ovdet.data.images import ImageError, exists, resolve
from ovdet.errors import UserError

log = logging.getLogger(__name__)


@dataclass
class Annotations:
    """Images and their objects. Image i owns the objects ``offsets[i]:offsets[i + 1]``.

    Arrays rather than dictionaries: worker processes share them by fork, and COCO's 860,000 objects stay at 30 MB
    (plus their masks as json text where a detector learns masks).

    Attributes:
        file: where they come from, for messages.
        image_ids: int64 ``[N]``; file_names: N paths below the image root; sizes: int32 ``[N, 2]`` (height, width).
        boxes: float32 ``[A, 4]``, xyxy in pixels; labels: int64 ``[A]``, rows of ``category_ids``; crowd: bool ``[A]``.
        masks: json text of each object's ``segmentation``, end to end, and its offsets ``[A + 1]``; None if not kept.
        category_ids: int64 ``[C]``, ascending; names: C class names; frequencies: r, c or f of each class (LVIS) or "".
        skipped: entries left out, by reason.
    """

    file: str
    image_ids: np.ndarray
    file_names: list[str]
    sizes: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    masks: tuple[np.ndarray, np.ndarray] | None
    category_ids: np.ndarray
    names: list[str]
    frequencies: list[str]
    skipped: dict[str, int]

    def __len__(self) -> int:
        return len(self.image_ids)

    def of(self, index: int) -> slice:
        """Objects of an image."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def segmentation(self, annotation: int) -> Any:
        """COCO ``segmentation`` of an object: polygons, a run-length dict, or None."""
        text, offsets = self.masks
        return json.loads(text[offsets[annotation] : offsets[annotation + 1]].tobytes())


def read_json(path: str, key: str) -> dict[str, Any]:
    """An annotation file as a dict.

    Args:
        key: where the path comes from, such as ``"data.val_annotations"``; stands in messages.

    Raises:
        UserError: missing, not json, or without images.
    """
    if not path:
        raise UserError(f"{key} is empty: give a COCO or LVIS json ({key}=FILE)")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        made = "; tools/prepare_open_vocabulary.py makes it from the official one" if key.startswith("data.") else ""
        raise UserError(f"{key} {path}: no such file{made or '; check the path'}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{key} {path}: not a json file ({str(error).splitlines()[0][:120]})") from None
    for part in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise UserError(f'{key} {path}: no list "{part}" in it; give a COCO or LVIS json')
    if not content["images"]:
        raise UserError(f"{key} {path}: it lists no image")
    if not content["categories"]:
        raise UserError(f"{key} {path}: it lists no category")
    return content


def load_annotations(path: str, *, key: str, masks: bool = False) -> Annotations:
    """Read a COCO or LVIS json. Bad entries are left out, counted by reason and named in the log.

    Args:
        key: the config key of the path, for messages.
        masks: keep segmentations.

    Raises:
        UserError: see :func:`read_json`; or no usable image or category.
    """
    return parse(read_json(path, key), path, key=key, masks=masks)


def image_file_name(image: dict[str, Any]) -> str | None:
    """Path below the image root: ``file_name``, or the last two parts of ``coco_url`` (LVIS)."""
    name, url = image.get("file_name"), image.get("coco_url")
    if isinstance(name, str) and name:
        return name
    return "/".join(url.split("/")[-2:]) if isinstance(url, str) and url.count("/") >= 2 else None


def parse(content: dict[str, Any], path: str, *, key: str, masks: bool = False) -> Annotations:
    """Arrays of the content of an annotation file; see :func:`load_annotations`."""
    skipped: Counter[str] = Counter()
    category_ids, names, frequencies = _categories(content["categories"], skipped, f"{key} {path}")
    rows, file_names, sizes = _images(content["images"], skipped)
    if not rows:
        raise UserError(f"{key} {path}: none of its {len(content['images'])} images has an id and a file name")
    labels_of = {identity: label for label, identity in enumerate(category_ids)}
    row, box, label, crowd, text = [], [], [], [], []
    seen: set[int] = set()
    for entry in content["annotations"]:
        reason, found = usable(entry, rows, labels_of, seen)
        if reason:
            skipped[reason] += 1
            continue
        row.append(rows[entry["image_id"]])
        box.append(found)
        label.append(labels_of[entry["category_id"]])
        crowd.append(bool(entry.get("iscrowd", 0)))
        if masks:
            text.append(json.dumps(entry.get("segmentation"), separators=(",", ":")).encode())
    for reason, number in skipped.items():
        log.warning("%s %s: %d x %s (left out)", key, path, number, reason)
    order = np.argsort(np.array(row, np.int64), kind="stable")
    counts = np.bincount(np.array(row, np.int64), minlength=len(rows))
    packed = None
    if masks:
        text = [text[i] for i in order]
        packed = (np.frombuffer(b"".join(text), np.uint8), np.cumsum([0, *map(len, text)], dtype=np.int64))
    return Annotations(
        file=path,
        image_ids=np.fromiter(rows, np.int64, len(rows)),
        file_names=file_names,
        sizes=np.array(sizes, np.int32).reshape(-1, 2),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=np.array(box, np.float32).reshape(-1, 4)[order],
        labels=np.array(label, np.int64)[order],
        crowd=np.array(crowd, bool)[order],
        masks=packed,
        category_ids=np.array(category_ids, np.int64),
        names=names,
        frequencies=frequencies,
        skipped=dict(skipped),
    )


def is_id(value: Any) -> bool:
    """Whether a json value can be an id."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**62


def usable(entry: Any, images: Any, categories: Any, seen: set[int]) -> tuple[str, tuple[float, ...]]:
    """(reason to leave an annotation out, or ""; its box xyxy).

    Args:
        images, categories: containers of the known ids.
        seen: ids met so far; the entry's is added.
    """
    if not isinstance(entry, dict):
        return "annotation that is no object", ()
    identity = entry.get("id")
    if is_id(identity):
        if identity in seen:
            return "annotation with a repeated id", ()
        seen.add(identity)
    if not is_id(entry.get("image_id")) or entry["image_id"] not in images:
        return "annotation of an image that is not listed", ()
    if not is_id(entry.get("category_id")) or entry["category_id"] not in categories:
        return "annotation of a category that is not listed", ()
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(type(v) in (int, float) and abs(v) < 1e7 for v in box):
        return "annotation without a box of four finite numbers", ()
    x, y, w, h = (float(v) for v in box)
    if w <= 0 or h <= 0:
        return "box of zero or negative size", ()
    return "", (x, y, x + w, y + h)


def _categories(entries: list, skipped: Counter[str], where: str) -> tuple[list[int], list[str], list[str]]:
    found: dict[int, tuple[str, str]] = {}
    for entry in entries:
        identity = entry.get("id") if isinstance(entry, dict) else None
        name = entry.get("name") if isinstance(entry, dict) else None
        if not is_id(identity) or identity in found or not isinstance(name, str) or not name:
            skipped["category without a name and an id of its own"] += 1
        else:
            found[identity] = (name, str(entry.get("frequency", "")))
    if not found:
        raise UserError(f"{where}: none of its {len(entries)} categories has an id and a name")
    names = [found[i][0] for i in sorted(found)]
    repeated = [name for name, number in Counter(names).items() if number > 1]
    if repeated:
        raise UserError(f'{where}: several categories are called "{repeated[0]}": give each a name of its own')
    return sorted(found), names, [found[i][1] for i in sorted(found)]


def _images(entries: list, skipped: Counter[str]) -> tuple[dict[int, int], list[str], list[tuple[int, int]]]:
    rows: dict[int, int] = {}
    names, sizes = [], []
    for entry in entries:
        identity = entry.get("id") if isinstance(entry, dict) else None
        name = image_file_name(entry) if is_id(identity) else None
        if name is None:
            skipped["image without id or file name"] += 1
        elif identity in rows:
            skipped["image with a repeated id"] += 1
        else:
            rows[identity] = len(names)
            names.append(name)
            height, width = (entry.get(k) if is_id(entry.get(k)) else 0 for k in ("height", "width"))
            sizes.append((min(max(height, 0), 2**31 - 1), min(max(width, 0), 2**31 - 1)))
    return rows, names, sizes


def check_image_root(annotations: Annotations, root: str, *, key: str, tries: int = 20) -> None:
    """See that images are where they are said to be, before anything is written.

    Raises:
        UserError: no such folder, or none of the first ``tries`` images is in it.
    """
    if "://" not in root and not os.path.isdir(root):
        raise UserError(f"{key} {root or '(empty)'}: no such folder; give the folder of the images ({key}=FOLDER)")
    failure = ""
    for name in annotations.file_names[:tries]:
        try:
            exists(resolve(root, name))
            return
        except ImageError as error:
            failure = failure or str(error)
        except Exception as error:  # missing, forbidden, or whatever a URL's backend raises
            failure = failure or f"{name}: {type(error).__name__}"
    raise UserError(
        f"{key} {root}: none of the first {min(tries, len(annotations))} images of {annotations.file} can be opened "
        f"there (first: {failure}); give the folder that their file names are relative to"
    )
