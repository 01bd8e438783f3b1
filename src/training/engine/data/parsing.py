"""COCO and LVIS json to arrays: what is sound is read, the rest is left out and counted by reason."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import fsspec
import numpy as np

from training.engine.data.images import first_line, is_url
from training.engine.data.records import Annotations, Strings
from training.engine.errors import UserError


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


def parse(
    content: dict[str, Any], path: str, flag: str = "--train-data", *, masks: bool = False, labelled: bool = False
) -> Annotations:
    """Arrays of an annotation dict.

    Args:
        path, flag: the file and where its path comes from, for messages.
        masks: keep segmentations.
        labelled: annotations without a listed category are left out, and categories need names of their own.

    Raises:
        UserError: no usable image; with ``labelled``, no usable category or several of one name.
    """
    skipped: Counter[str] = Counter()
    rows, names, sizes = _images(content["images"], skipped)
    if not rows:
        raise UserError(f"{flag} {path}: none of its {len(content['images'])} images has an id and a file name")
    labels, class_names, frequencies = _categories(content.get("categories"), skipped, named=labelled)
    if labelled:
        _check_categories(class_names, f"{flag} {path}")
    entries = content.get("annotations")
    if entries is not None and not isinstance(entries, list):
        raise UserError(f'{flag} {path}: "annotations" is no list')
    table = _annotation_table(entries or [], rows, labels, sizes, skipped, labelled=labelled)
    order = np.argsort(table["row"], kind="stable")
    packed = Strings.of(names)
    polygons = Strings.of(_segmentation_text(entries[i]) for i in table["entry"][order]) if masks else Strings.of([])
    return Annotations(
        image_ids=np.fromiter(rows, np.int64, len(rows)),
        sizes=np.array(sizes, np.int32).reshape(-1, 2),
        name_bytes=packed.data,
        name_offsets=packed.offsets,
        offsets=np.concatenate([[0], np.cumsum(np.bincount(table["row"], minlength=len(names)))]).astype(np.int64),
        boxes=table["box"][order],
        areas=table["area"][order],
        labels=table["label"][order],
        crowd=table["crowd"][order],
        mask_bytes=polygons.data,
        mask_offsets=polygons.offsets,
        category_ids=np.fromiter(labels, np.int64, len(labels)),
        names=class_names,
        frequencies=frequencies,
        skipped=dict(skipped),
        unannotated=isinstance(content.get("info"), dict) and content["info"].get("unannotated") is True,
        file=path,
    )


def _images(entries: list, skipped: Counter[str]) -> tuple[dict[int, int], list[str], list[list[int]]]:
    """(id -> row, file names, (width, height) or zeros)."""
    rows: dict[int, int] = {}
    names, sizes = [], []
    for image in entries:
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
    return rows, names, sizes


def _categories(entries: Any, skipped: Counter[str], *, named: bool) -> tuple[dict[int, int], list[str], list[str]]:
    """(category id -> label, in ascending order of the ids; names by label; LVIS's frequencies by label)."""
    found: dict[int, tuple[str, str]] = {}
    for entry in entries if isinstance(entries, list) else []:
        identity = _integer(entry.get("id")) if isinstance(entry, dict) else None
        if identity is None or identity in found:
            skipped["category without an id of its own"] += 1
        elif named and not (isinstance(entry.get("name"), str) and entry["name"]):
            skipped["category without a name"] += 1
        else:
            found[identity] = str(entry.get("name", identity)), str(entry.get("frequency", ""))
    ordered = sorted(found)
    return {c: i for i, c in enumerate(ordered)}, [found[c][0] for c in ordered], [found[c][1] for c in ordered]


def _check_categories(names: list[str], where: str) -> None:
    if not names:
        raise UserError(f"{where}: it lists no category with an id and a name")
    repeated = [name for name, number in Counter(names).items() if number > 1]
    if repeated:
        raise UserError(f'{where}: several categories are called "{repeated[0]}": give each a name of its own')


def _annotation_table(
    entries: list,
    rows: dict[int, int],
    labels: dict[int, int],
    sizes: list[list[int]],
    skipped: Counter[str],
    *,
    labelled: bool,
) -> dict[str, np.ndarray]:
    """Columns of the usable annotations, in the file's order; ``entry`` is the place in the file."""
    kept: list[tuple] = []
    for number, entry in enumerate(entries):
        reason, values = usable(entry, rows, labels)
        if not reason:
            reason = _place(values[1], *sizes[values[0]])
        if not reason and labelled and values[3] < 0:
            reason = "annotation without a listed category"
        if reason:
            skipped[reason] += 1
        else:
            kept.append((number, *values, bool(entry.get("iscrowd", 0))))
    number, row, box, area, label, crowd = zip(*kept, strict=True) if kept else [()] * 6
    return {
        "entry": np.array(number, np.int64),
        "row": np.array(row, np.int64),
        "box": np.array(box, np.float32).reshape(-1, 4),
        "area": np.array(area, np.float32),
        "label": np.array(label, np.int32),
        "crowd": np.array(crowd, bool),
    }


def _segmentation_text(entry: dict[str, Any]) -> str:
    return json.dumps(entry.get("segmentation"), separators=(",", ":"))


def usable(entry: Any, rows: dict[int, int], labels: dict[int, int]) -> tuple[str, tuple]:
    """Judge one annotation.

    Args:
        rows, labels: image id -> row, category id -> label.

    Returns:
        (reason to leave it out, or ""; (image row, box xyxy, area, label or -1)).
    """
    if not isinstance(entry, dict):
        return "annotation that is no object", ()
    if "caption" in entry and "bbox" not in entry:  # of the image as a whole: nothing is wrong with it
        return "caption without a box", ()
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


def _place(box: tuple[float, float, float, float], width: int, height: int) -> str:
    """What is wrong with a box's place in its image; "" for nothing, or where the image's size is not given."""
    if not (width and height):
        return ""
    if box[0] >= width or box[1] >= height or box[2] <= 0 or box[3] <= 0:
        return "box outside its image"
    return "box that reaches far beyond its image" if reaches_far(box, width, height) else ""


def reaches_far(box: tuple[float, float, float, float], width: int, height: int) -> bool:
    """Whether a box (xyxy) reaches beyond its image by more than the image's longer side: models refuse it."""
    side = max(width, height)
    return min(box) < -side or max(box) > 2 * side


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
