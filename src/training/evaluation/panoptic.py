"""COCO panoptic annotations as evaluation samples: box, crop, mask on the feature grid and label of each segment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from open_clip.transform import crop_region, resize_longest
from training.engine.data.annotations import read_json
from training.engine.data.images import ImageError, first_line, read_image, resolve
from training.engine.data.masks import read_segment_ids, tight_box
from training.engine.data.parsing import reaches_far
from training.engine.data.samples import Skipped, black, check_image_root, reach, stack_padded
from training.engine.data.workers import Loader, check_shared_memory
from training.engine.errors import UserError
from training.evaluation.grid_masks import grid_masks
from training.evaluation.options import EvalOptions

MAX_SEGMENTS = 100  # per image, counted before the area limits, as in the published evaluation
PROBES = 16  # files looked for before the start
CROP_ENLARGEMENT = 1.5  # of a thing's box, about its centre
MIN_SIZE, MAX_SIZE = 8, 1024  # square root of a box's area; part of the protocol, whatever is trained on


@dataclass(frozen=True)
class PanopticAnnotations:
    """A panoptic annotation file as flat arrays, which worker processes share instead of copying dictionaries.

    N images with M segments in all; image i owns the segments ``offsets[i]:offsets[i + 1]``. Class labels 0..C-1 are
    the category ids in ascending order.
    """

    file: str
    class_names: list[str]
    is_thing: list[bool]
    image_ids: np.ndarray  # int64 [N]
    image_files: np.ndarray  # bytes [N], utf-8, relative to the image root
    segment_files: np.ndarray  # bytes [N], utf-8, relative to the folder of the PNGs
    offsets: np.ndarray  # int64 [N + 1]
    segment_ids: np.ndarray  # int32 [M], R + 256 G + 65536 B of the segment's pixels
    labels: np.ndarray  # int64 [M]
    boxes: np.ndarray  # float64 [M, 4], xywh in pixels as annotated

    def __len__(self) -> int:
        return len(self.image_ids)


def load_panoptic(path: str, *, flag: str = "--val-data") -> PanopticAnnotations:
    """Read a COCO panoptic annotation file.

    Args:
        path: the json file.
        flag: the command-line flag that named it, for messages.

    Raises:
        UserError: no such file, not JSON, not a panoptic annotation file, or without a segment.
    """
    content = read_json(path, flag)
    missing = [key for key in ("annotations", "categories") if not content.get(key)]
    if missing:
        raise UserError(f"{flag} {path}: no {' and no '.join(missing)}; it must be a COCO panoptic annotation file")
    first = content["annotations"][0] if isinstance(content["annotations"], list) else None
    if isinstance(first, dict) and "segments_info" not in first:
        raise UserError(
            f"{flag} {path}: annotations without 'segments_info'; it looks like an instance file, "
            "name the panoptic one (panoptic_val2017.json)"
        )
    try:
        annotations = _to_arrays(path, content)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:  # any value may be anything
        reason = f"no key {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{flag} {path}: {reason}; it must be a COCO panoptic annotation file") from None
    if not len(annotations.segment_ids):
        raise UserError(f"{flag} {path}: not a single segment; name an annotation file with segments")
    return annotations


def _to_arrays(path: str, content: dict[str, Any]) -> PanopticAnnotations:
    categories = sorted(content["categories"], key=lambda category: category["id"])
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    image_of = {image["id"]: image for image in content["images"]}
    image_ids, image_files, segment_files, counts, segment_ids, labels, boxes = [], [], [], [], [], [], []
    for annotation in content["annotations"]:
        image_id, segments = annotation["image_id"], annotation["segments_info"]
        if image_id not in image_of:
            raise ValueError(f"an annotation belongs to image {image_id}, which is not under 'images'")
        image = image_of[image_id]
        # LVIS-style entries have no file name; it is the end of the address.
        image_files.append(image["file_name"] if "file_name" in image else "/".join(image["coco_url"].split("/")[-2:]))
        image_ids.append(image_id)
        segment_files.append(annotation["file_name"])
        counts.append(len(segments))
        for segment in segments:
            if segment["category_id"] not in label_of:
                raise ValueError(f"image {image_id} has a segment of unknown category {segment['category_id']}")
            if len(segment["bbox"]) != 4:
                raise ValueError(f"image {image_id} has a box {segment['bbox']}, which is not x, y, width, height")
            if categories[label_of[segment["category_id"]]]["isthing"]:  # stuff has the box of its mask
                _check_place(segment["bbox"], image, image_id)
            segment_ids.append(segment["id"])
            labels.append(label_of[segment["category_id"]])
            boxes.append(segment["bbox"])
    box_array = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    if not np.isfinite(box_array).all():
        raise ValueError("a box is not finite")
    return PanopticAnnotations(
        file=path,
        class_names=[category["name"] for category in categories],
        is_thing=[bool(category["isthing"]) for category in categories],
        image_ids=np.asarray(image_ids, dtype=np.int64),
        image_files=np.asarray([name.encode() for name in image_files], dtype=bytes),
        segment_files=np.asarray([name.encode() for name in segment_files], dtype=bytes),
        offsets=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
        segment_ids=np.asarray(segment_ids, dtype=np.int32),
        labels=np.asarray(labels, dtype=np.int64),
        boxes=box_array,
    )


def _check_place(bbox: Sequence[float], image: dict[str, Any], image_id: object) -> None:
    """ValueError for a box that reaches far beyond its image, where the image's size is given."""
    (x, y, w, h), (width, height) = bbox, (image.get("width"), image.get("height"))
    if width and height and reaches_far((x, y, x + w, y + h), width, height):
        raise ValueError(f"image {image_id} has a box {bbox} that reaches far beyond it")


