"""Average precision of detections: COCO, VOC, LVIS, and the groups of open-vocabulary benchmarks.

AP is in 0..1; -1 where there is nothing to find.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ovdet.evaluation.arrays import KINDS, Detections, Truth
from ovdet.evaluation.lvis import FREQUENCIES, LVIS_DETECTIONS, best_per_image, judged_pairs
from ovdet.evaluation.voc import voc_metrics
from training.engine.errors import UserError
from training.engine.files import write_parts

__all__ = [
    "KINDS", "PROTOCOLS", "evaluate", "evaluate_detections", "evaluator_classes", "format_table", "write_results"
]  # fmt: skip

log = logging.getLogger(__name__)

PROTOCOLS = ("coco", "voc", "lvis")
AREAS = {"s": "small", "m": "medium", "l": "large"}
CLASSES_AT_ONCE = 64  # the evaluator keeps an entry for every pair of image and class, 24 million in LVIS val


def evaluator_classes() -> tuple[type, type]:
    """The evaluator's classes of annotations and of evaluation. Detecting goes without them, so they load on demand.

    What detects for an AP calls it first: else hours of detecting would end in what it raises.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from faster_coco_eval.core.coco import COCO
        from faster_coco_eval.core.faster_eval_api import COCOeval_faster
    except ImportError as error:
        raise UserError(
            f"AP is computed with the package faster-coco-eval ({error}): pip install 'open_clip_torch[fvit]' brings it"
        ) from error
    return COCO, COCOeval_faster


def evaluate_detections(
    content: dict[str, Any],
    detections: Sequence[dict[str, Any]],
    *,
    kind: str = "bbox",
    protocol: str = "coco",
    novel: Iterable[str] = (),
    file: str = "annotations",
) -> dict[str, float]:
    """:func:`evaluate` of COCO results (dicts of ``image_id``, ``category_id``, ``score`` and ``bbox`` xywh or
    ``segmentation``) against an annotation file's json content."""
    truth = Truth.from_json(content, file)
    return evaluate(truth, Detections.from_results(detections, truth), kind=kind, protocol=protocol, novel=novel)


def evaluate(
    truth: Truth, found: Detections, *, kind: str = "bbox", protocol: str = "coco", novel: Iterable[str] = ()
) -> dict[str, float]:
    """AP of detections.

    Args:
        kind: ``"bbox"`` or ``"segm"``.
        protocol: ``"coco"``, ``"voc"`` or ``"lvis"`` (federated).
        novel: names of novel classes; groups ``base`` and ``novel`` are given when there are any.

    Returns:
        ``AP`` (mean over IoU 0.5 to 0.95), ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl``; with novel classes
        ``AP_base``, ``AP_novel``, ``AP50_base``, ``AP50_novel``; for LVIS ``APr``, ``APc``, ``APf``; for VOC, first,
        what :func:`~ovdet.evaluation.voc.voc_metrics` gives (the others are COCO's, difficult objects as its crowds).

    Raises:
        UserError: segm without masks in the annotations, or LVIS's protocol for a file that is not LVIS's.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f'data.protocol is "{protocol}": use coco, voc or lvis')
    groups, first = {}, {}
    if protocol == "lvis":
        check_lvis(truth)
        groups = {f: [i for i, own in enumerate(truth.frequencies) if own == f] for f in FREQUENCIES}
    if kind == "segm":
        truth = truth.with_masks()
    if protocol == "voc" and kind == "bbox":
        first = voc_metrics(truth, found)
    precision = _precision(truth, found, kind, lvis=protocol == "lvis")
    return first | _summary(precision, truth.names, set(novel), groups)


def check_lvis(truth: Truth) -> None:
    """UserError where a file does not hold what LVIS's protocol needs."""
    lacking = [
        name
        for name, there in (
            ("neg_category_ids", truth.absent is not None),
            ("not_exhaustive_category_ids", truth.unsure is not None),
            ("frequency", all(truth.frequencies)),
        )
        if not there
    ]
    if lacking:
        raise UserError(
            f"{truth.file}: its entries have no {', '.join(lacking)}; give an LVIS file, or data.protocol=coco"
        )


def _precision(truth: Truth, found: Detections, kind: str, *, lvis: bool) -> np.ndarray:
    """Precision ``[10 IoUs, 101 recalls, C, 4 areas]``, -1 for classes without objects.

    At most 100 detections per image and class, or LVIS's 300 per image.
    """
    kept = best_per_image(found) if lvis else np.arange(len(found))
    return accumulate(truth, found, kept, kind, lvis=lvis, most=LVIS_DETECTIONS if lvis else None)[0]


