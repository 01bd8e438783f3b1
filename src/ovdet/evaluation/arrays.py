"""Truth and detections of a whole validation set as arrays: a tenth of the memory of their json."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ovdet.data.masks import run_lengths
from training.engine.data.parsing import usable
from training.engine.data.records import Annotations, Strings
from training.engine.errors import UserError

log = logging.getLogger(__name__)

KINDS = ("bbox", "segm")


@dataclass
class Truth:
    """Annotated objects. Classes are numbered by ascending category id, images in the file's order.

    Attributes:
        file: where they come from, for messages.
        image_ids: int64 ``[I]``; sizes: int64 ``[I, 2]`` (height, width), 0 where the file does not say.
        category_ids: int64 ``[C]``; names: of the classes; frequencies: LVIS's r, c or f, or "".
        image, label: of each object, int64 ``[A]``.
        boxes: float64 ``[A, 4]``, xywh; areas: float64 ``[A]``.
        ignored: bool ``[A]``: crowds, and what VOC calls difficult.
        masks: json text or content of each object's segmentation; None where it has none.
        absent: classes known to be absent from each image (LVIS); unsure: classes not annotated exhaustively in it.
    """

    file: str
    image_ids: np.ndarray
    sizes: np.ndarray
    category_ids: np.ndarray
    names: list[str]
    frequencies: list[str]
    image: np.ndarray
    label: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    ignored: np.ndarray
    masks: Sequence[Any] = ()
    absent: list[list[int]] | None = None
    unsure: list[list[int]] | None = None

    @classmethod
    def from_json(cls, content: dict[str, Any], file: str = "annotations") -> Truth:
        """From an annotation file's content, without bad entries, which are counted in the log."""
        images = {i["id"]: i for i in content["images"] if isinstance(i, dict) and _is_id(i.get("id"))}
        categories = {c["id"]: c for c in content["categories"] if isinstance(c, dict) and _is_id(c.get("id"))}
        ids = sorted(categories)
        rows, labels = {i: n for n, i in enumerate(images)}, {i: n for n, i in enumerate(ids)}
        skipped: Counter[str] = Counter()
        kept: list[tuple[dict[str, Any], tuple]] = []
        for entry in content["annotations"]:
            reason, values = usable(entry, rows, labels)
            if not reason and values[3] < 0:
                reason = "annotation without a listed category"
            if reason:
                skipped[reason] += 1
            else:
                kept.append((entry, values))
        for reason, number in skipped.items():
            log.warning("%s: %d x %s (not evaluated)", file, number, reason)
        lists: dict[str, list[list[int]] | None] = {}
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            complete = all(isinstance(i.get(key), list) for i in images.values())
            lists[key] = [[labels[c] for c in i[key] if c in labels] for i in images.values()] if complete else None
        return cls(
            file=file,
            image_ids=np.array(list(images), np.int64),
            sizes=np.array([[_side(i.get("height")), _side(i.get("width"))] for i in images.values()]).reshape(-1, 2),
            category_ids=np.array(ids, np.int64),
            names=[str(categories[i].get("name", i)) for i in ids],
            frequencies=[str(categories[i].get("frequency", "")) for i in ids],
            image=np.array([values[0] for _, values in kept], np.int64),
            label=np.array([values[3] for _, values in kept], np.int64),
            boxes=np.array([e["bbox"] for e, _ in kept], np.float64).reshape(-1, 4),
            areas=np.array([values[2] for _, values in kept], np.float64),
            ignored=np.array([bool(e.get("iscrowd", 0)) or bool(e.get("difficult", 0)) for e, _ in kept], bool),
            masks=[e.get("segmentation") for e, _ in kept],
            absent=lists["neg_category_ids"],
            unsure=lists["not_exhaustive_category_ids"],
        )

    @classmethod
    def of(cls, annotations: Annotations) -> Truth:
        """From annotations that have been read already; with masks where these were kept."""
        corners = annotations.boxes.astype(np.float64)
        return cls(
            file=annotations.file,
            image_ids=np.asarray(annotations.image_ids),
            sizes=np.asarray(annotations.sizes)[:, ::-1].astype(np.int64),
            category_ids=np.asarray(annotations.category_ids),
            names=list(annotations.names),
            frequencies=list(annotations.frequencies),
            image=np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets)),
            label=np.asarray(annotations.labels).astype(np.int64),
            # Decimals became float32: rounding to a thousandth of a pixel, as results are, gives them back.
            boxes=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).round(3),
            areas=np.asarray(annotations.areas, np.float64),
            ignored=np.asarray(annotations.crowd),
            masks=Strings(annotations.mask_bytes, annotations.mask_offsets),
        )

    def with_masks(self) -> Truth:
        """The objects that have a usable mask, with them; others are counted in the log.

        Run lengths are tried out: the evaluator would read beyond the end of bad ones.

        Raises:
            UserError: no object has one, or the file does not give its images' sizes.
        """
        keep, masks = [], []
        for row in range(len(self.image)):
            mask = self.masks[row] if len(self.masks) else None
            mask = json.loads(mask) if isinstance(mask, str) else mask
            height, width = (int(v) for v in self.sizes[self.image[row]])
            polygons = isinstance(mask, list) and all(isinstance(p, list) and len(p) >= 6 for p in mask) and mask
            if polygons or isinstance(mask, dict) and run_lengths(mask, height, width) is not None:
                keep.append(row)
                masks.append(mask)
        if not keep:
            raise UserError(f"{self.file}: no object has a mask, so there is no mask AP; use --eval bbox")
        if (self.sizes == 0).any():
            raise UserError(f"{self.file}: its images have no height, width; give a complete COCO file")
        if len(keep) < len(self.image):
            log.warning(
                "%s: %d x object without a usable mask (not evaluated)", self.file, len(self.image) - len(keep)
            )
        return self._replace(np.array(keep), masks)

    def _replace(self, rows: np.ndarray, masks: Sequence[Any]) -> Truth:
        chosen = {name: getattr(self, name)[rows] for name in ("image", "label", "boxes", "areas", "ignored")}
        return Truth(**{**self.__dict__, **chosen, "masks": masks})


