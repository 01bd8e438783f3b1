"""Miniatures of the official folder trees, drawn anew for each test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 24, 36


def write_image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_values(path: Path, values: np.ndarray, palette: bool = False) -> None:
    """A label PNG of one channel, or with a palette as VOC has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8), mode="P" if palette else "L")
    if palette:
        image.putpalette([i * 37 % 256 for i in range(768)])
    image.save(path)


def stripes(*values: int) -> np.ndarray:
    """Vertical stripes of the given values, [HEIGHT, WIDTH]."""
    return np.repeat(np.asarray(values), WIDTH // len(values))[None].repeat(HEIGHT, 0)


def write_list(path: Path, *ids: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{i}\n" for i in ids))


def voc(root: Path) -> dict:
    """Values 0 (background), 1 (aeroplane), 20 (tvmonitor), 255 (border)."""
    folder = root / "VOCdevkit" / "VOC2012"
    for i in ("2007_000033", "2007_000042"):
        write_image(folder / "JPEGImages" / f"{i}.jpg")
        write_values(folder / "SegmentationClass" / f"{i}.png", stripes(0, 1, 20, 255), palette=True)
    write_list(folder / "ImageSets" / "Segmentation" / "val.txt", "2007_000033", "2007_000042")
    write_list(folder / "ImageSets" / "Segmentation" / "train.txt", "2007_000042")
    return {"voc21": (2, [0, 1, 20, 255]), "voc20": (2, [255, 0, 19, 255])}


def context(root: Path) -> dict:
    folder = root / "VOCdevkit" / "VOC2010"
    write_image(folder / "JPEGImages" / "2008_000002.jpg")
    write_values(folder / "SegmentationClassContext" / "2008_000002.png", stripes(0, 1, 59, 7))
    write_list(folder / "ImageSets" / "SegmentationContext" / "val.txt", "2008_000002")
    return {"context60": (1, [0, 1, 59, 7]), "context59": (1, [255, 0, 58, 6])}


def context_as_downloaded(root: Path) -> dict:
    """The 459-class MATLAB files beside VOC 2010: 2 is the aeroplane, 458 wood, 100 none of the 59."""
    from scipy.io import savemat

    folder = root / "VOCdevkit" / "VOC2010"
    write_image(folder / "JPEGImages" / "2008_000002.jpg")
    write_list(folder / "ImageSets" / "Main" / "val.txt", "2008_000002")
    (root / "trainval").mkdir()
    savemat(root / "trainval" / "2008_000002.mat", {"LabelMap": stripes(2, 458, 100, 9).astype(np.uint16)})
    return {"context60": (1, [1, 59, 0, 2]), "context59": (1, [0, 58, 255, 1])}


def ade(root: Path) -> dict:
    folder = root / "ADEChallengeData2016"
    write_image(folder / "images" / "validation" / "ADE_val_00000001.jpg")
    write_values(folder / "annotations" / "validation" / "ADE_val_00000001.png", stripes(0, 1, 150, 13))
    return {"ade150": (1, [255, 0, 149, 12])}


def coco(root: Path) -> dict:
    """stuffthingmaps: 0 person, 89 toothbrush, 91 banner, 181 wood, 255 unlabelled."""
    write_image(root / "val2017" / "000000000139.jpg")
    write_values(root / "stuffthingmaps" / "val2017" / "000000000139.png", stripes(0, 89, 91, 255))
    return {"coco_stuff171": (1, [0, 79, 80, 255]), "coco_object": (1, [1, 80, 0, 0])}


def coco_of_the_recipes(root: Path) -> dict:
    """Below ``coco``, where the training recipes have it, label maps included."""
    return coco(root / "coco")


def coco_beside_label_maps(root: Path) -> dict:
    """Label maps were unpacked beside it."""
    found = coco(root / "coco")
    (root / "coco" / "stuffthingmaps").rename(root / "stuffthingmaps")
    return found


def coco_converted(root: Path) -> dict:
    """The layout of the published programs, with both kinds of converted files."""
    write_image(root / "images" / "val2017" / "000000000139.jpg")
    folder = root / "annotations" / "val2017"
    write_values(folder / "000000000139_labelTrainIds.png", stripes(0, 79, 170, 255))
    write_values(folder / "000000000139_instanceTrainIds.png", stripes(1, 80, 0, 0))
    return {"coco_stuff171": (1, [0, 79, 170, 255]), "coco_object": (1, [1, 80, 0, 0])}


def cityscapes(root: Path) -> dict:
    """Official ids: 7 road, 33 bicycle, 0 unlabelled, 26 car."""
    stem = "frankfurt/frankfurt_000000_000294"
    write_image(root / "leftImg8bit" / "val" / f"{stem}_leftImg8bit.png")
    write_values(root / "gtFine" / "val" / f"{stem}_gtFine_labelIds.png", stripes(7, 33, 0, 26))
    return {"cityscapes19": (1, [0, 18, 255, 13])}


def cityscapes_converted(root: Path) -> dict:
    stem = "frankfurt/frankfurt_000000_000294"
    write_image(root / "leftImg8bit" / "val" / f"{stem}_leftImg8bit.png")
    write_values(root / "gtFine" / "val" / f"{stem}_gtFine_labelTrainIds.png", stripes(0, 18, 255, 13))
    return {"cityscapes19": (1, [0, 18, 255, 13])}


def panoptic(root: Path) -> dict:
    """Segments 7 and 70000 of categories 1 and 17 (labels 0 and 1), void, and a second segment of category 1."""
    write_image(root / "val2017" / "000000000139.jpg")
    ids = stripes(7, 70000, 0, 9)
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    (root / "annotations" / "panoptic_val2017").mkdir(parents=True)
    Image.fromarray(rgb).save(root / "annotations" / "panoptic_val2017" / "000000000139.png")
    segments = [{"id": 7, "category_id": 1}, {"id": 70000, "category_id": 17}, {"id": 9, "category_id": 1}]
    content = {
        "images": [{"id": 139, "file_name": "000000000139.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [{"image_id": 139, "file_name": "000000000139.png", "segments_info": segments}],
        "categories": [{"id": 17, "name": "cat", "isthing": 1}, {"id": 1, "name": "person", "isthing": 1}],
    }
    (root / "annotations" / "panoptic_val2017.json").write_text(json.dumps(content))
    return {"panoptic": (1, [0, 1, 255, 0])}


def panoptic_of_the_recipes(root: Path) -> dict:
    """Below ``coco``, as above."""
    return panoptic(root / "coco")


#: Each draws a tree below a folder and says, per data set, how many images there are and the labels of the stripes.
TREES: list[Callable[[Path], dict]] = [
    voc, context, context_as_downloaded, ade, coco, coco_of_the_recipes, coco_beside_label_maps, coco_converted,
    cityscapes, cityscapes_converted, panoptic, panoptic_of_the_recipes,
]  # fmt: skip
