"""LVIS's federated protocol (Gupta et al. 2019).

An image judges only the classes that it has objects of, or that are known to be absent from it
(``neg_category_ids``); a wrong detection of a class that is not annotated exhaustively in it counts for nothing; at
most 300 detections an image.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from faster_coco_eval.core.coco import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster

log = logging.getLogger(__name__)

LVIS_DETECTIONS = 300  # per image
FREQUENCIES = ("r", "c", "f")  # in fewer than 10, fewer than 100, and more training images


def category_groups(truth: dict[str, Any]) -> dict[str, list[int]]:
    """Positions, among the categories in ascending order of their ids, of the rare, common and frequent ones."""
    ordered = sorted(truth["categories"], key=lambda c: c["id"])
    return {f: [i for i, c in enumerate(ordered) if c["frequency"] == f] for f in FREQUENCIES}


def best_per_image(detections: Sequence[dict[str, Any]], most: int = LVIS_DETECTIONS) -> list[dict[str, Any]]:
    """The ``most`` detections of highest score of each image; equal scores in the order given."""
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for detection in detections:
        by_image[detection["image_id"]].append(detection)
    return [
        d
        for found in by_image.values()
        for d in (found if len(found) <= most else sorted(found, key=lambda d: -d["score"])[:most])
    ]


def evaluate_by_category(
    truth: dict[str, Any], detections: list[dict[str, Any]], *, kind: str, chunk: int = 64
) -> np.ndarray:
    """Precision ``[10 IoUs, 101 recalls, C, 4 areas]`` at 300 detections an image, -1 for classes without objects."""
    return accumulate_by_category(truth, best_per_image(detections), kind=kind, limit=LVIS_DETECTIONS, chunk=chunk)[0]


def accumulate_by_category(
    truth: dict[str, Any], detections: list[dict[str, Any]], *, kind: str, limit: int, chunk: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Precision ``[10 IoUs, 101 recalls, C, 4 areas]`` and recall ``[10, C, 4]``, -1 for classes without objects.

    Classes do not influence one another once the detections are chosen, so they are judged ``chunk`` at a time: the
    evaluator keeps an entry for every pair of image and class, 24 million in LVIS val.

    Args:
        detections: those that count; no image has more than ``limit`` of one class.
    """
    order = sorted(c["id"] for c in truth["categories"])
    parts = []
    for part in _chunks(order, truth, detections, chunk):
        gold = COCO(part["truth"])
        evaluator = COCOeval_faster(
            gold, gold.loadRes(part["found"]), kind, print_function=log.debug, lvis_style=True
        )  # fmt: skip
        evaluator.params.maxDets = [limit]
        evaluator.evaluate()
        evaluator.accumulate()
        parts.append((evaluator.eval["precision"][..., -1], evaluator.eval["recall"][..., -1]))
    precision, recall = zip(*parts, strict=True)
    return np.concatenate(precision, axis=2), np.concatenate(recall, axis=1)


def _chunks(
    order: list[int], truth: dict[str, Any], found: list[dict[str, Any]], size: int
) -> Iterator[dict[str, Any]]:
    """Truth and detections of ``size`` classes at a time.

    Images that say nothing about these classes are left out, and detections that the image does not judge.
    """
    objects, hits = defaultdict(list), defaultdict(list)
    for annotation in truth["annotations"]:
        objects[annotation["category_id"]].append(annotation)
    for detection in found:
        hits[detection["category_id"]].append(detection)
    for start in range(0, len(order), size):
        classes = order[start : start + size]
        wanted = set(classes)
        annotations = [a for c in classes for a in objects[c]]
        judged = {(a["image_id"], a["category_id"]) for a in annotations}
        judged |= {(i["id"], c) for i in truth["images"] for c in wanted.intersection(i["neg_category_ids"])}
        ids = {image for image, _ in judged}
        # The evaluator does not take none.
        images = [i for i in truth["images"] if i["id"] in ids] or truth["images"][:1]
        yield {
            "truth": {
                "images": images,
                "annotations": annotations,
                "categories": [c for c in truth["categories"] if c["id"] in wanted],
            },
            "found": [d for c in classes for d in hits[c] if (d["image_id"], c) in judged],
        }