@dataclass
class Detections:
    """What was found in a validation set, image after image.

    Attributes:
        image: int32 ``[N]``, row of the image; label: int32 ``[N]``.
        boxes: float64 ``[N, 4]``, xywh in pixels of the file; scores: float64 ``[N]``.
        masks: run lengths of each, COCO's strings; empty without masks.
        size: (height, width) by image row, for masks.
    """

    image: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    label: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    masks: list[str] = field(default_factory=list)
    size: dict[int, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def gather(cls, images: Iterable[dict[str, Any]]) -> Detections:
        """From :func:`ovdet.testing.detect`'s images, in the order of their rows; boxes to a thousandth of a pixel."""
        images = sorted(images, key=lambda one: one["index"])
        if not images:
            return cls()
        boxes = np.concatenate([one["boxes"] for one in images]).astype(np.float64)
        corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        return cls(
            image=np.repeat([one["index"] for one in images], [len(one["boxes"]) for one in images]).astype(np.int32),
            label=np.concatenate([one["labels"] for one in images]).astype(np.int32),
            boxes=corners.round(3),
            scores=np.concatenate([one["scores"] for one in images]).astype(np.float64),
            masks=[mask["counts"] for one in images for mask in one.get("masks", ())],
            size={one["index"]: tuple(one["original"]) for one in images if "masks" in one},
        )

    @classmethod
    def from_results(cls, results: Sequence[dict[str, Any]], truth: Truth) -> Detections:
        """From COCO results; those of images or classes that the truth does not list are left out."""
        rows = {int(i): n for n, i in enumerate(truth.image_ids)}
        labels = {int(i): n for n, i in enumerate(truth.category_ids)}
        kept = [r for r in results if r["image_id"] in rows and r["category_id"] in labels]
        masks = [r["segmentation"] for r in kept if "segmentation" in r]
        return cls(
            image=np.array([rows[r["image_id"]] for r in kept], np.int32),
            label=np.array([labels[r["category_id"]] for r in kept], np.int32),
            boxes=np.array([r.get("bbox", (0, 0, 0, 0)) for r in kept], np.float64).reshape(-1, 4),
            scores=np.array([r["score"] for r in kept], np.float64),
            masks=[m["counts"] for m in masks],
            size={rows[r["image_id"]]: tuple(r["segmentation"]["size"]) for r in kept if "segmentation" in r},
        )

    @classmethod
    def merge(cls, parts: Sequence[Detections]) -> Detections:
        """Those of several processes, in the order of the images."""
        image = np.concatenate([part.image for part in parts])
        order = np.argsort(image, kind="stable")
        masks = [mask for part in parts for mask in part.masks]
        return cls(
            image=image[order],
            label=np.concatenate([part.label for part in parts])[order],
            boxes=np.concatenate([part.boxes for part in parts])[order],
            scores=np.concatenate([part.scores for part in parts])[order],
            masks=[masks[i] for i in order] if masks else [],
            size={row: size for part in parts for row, size in part.size.items()},
        )

    def __len__(self) -> int:
        return len(self.scores)

    def records(self, truth: Truth, rows: Iterable[int], *, boxes: bool, masks: bool) -> Iterator[dict[str, Any]]:
        """COCO results of some rows."""
        for row in rows:
            image = int(self.image[row])
            record = {
                "image_id": int(truth.image_ids[image]),
                "category_id": int(truth.category_ids[self.label[row]]),
                "score": float(self.scores[row]),
            }
            if boxes:
                record["bbox"] = self.boxes[row].tolist()
            if masks:
                record["segmentation"] = {"size": list(self.size[image]), "counts": self.masks[row]}
            yield record


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**62


def _side(value: Any) -> int:
    return value if _is_id(value) and 0 < value < 2**31 else 0