class PanopticDataset(Dataset):
    """Evaluation samples of a panoptic annotation file.

    An item is a dict: ``images`` {S: uint8 [3, h, w] with longest side S, not padded yet}, ``boxes`` {S: float32
    [K, 4]} (xyxy in 0..1 of the padded image), ``masks`` {S: bool [K, S/p, S/p]}, ``crops`` uint8 [K, 3, n, n],
    ``labels`` int64 [K], ``is_thing`` bool [K], ``areas`` float32 [K] (of the box, in square pixels of the file),
    ``image_id`` and ``absent_segments`` (those annotated without a pixel in the PNG). An image that cannot be used is
    a ``Skipped`` with the reason.

    Things use their annotated box, and a crop 1.5 times as large, clipped; stuff uses the tight box of its mask for
    both. Boxes with an area outside ``min_size``^2..``max_size``^2 are left out.

    Args:
        annotations: the annotation file.
        image_root: folder (or URL) of the photographs.
        segm_root: folder (or URL) of the PNGs.
        image_sizes: sides S of the padded inputs; every S is a multiple of ``patch_size``.
        patch_size: p.
        crop_size: n, the model's native size.
        min_size, max_size: limits of the square root of a box's area, in pixels of the file.
        mask_antialias: see :func:`training.evaluation.grid_masks.grid_masks`.
    """

    def __init__(
        self,
        annotations: PanopticAnnotations,
        *,
        image_root: str,
        segm_root: str,
        image_sizes: Sequence[int],
        patch_size: int,
        crop_size: int,
        min_size: float = MIN_SIZE,
        max_size: float = MAX_SIZE,
        mask_antialias: bool = False,
    ) -> None:
        self.annotations = annotations
        self.image_root, self.segm_root = image_root, segm_root
        self.image_sizes, self.patch_size, self.crop_size = tuple(image_sizes), patch_size, crop_size
        self.min_area, self.max_area = min_size**2, max_size**2
        self.mask_antialias = mask_antialias

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> dict[str, Any] | Skipped:
        image_file, segment_file = self.files(index)
        try:
            image = read_image(resolve(self.image_root, image_file))
            ids = read_segment_ids(resolve(self.segm_root, segment_file))
        except ImageError as error:
            return Skipped(error.file, error.reason)
        height, width = image.shape[-2:]
        if ids.shape != (height, width):
            sides = f"{ids.shape[1]} x {ids.shape[0]}"
            return Skipped(image_file, f"{width} x {height} pixels, but its segments in {segment_file} are {sides}")
        segments, absent = self._segments(index, ids)
        if not segments:
            return Skipped(image_file, "no segment within the area limits")
        number, labels, is_thing, boxes, crop_boxes, areas = zip(*segments, strict=True)
        number = np.asarray(number, dtype=np.int32)
        # The sides of the resized image are rounded, the boxes are not: they follow the exact scale.
        normed = (torch.tensor(boxes, dtype=torch.float64) / max(height, width)).float()
        return {
            "images": {size: resize_longest(image, size) for size in self.image_sizes},
            "boxes": {size: normed for size in self.image_sizes},
            "masks": {
                size: grid_masks(ids, number, size // self.patch_size, antialias=self.mask_antialias)
                for size in self.image_sizes
            },
            "crops": _crops(image, crop_boxes, self.crop_size),
            "labels": torch.tensor(labels),
            "is_thing": torch.tensor(is_thing),
            "areas": torch.tensor(areas, dtype=torch.float32),
            "image_id": int(self.annotations.image_ids[index]),
            "absent_segments": absent,
        }

    def files(self, index: int) -> tuple[str, str]:
        """Names of the photograph and of the PNG of an image, relative to their roots."""
        return self.annotations.image_files[index].decode(), self.annotations.segment_files[index].decode()

    def image_bytes(self) -> float:
        """Bytes of what a batch holds of an image with all its segments within the area limits, on average."""
        segments = np.minimum(np.diff(self.annotations.offsets), MAX_SEGMENTS).mean()
        masks = sum((size // self.patch_size) ** 2 for size in self.image_sizes)
        return sum(3 * size**2 for size in self.image_sizes) + float(segments) * (masks + 3 * self.crop_size**2)

    def _segments(self, index: int, ids: np.ndarray) -> tuple[list[tuple], int]:
        """Segments to evaluate, each (id, label, is thing, box, crop box, area), and how many have no pixel."""
        annotations, (height, width) = self.annotations, ids.shape
        segments, absent = [], 0
        start, stop = annotations.offsets[index : index + 2].tolist()
        for entry in range(start, min(stop, start + MAX_SEGMENTS)):
            label, number = int(annotations.labels[entry]), int(annotations.segment_ids[entry])
            is_thing = annotations.is_thing[label]
            tight = None if is_thing else tight_box(ids == number)
            if not (tight or (is_thing and _occurs(ids, number, annotations.boxes[entry]))):
                absent += 1
                continue
            if is_thing:
                x, y, w, h = annotations.boxes[entry].tolist()
                centre_x, centre_y = x + w / 2, y + h / 2
                half_w, half_h = w * CROP_ENLARGEMENT / 2, h * CROP_ENLARGEMENT / 2
                box = (x, y, x + w, y + h)
                crop_box = (
                    max(centre_x - half_w, 0),
                    max(centre_y - half_h, 0),
                    min(centre_x + half_w, width),
                    min(centre_y + half_h, height),
                )
            else:
                box = crop_box = tuple(map(float, tight))
                w, h = box[2] - box[0], box[3] - box[1]
            # The product of the sides is tested apart: two negative sides would pass as an area.
            if w > 0 and h > 0 and self.min_area <= w * h <= self.max_area:
                segments.append((number, label, is_thing, box, crop_box, w * h))
        return segments, absent


def _occurs(ids: np.ndarray, number: int, box: np.ndarray) -> bool:
    """Whether a segment has a pixel: looked for inside its annotated box (xywh) first, where it nearly always is."""
    x1, y1 = np.maximum(box[:2], 0).astype(int)
    x2, y2 = np.maximum(box[:2] + box[2:], 0).astype(int)
    return bool((ids[y1:y2, x1:x2] == number).any() or (ids == number).any())


def _crops(image: Tensor, boxes: Sequence[Sequence[float]], size: int) -> Tensor:
    """:func:`open_clip.transform.crop_region` of every box, in one tensor: uint8 ``[K, 3, size, size]``."""
    crops = torch.empty(len(boxes), 3, size, size, dtype=torch.uint8)
    for crop, box in zip(crops, boxes, strict=True):
        crop.copy_(crop_region(image, box, size))
    return crops


def collate_panoptic(samples: Sequence[dict[str, Any] | Skipped]) -> dict[str, Any]:
    """Samples to one batch: regions of all images one after the other, with ``counts`` per image.

    ``images`` {S: uint8 [B, 3, S, S]}, ``sizes`` {S: [(height, width)] of the images in them}, ``reach`` (of them and
    their boxes), ``boxes`` {S: float32 [K, 4]}, ``masks`` {S: bool [K, S/p, S/p]}, ``crops`` uint8 [K, 3, n, n],
    ``labels``, ``is_thing``, ``areas`` [K], ``counts``, ``image_ids`` int64 [B],
    ``absent_segments`` int, ``skipped`` [(file, reason)]. With no usable image the tensors but ``counts`` are absent.
    """
    usable = [sample for sample in samples if not isinstance(sample, Skipped)]
    batch = {
        "counts": torch.tensor([len(sample["labels"]) for sample in usable], dtype=torch.int64),
        "absent_segments": sum(sample["absent_segments"] for sample in usable),
        "skipped": [(sample.file, sample.reason) for sample in samples if isinstance(sample, Skipped)],
    }
    if usable:
        sizes = list(usable[0]["images"])
        images = {size: [sample["images"][size] for sample in usable] for size in sizes}
        batch["images"] = {size: stack_padded(images[size], size) for size in sizes}
        batch["sizes"] = {size: [tuple(image.shape[-2:]) for image in images[size]] for size in sizes}
        boxes = {size: [sample["boxes"][size] for sample in usable] for size in sizes}
        batch["reach"] = {size: list(map(reach, batch["sizes"][size], boxes[size], repeat(size))) for size in sizes}
        for key in ("boxes", "masks"):
            batch[key] = {size: torch.cat([sample[key][size] for sample in usable]) for size in sizes}
        for key in ("labels", "is_thing", "areas"):
            batch[key] = torch.cat([sample[key] for sample in usable])
        crops = [sample["crops"] for sample in usable]
        batch["crops"] = torch.cat(crops, out=black(sum(map(len, crops)), *crops[0].shape[1:]))
        batch["image_ids"] = torch.tensor([sample["image_id"] for sample in usable])
    return batch


@dataclass(frozen=True)
class EvalData:
    """What :func:`training.evaluation.evaluate.evaluate` needs of an evaluation set."""

    loader: DataLoader  # this process's share
    class_names: list[str]
    is_thing: list[bool]
    num_images: int  # over all processes
    num_local_images: int
    annotation_file: str
    image_sizes: list[int]
    max_skipped: float  # share of unusable images above which evaluation stops


def build_eval_data(
    options: EvalOptions,
    *,
    image_sizes: Sequence[int],
    patch_size: int,
    crop_size: int,
    batch_size: int = 2,
    workers: int = 0,
    max_skipped: float = 0.1,
    rank: int = 0,
    world_size: int = 1,
) -> EvalData:
    """Open the panoptic evaluation set of ``--val-data``.

    Process r takes the images r, r + world_size, ...: each image once, so shares differ by one image and may be empty.

    Args:
        options: the flags.
        image_sizes: sides of the padded inputs.
        patch_size: the model's.
        crop_size: the model's native size.
        batch_size, workers: of the loader.
        max_skipped: share of unusable images at which the evaluation stops.
        rank, world_size: this process and how many there are.

    Raises:
        UserError: a wrong annotation file, folders without its images, a size that the patch size does not divide, or
            too little shared memory for batches.
    """
    for size in image_sizes:
        if size < patch_size or size % patch_size:
            raise UserError(
                f"--eval-image-sizes / --det-image-size {size}: not a multiple of the model's patch size {patch_size}; "
                f"take {max(1, round(size / patch_size)) * patch_size}"
            )
    annotations = load_panoptic(options.val_data)
    segm_root = options.val_segm_root or os.path.splitext(options.val_data)[0]
    dataset = PanopticDataset(
        annotations,
        image_root=options.val_image_root,
        segm_root=segm_root,
        image_sizes=list(dict.fromkeys(image_sizes)),
        patch_size=patch_size,
        crop_size=crop_size,
        mask_antialias=options.mask_antialias,
    )
    probes = [dataset.files(index) for index in range(0, len(dataset), max(1, len(dataset) // PROBES))]
    for root, names, flag in zip(
        (options.val_image_root or "", segm_root),
        zip(*probes, strict=True),
        ("--val-image-root", "--val-segm-root"),
        strict=True,
    ):
        check_image_root(root, names, annotations.file, flag)
    share = range(rank, len(dataset), world_size)
    check_shared_memory(
        batch_size * dataset.image_bytes(), workers=min(workers, len(share)), world_size=world_size,
        in_all=-(-len(share) // batch_size), flags="--workers, --batch-size or --eval-image-sizes",
    )  # fmt: skip
    loader = Loader(
        dataset,
        workers=min(workers, len(share)),
        batch_size=batch_size,
        sampler=share,
        collate_fn=collate_panoptic,
        pin_memory=torch.cuda.is_available(),
        # Workers end with the pass: they would idle through the epochs between two evaluations.
        persistent_workers=False,
    )
    return EvalData(
        loader=loader,
        class_names=annotations.class_names,
        is_thing=annotations.is_thing,
        num_images=len(dataset),
        num_local_images=len(share),
        annotation_file=annotations.file,
        image_sizes=list(dataset.image_sizes),
        max_skipped=max_skipped,
    )
