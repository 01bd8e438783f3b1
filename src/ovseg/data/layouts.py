"""Folder trees of segmentation data sets, as they are downloaded: which photograph belongs to which label file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ovseg.classes import ClassList, read_class_file
from ovseg.data.label_files import identity_table, label_table, read_labels, read_panoptic
from training.engine.data.annotations import read_json
from training.engine.data.images import ImageError, first_line, resolve
from training.engine.errors import UserError


@dataclass(frozen=True)
class Pairs:
    """What a folder tree holds: photographs, their label files, and how one of those is read to uint8 ``[H, W]``."""

    images: list[str]
    labels: list[str]
    read: Callable[[str], np.ndarray]


def _find(root: Path, places: Sequence[str], marks: Sequence[str], what: str) -> Path:
    """The first of some places below a root that holds all marks.

    Raises:
        UserError: none does.
    """
    for place in places:
        if all((root / place / mark).exists() for mark in marks):
            return root / place
    raise UserError(f"--data-root {root}: {what} is not there; it has {' and '.join(marks)}")


def _read_list(path: Path) -> list[str]:
    """The ids of a list file, one a line."""
    try:
        return [line.split()[0] for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the list of the split cannot be read ({first_line(error)})") from None


def _first_list(folder: Path, names: Sequence[str], split: str) -> list[str]:
    for name in names:
        if (folder / name / f"{split}.txt").is_file():
            return _read_list(folder / name / f"{split}.txt")
    raise UserError(f"{folder / names[0] / split}.txt: no such list; the split is called {split}")


def _voc(name: str, root: Path, split: str) -> Pairs:
    """VOC 2012: ``VOCdevkit/VOC2012``.

    ``aug`` are SBD's images that are in neither of VOC's own parts, ``trainaug`` these and VOC's train. VOC's images
    have VOC's labels; the others those of SegmentationClassAug, or of SBD as it is downloaded.
    """
    places = ("", "VOC2012", "VOCdevkit/VOC2012")
    folder = _find(root, places, ("JPEGImages", "SegmentationClass", "ImageSets"), "VOC 2012")
    augmented = folder / "SegmentationClassAug"
    if split in ("trainaug", "aug") and not augmented.is_dir():
        return _voc_sbd(name, root, folder, split)
    ids = _first_list(folder / "ImageSets", ("Segmentation",), split)
    own = set(ids if split not in ("trainaug", "aug") else _voc_list(folder, "train"))
    labels = [folder / "SegmentationClass" if i in own else augmented for i in ids]
    return Pairs(
        [str(folder / "JPEGImages" / f"{i}.jpg") for i in ids],
        [str(place / f"{i}.png") for place, i in zip(labels, ids, strict=True)],
        _voc_reader(name),
    )


def _voc_list(folder: Path, part: str) -> list[str]:
    """The ids of VOC's own ``train`` or ``val``."""
    return _read_list(folder / "ImageSets" / "Segmentation" / f"{part}.txt")


def _voc_reader(name: str) -> Callable[[str], np.ndarray]:
    table = label_table(read_class_file(name)["label_map"])
    tables = {".png": table, ".mat": table}
    return partial(read_labels, tables=tables, keys={".mat": ("GTcls", "Segmentation")})


def _voc_sbd(name: str, root: Path, folder: Path, split: str) -> Pairs:
    """Images of SBD (Hariharan et al., 2011) that are in neither VOC's train nor its val, behind VOC's train for the
    split ``trainaug`` (10,582 images).
    """
    above = [root, folder.parent, folder.parent.parent]
    places = [p / q for p in above for q in ("benchmark_RELEASE/dataset", "SBD", "sbd", "dataset")]
    sbd = next((p for p in places if (p / "cls").is_dir()), None)
    if sbd is None:
        raise UserError(
            f"--data-root {root}: {split} needs SegmentationClassAug in {folder}, or SBD's benchmark_RELEASE beside it"
        )
    train, val = (_voc_list(folder, part) for part in ("train", "val"))
    extra = sorted(set(_read_list(sbd / "train.txt") + _read_list(sbd / "val.txt")) - set(train) - set(val))
    train = train if split == "trainaug" else []
    labels = [str(folder / "SegmentationClass" / f"{i}.png") for i in train]
    labels += [str(sbd / "cls" / f"{i}.mat") for i in extra]
    images = [str(folder / "JPEGImages" / f"{i}.jpg") for i in [*train, *extra]]
    return Pairs(images, labels, _voc_reader(name))


def _context(name: str, root: Path, split: str) -> Pairs:
    """PASCAL Context on VOC 2010: converted PNGs (0..59), or the 459-class MATLAB files as they are downloaded."""
    folder = _find(root, ("", "VOC2010", "VOCdevkit/VOC2010"), ("JPEGImages", "ImageSets"), "VOC 2010")
    # Context's own lists are those of VOC 2010's main task.
    ids = _first_list(folder / "ImageSets", ("SegmentationContext", "Main"), split)
    content = read_class_file(name)
    rest = content["label_map"]["0"]
    raw = np.full(460, rest, dtype=np.int16)
    for label, value in enumerate(content["raw_ids"]):
        raw[value] = label
    converted = folder / "SegmentationClassContext"
    if converted.is_dir():
        labels = [str(converted / f"{i}.png") for i in ids]
    else:
        places = (folder / "trainval", root / "trainval", folder.parent / "trainval")
        mats = next((p for p in places if p.is_dir()), None)
        if mats is None:
            raise UserError(f"--data-root {root}: neither {converted} nor the folder trainval of Context's label maps")
        labels = [str(mats / f"{i}.mat") for i in ids]
    tables = {".png": label_table(content["label_map"]), ".mat": raw}
    read = partial(read_labels, tables=tables, keys={".mat": ("LabelMap",)})
    return Pairs([str(folder / "JPEGImages" / f"{i}.jpg") for i in ids], labels, read)


