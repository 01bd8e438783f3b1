"""Average precision of detections: COCO, VOC and the groups of open-vocabulary benchmarks; LVIS is in ``lvis_eval``.

Detections are COCO results: dicts of ``image_id``, ``category_id``, ``score`` and ``bbox`` (xywh, pixels of the file)
or ``segmentation`` (compressed run lengths). AP is in 0..1; -1 where there is nothing to find.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core.coco import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster

from ovdet.data.annotations import is_id, read_json, usable
from ovdet.data.masks import decode_segmentation
from ovdet.errors import UserError
from ovdet.evaluation.lvis import category_groups, evaluate_by_category

log = logging.getLogger(__name__)

KINDS = ("bbox", "segm")
AREAS = {"s": "small", "m": "medium", "l": "large"}


def evaluate_detections(
    content: dict[str, Any],
    detections: Sequence[dict[str, Any]],
    *,
    kind: str = "bbox",
    protocol: str = "coco",
    novel: Iterable[str] = (),
    file: str = "annotations",
) -> dict[str, float]:
    """AP of detections against an annotation file.

    Args:
        content: the file's json content.
        detections: COCO results with ``bbox`` (``kind="bbox"``) or ``segmentation`` (``"segm"``).
        protocol: ``"coco"``, ``"voc"`` (AP at IoU 0.5 and 0.75 first; computed as COCO's) or ``"lvis"`` (federated).
        novel: names of novel classes; groups ``base`` and ``novel`` are given when there are any.
        file: name of the annotation file for messages.

    Returns:
        ``AP`` (mean over IoU 0.5 to 0.95), ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl``; with novel classes
        ``AP_base``, ``AP_novel``, ``AP50_base``, ``AP50_novel``; for LVIS ``APr``, ``APc``, ``APf``.

    Raises:
        UserError: segm without masks in the annotations, or LVIS's protocol for a file that is not LVIS's.
    """
    if protocol not in ("coco", "voc", "lvis"):
        raise UserError(f'data.protocol is "{protocol}": use coco, voc or lvis')
    truth = ground_truth(content, kind=kind, file=file, lvis=protocol == "lvis")
    known = {image["id"] for image in truth["images"]}
    found = _results(detections, kind, known)
    names = [c["name"] for c in sorted(truth["categories"], key=lambda c: c["id"])]
    if protocol == "lvis":
        precision = evaluate_by_category(truth, found, kind=kind)
    else:
        precision = _coco_precision(truth, found, kind)
    return _summary(precision, names, set(novel), category_groups(truth) if protocol == "lvis" else {})


def ground_truth(content: dict[str, Any], *, kind: str, file: str, lvis: bool = False) -> dict[str, Any]:
    """The parts of an annotation file that the evaluator needs, without bad entries, every field present.

    Raises:
        UserError: see :func:`evaluate_detections`.
    """
    images = {i["id"]: i for i in content["images"] if isinstance(i, dict) and is_id(i.get("id"))}
    categories = {c["id"]: c for c in content["categories"] if isinstance(c, dict) and is_id(c.get("id"))}
    skipped: Counter[str] = Counter()
    seen: set[int] = set()
    annotations = []
    for entry in content["annotations"]:
        reason, box = usable(entry, images, categories, seen)
        if not reason and kind == "segm" and not _has_mask(entry, images[entry["image_id"]]):
            reason = "object without a usable mask"
        if reason:
            skipped[reason] += 1
            continue
        area = entry.get("area")
        if type(area) not in (int, float) or not 0 <= area < math.inf:
            area = (box[2] - box[0]) * (box[3] - box[1])
        kept = {
            "id": len(annotations) + 1, "image_id": entry["image_id"], "category_id": entry["category_id"],
            "bbox": entry["bbox"], "area": area, "iscrowd": int(bool(entry.get("iscrowd", 0))),
        }  # fmt: skip
        if kind == "segm":
            kept["segmentation"] = entry["segmentation"]
        annotations.append(kept)
    if kind == "segm" and not annotations:
        raise UserError(f"{file}: no object has a mask, so there is no mask AP; use --eval bbox")
    for reason, number in skipped.items():
        log.warning("%s: %d x %s (not evaluated)", file, number, reason)
    keys = ["id", "height", "width"] + (["neg_category_ids", "not_exhaustive_category_ids"] if lvis else [])
    lacking = [k for k in keys if any(k not in image for image in images.values())]
    if lvis and any("frequency" not in c for c in categories.values()):
        lacking.append("frequency")
    # Sizes are needed for masks alone.
    lacking = [k for k in lacking if kind == "segm" or k not in ("height", "width")]
    if lacking:
        wanted = "an LVIS file, or data.protocol=coco" if lvis else "a complete COCO file"
        raise UserError(f"{file}: its entries have no {', '.join(lacking)}; give {wanted}")
    return {
        "images": [{k: image.get(k, 0) for k in keys} for image in images.values()],
        "annotations": annotations,
        "categories": [
            {"id": i, "name": str(c.get("name", i)), "frequency": c.get("frequency", "")} for i, c in categories.items()
        ],
    }


def _has_mask(entry: dict[str, Any], image: dict[str, Any]) -> bool:
    """Whether an object has a mask. Run lengths are tried out: the evaluator would read beyond the end of bad ones."""
    segmentation = entry.get("segmentation")
    if isinstance(segmentation, list):
        return bool(segmentation) and all(isinstance(p, list) and len(p) >= 6 for p in segmentation)
    return decode_segmentation(segmentation, image.get("height"), image.get("width")) is not None


def _results(detections: Sequence[dict[str, Any]], kind: str, images: set[int]) -> list[dict[str, Any]]:
    """Detections with the one field they are judged by: mask areas are those of the mask, not of the box."""
    field = "bbox" if kind == "bbox" else "segmentation"
    return [
        {"image_id": d["image_id"], "category_id": d["category_id"], "score": d["score"], field: d[field]}
        for d in detections
        if d["image_id"] in images
    ]


def _coco_precision(truth: dict[str, Any], found: list[dict[str, Any]], kind: str) -> np.ndarray:
    """Precision ``[10 IoUs, 101 recalls, C, 4 areas]`` at 100 detections per image and class."""
    gold = COCO(truth)
    evaluator = COCOeval_faster(gold, gold.loadRes(found), kind, print_function=log.debug)
    evaluator.evaluate()
    evaluator.accumulate()
    return evaluator.eval["precision"][..., -1]


def _summary(
    precision: np.ndarray, names: Sequence[str], novel: set[str], groups: Mapping[str, Sequence[int]]
) -> dict[str, float]:
    everything = range(len(names))

    def mean(thresholds: slice, classes: Sequence[int], area: int = 0) -> float:
        values = precision[thresholds][:, :, list(classes), area]
        values = values[values > -1]
        return float(values.mean()) if values.size else -1.0

    whole, half, strict = slice(None), slice(0, 1), slice(5, 6)  # IoU 0.5 : 0.05 : 0.95
    results = {"AP": mean(whole, everything), "AP50": mean(half, everything), "AP75": mean(strict, everything)}
    results |= {f"AP{letter}": mean(whole, everything, 1 + i) for i, letter in enumerate(AREAS)}
    results |= {f"AP{group}": mean(whole, classes) for group, classes in groups.items()}
    if novel:
        for group, wanted in (("base", False), ("novel", True)):
            classes = [i for i, name in enumerate(names) if (name in novel) == wanted]
            results[f"AP_{group}"] = mean(whole, classes)
            results[f"AP50_{group}"] = mean(half, classes)
    return results


# -- files ------------------------------------------------------------------------------------------------------------


def format_table(metrics: Mapping[str, Mapping[str, float]], protocol: str = "coco") -> str:
    """Metrics by kind as a table in percent; what the benchmark is known by comes first."""
    first = {
        "coco": ["AP50_novel", "AP50_base", "AP50", "AP"],
        "lvis": ["APr", "APc", "APf", "AP"],
        "voc": ["AP50", "AP75", "AP"],
    }[protocol]
    columns = [k for k in first if any(k in values for values in metrics.values())]
    columns += [k for values in metrics.values() for k in values if k not in columns and not k.startswith("AP_")]
    columns = list(dict.fromkeys(columns))
    rows = [["", *(c.replace("_", " ") for c in columns)]]
    for kind, values in metrics.items():
        rows.append([kind, *("-" if values.get(c, -1) < 0 else f"{100 * values[c]:.2f}" for c in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def write_json(path: Path, content: Any) -> None:
    """Write a json file that is complete or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): free some space or choose another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_truth(path: str) -> dict[str, Any]:
    """Content of the validation file. UserError as :func:`ovdet.data.annotations.read_json`."""
    return read_json(path, "data.val_annotations")