def accumulate(
    truth: Truth, found: Detections, kept: np.ndarray, kind: str, *, lvis: bool, most: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Precision ``[10 IoUs, 101 recalls, C, 4 areas]`` and recall ``[10, C, 4]``, -1 for classes without objects.

    Args:
        kept: rows of the detections that count.
        lvis: judge federated.
        most: detections of an image and class; None for COCO's 100.

    Classes do not influence one another once the detections are chosen, so they are judged some at a time, and only
    these exist as the dicts that the evaluator takes.
    """
    parts, (coco, faster) = [], evaluator_classes()
    for start in range(0, len(truth.names), CLASSES_AT_ONCE):
        labels = range(start, min(start + CLASSES_AT_ONCE, len(truth.names)))
        content, rows = _part(truth, found, kept, labels, kind, lvis=lvis)
        gold = coco(content)
        results = list(found.records(truth, rows, boxes=kind == "bbox", masks=kind == "segm"))
        evaluator = faster(gold, gold.loadRes(results), kind, print_function=log.debug, lvis_style=lvis)
        if most is not None:
            evaluator.params.maxDets = [most]
        evaluator.evaluate()
        evaluator.accumulate()
        parts.append((evaluator.eval["precision"][..., -1], evaluator.eval["recall"][..., -1]))
    precision, recall = zip(*parts, strict=True)
    return np.concatenate(precision, axis=2), np.concatenate(recall, axis=1)


def _part(
    truth: Truth, found: Detections, kept: np.ndarray, labels: range, kind: str, *, lvis: bool
) -> tuple[dict[str, Any], Iterable[int]]:
    """Truth of some classes as the evaluator's json, and the rows of the detections to judge.

    With LVIS, images that say nothing about these classes are left out, and detections that the image does not judge.
    """
    objects = np.flatnonzero((truth.label >= labels.start) & (truth.label < labels.stop))
    rows = kept[(found.label[kept] >= labels.start) & (found.label[kept] < labels.stop)]
    images: Iterable[int] = range(len(truth.image_ids))
    if lvis:
        judged = judged_pairs(truth, objects, labels)
        rows = [r for r in rows if (int(found.image[r]), int(found.label[r])) in judged]
        images = sorted({image for image, _ in judged}) or [0]  # the evaluator does not take none
    content = {
        "images": [_image(truth, i, labels, lvis=lvis) for i in images],
        "annotations": [_object(truth, row, number, kind) for number, row in enumerate(objects, 1)],
        "categories": [
            {"id": int(truth.category_ids[c]), "name": truth.names[c], "frequency": truth.frequencies[c]}
            for c in labels
        ],
    }
    return content, rows


def _image(truth: Truth, row: int, labels: range, *, lvis: bool) -> dict[str, Any]:
    height, width = (int(v) for v in truth.sizes[row])
    image: dict[str, Any] = {"id": int(truth.image_ids[row]), "height": height, "width": width}
    if lvis:
        for key, lists in (("neg_category_ids", truth.absent), ("not_exhaustive_category_ids", truth.unsure)):
            image[key] = [int(truth.category_ids[c]) for c in lists[row] if c in labels]
    return image


def _object(truth: Truth, row: int, number: int, kind: str) -> dict[str, Any]:
    entry = {
        "id": number,
        "image_id": int(truth.image_ids[truth.image[row]]),
        "category_id": int(truth.category_ids[truth.label[row]]),
        "bbox": truth.boxes[row].tolist(),
        "area": float(truth.areas[row]),
        "iscrowd": int(truth.ignored[row]),
    }
    return entry | {"segmentation": truth.masks[row]} if kind == "segm" else entry


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
        "voc": ["VOC_AP50", "VOC_AP75", "AP50", "AP75", "AP"],
    }[protocol]
    columns = [k for k in first if any(k in values for values in metrics.values())]
    columns += [k for values in metrics.values() for k in values if k not in columns and not k.startswith("AP_")]
    columns = list(dict.fromkeys(columns))
    rows = [["", *(c.replace("_", " ") for c in columns)]]
    for kind, values in metrics.items():
        rows.append([kind, *("-" if values.get(c, -1) < 0 else f"{100 * values[c]:.2f}" for c in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def write_results(path: Path, truth: Truth, found: Detections, *, kind: str) -> None:
    """COCO results as a json file, which grows line by line and is complete or not there. UserError as below."""
    records = found.records(truth, range(len(found)), boxes=kind == "bbox", masks=kind == "segm")
    write_parts(path, _array(records))


def _array(records: Iterable[dict[str, Any]]) -> Iterator[str]:
    separator = "["
    for record in records:
        yield separator + json.dumps(record)
        separator = ",\n"
    yield "[]" if separator == "[" else "]"