def _ade(name: str, root: Path, split: str) -> Pairs:
    """ADE20K's 150 classes: ``ADEChallengeData2016``."""
    folder = _find(root, ("", "ADEChallengeData2016", "ade/ADEChallengeData2016"), ("images", "annotations"), "ADE20K")
    split = {"val": "validation", "train": "training"}.get(split, split)
    images = sorted((folder / "images" / split).glob("*.jpg"))
    labels = [str(folder / "annotations" / split / f"{image.stem}.png") for image in images]
    tables = {".png": label_table(read_class_file(name)["label_map"])}
    return Pairs([str(image) for image in images], labels, partial(read_labels, tables=tables, keys={}))


def _coco(name: str, root: Path, split: str) -> Pairs:
    """COCO-Stuff's label maps (``stuffthingmaps``, pixel = COCO id - 1), or the files converted from them.

    Photographs and label maps may lie in the root or in its ``coco``, where the training recipes have COCO.
    """
    split = split if split.endswith("2017") else f"{split}2017"
    image_folders = [root / p / split for p in ("", "images", "coco_stuff164k/images", "coco", "coco/images")]
    images = next((p for p in image_folders if p.is_dir()), None)
    if images is None:
        raise UserError(f"--data-root {root}: no folder {split}, images/{split} or coco/{split} of photographs")
    places = ["stuffthingmaps", "annotations", "annotations/stuffthingmaps", "coco_stuff164k/annotations"]
    places += [f"coco/{place}" for place in places[:3]]
    converted = {"coco_stuff171": "_labelTrainIds.png", "coco_object": "_instanceTrainIds.png"}[name]
    content = read_class_file(name)
    tables = {
        "_labelTrainIds.png": identity_table(len(content["names"])),
        "_instanceTrainIds.png": identity_table(len(content["names"])),
        ".png": label_table(content["label_map"]),
    }
    read = partial(read_labels, tables=tables, keys={})
    for folder in [root / place / split for place in places]:
        if not folder.is_dir():
            continue
        files = sorted(folder.glob("*.png"))
        plain = [f for f in files if not f.stem.endswith("TrainIds")]
        chosen, ending = (plain, ".png") if plain else ([f for f in files if f.name.endswith(converted)], converted)
        ids = [f.name.removesuffix(ending) for f in chosen]
        if ids:
            return Pairs([str(images / f"{i}.jpg") for i in ids], [str(f) for f in chosen], read)
    raise UserError(f"--data-root {root}: no label maps in stuffthingmaps/{split} or annotations/{split}, nor in coco")


def _cityscapes(name: str, root: Path, split: str) -> Pairs:
    """Cityscapes: ``leftImg8bit`` and ``gtFine``, with the official ids or the converted train ids."""
    folder = _find(root, ("", "cityscapes"), ("leftImg8bit", "gtFine"), "Cityscapes")
    images = sorted((folder / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    stems = [folder / "gtFine" / split / i.parent.name / i.name.removesuffix("_leftImg8bit.png") for i in images]
    ids = [f"{stem}_gtFine_labelIds.png" for stem in stems]
    train_ids = [f"{stem}_gtFine_labelTrainIds.png" for stem in stems]
    content = read_class_file(name)
    tables = {
        "_labelTrainIds.png": identity_table(len(content["names"])),
        "_labelIds.png": label_table(content["label_map"]),
    }
    labels = ids if not ids or Path(ids[0]).is_file() else train_ids
    return Pairs([str(i) for i in images], labels, partial(read_labels, tables=tables, keys={}))


LAYOUTS: dict[str, Callable[[str, Path, str], Pairs]] = {
    "voc20": _voc,
    "voc21": _voc,
    "context59": _context,
    "context60": _context,
    "coco_object": _coco,
    "coco_stuff171": _coco,
    "ade150": _ade,
    "cityscapes19": _cityscapes,
}


def panoptic_pairs(root: Path, split: str, image_root: str | Path | None) -> tuple[ClassList, Pairs]:
    """COCO panoptic turned semantic: every segment has the label of its category, void is 255."""
    if root.is_dir():
        places = (root / "annotations", root / "coco" / "annotations")
        files = [place / f"panoptic_{s}.json" for place in places for s in (split, f"{split}2017")]
        file = next((f for f in files if f.is_file()), None)
        if file is None:
            raise UserError(f"--data-root {root}: neither {files[0]} nor {files[1].name}, nor one of them in coco")
    else:
        file = root
    folder = Path(image_root) if image_root else file.parent.parent / file.stem.removeprefix("panoptic_")
    content = read_json(str(file), "--data-root")
    try:
        categories = sorted(content["categories"], key=lambda category: category["id"])
        label_of = {category["id"]: label for label, category in enumerate(categories)}
        names = {image["id"]: image["file_name"] for image in content["images"]}
        images, labels, segments = [], [], {}
        for annotation in content["annotations"]:
            path = resolve(str(file.with_suffix("")), annotation["file_name"])
            images.append(resolve(str(folder), names[annotation["image_id"]]))
            labels.append(path)
            segments[path] = {s["id"]: label_of[s["category_id"]] for s in annotation["segments_info"]}
        classes = ClassList(tuple(c["name"] for c in categories), tuple((c["name"],) for c in categories))
    except (AttributeError, KeyError, TypeError, ImageError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"--data-root {file}: {reason}; it must be a COCO panoptic annotation file") from None
    return classes, Pairs(images, labels, partial(read_panoptic, segments=segments))
