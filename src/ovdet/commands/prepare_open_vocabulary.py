"""Make the annotation files of the open-vocabulary benchmarks from the official ones.

    python tools/prepare_open_vocabulary.py coco --train data/coco/annotations/instances_train2017.json \\
        --val data/coco/annotations/instances_val2017.json
    python tools/prepare_open_vocabulary.py lvis --train data/lvis_v1/annotations/lvis_v1_train.json
    python tools/prepare_open_vocabulary.py voc --root data/VOCdevkit/VOC2007 \\
        --out data/voc2007/annotations/voc07_test.json

``coco``: ``*_base.json`` with the base classes' objects for training, ``*_ov65.json`` with base and novel ones for
testing (``--split FILE`` for lists of your own: json with "base" and "novel"). ``lvis``: ``*_norare.json`` without the
rare classes. ``voc``: the XML files of a split as one json (``--first N``: the first N classes). Files are written
beside the official ones unless ``--out`` is given; images without an object of the classes kept are left out, unless
``--all-images`` keeps them (detectors that distil learn from these as well).
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ovdet.data.annotations import read_json
from ovdet.evaluation.coco import write_json
from training.engine.errors import UserError, run_program
from training.engine.flags import Parser

log = logging.getLogger(__name__)

OV_COCO = Path(__file__).resolve().parents[1] / "fvit" / "ov_coco.json"  # class names with their split
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip


def keep_categories(
    content: dict[str, Any], wanted: Callable[[dict[str, Any]], bool], *, all_images: bool = False
) -> dict[str, Any]:
    """An annotation file's content with some categories only, and the images that have objects of them.

    Ids, order and all other fields stay as they are.

    Args:
        all_images: keep images without such objects as well.
    """
    categories = [c for c in content["categories"] if isinstance(c, dict) and wanted(c)]
    ids = {c.get("id") for c in categories}
    annotations = [a for a in content["annotations"] if isinstance(a, dict) and a.get("category_id") in ids]
    images = {a.get("image_id") for a in annotations}
    return {
        **content,
        "images": [i for i in content["images"] if isinstance(i, dict) and (all_images or i.get("id") in images)],
        "annotations": annotations,
        "categories": categories,
    }


def read_split(path: Path) -> dict[str, list[str]]:
    """Base and novel class names of a json. UserError unless both are lists of distinct names."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        split = {side: [str(n) for n in content[side]] for side in ("base", "novel")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'--split {path}: not a json with lists "base" and "novel" ({type(error).__name__})') from None
    names = split["base"] + split["novel"]
    if not split["base"] or len(set(names)) < len(names):
        raise UserError(f"--split {path}: there must be base classes, and no class may be listed twice")
    return split


def prepare_coco(
    train: Path | None, val: Path | None, split: dict[str, list[str]], out: Path | None, *, all_images: bool = False
) -> list[Path]:
    """Training file of the base classes, validation file of all. Returns what was written.

    Args:
        all_images: the training file keeps images without base objects.
    """
    if train is None and val is None:
        raise UserError("give --train FILE, --val FILE or both")
    everything = split["base"] + split["novel"]
    jobs = [(train, split["base"], "base", "--train"), (val, everything, f"ov{len(everything)}", "--val")]
    written = []
    for source, names, suffix, flag in jobs:
        if source is None:
            continue
        content = read_json(str(source), flag)
        known = {c.get("name") for c in content["categories"] if isinstance(c, dict)}
        missing = [n for n in names if n not in known]
        if missing:
            raise UserError(
                f"{flag} {source}: it has no category {', '.join(missing[:4])}; give the official file, or "
                "--split with the names of yours"
            )
        kept = keep_categories(
            content, lambda c, names=frozenset(names): c.get("name") in names,
            all_images=all_images and flag == "--train",
        )  # fmt: skip
        written.append(_write(kept, source, suffix, out))
    return written


def prepare_lvis(train: Path, out: Path | None, *, all_images: bool = False) -> list[Path]:
    """LVIS without its rare classes; with ``all_images`` also images that have no others."""
    content = read_json(str(train), "--train")
    if not any(isinstance(c, dict) and c.get("frequency") == "r" for c in content["categories"]):
        raise UserError(f'--train {train}: no category has the frequency "r"; give the official LVIS file')
    kept = keep_categories(content, lambda c: c.get("frequency") != "r", all_images=all_images)
    return [_write(kept, train, "norare", out)]


def prepare_voc(root: Path, split: str, out: Path, *, first: int = len(VOC_CLASSES)) -> list[Path]:
    """A VOC split as a COCO file. Boxes become 0-based; difficult objects are marked ``difficult``, as VOC does.

    Args:
        first: of the 20 classes, by name, the first so many, with the images that have objects of them.
    """
    if not 1 <= first <= len(VOC_CLASSES):
        raise UserError(f"--first {first}: VOC has {len(VOC_CLASSES)} classes")
    listing = root / "ImageSets" / "Main" / f"{split}.txt"
    if not listing.is_file():
        raise UserError(f"--root {root}: there is no {listing}; give the folder VOC2007 of the official archive")
    names = [name.replace(" ", "") for name in VOC_CLASSES]  # as the XML files have them
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, name in enumerate(listing.read_text().split(), 1):
        file = root / "Annotations" / f"{name}.xml"
        try:
            tree = ElementTree.parse(file)
            size = {k: int(tree.findtext(f"size/{k}", "")) for k in ("width", "height")}
            images.append({"id": number, "file_name": f"{name}.jpg", **size})
            for item in tree.iterfind("object"):
                corners = [float(item.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax")]
                x, y = corners[0] - 1, corners[1] - 1  # VOC counts pixels from 1, both corners included
                w, h = corners[2] - x, corners[3] - y
                annotations.append(
                    {
                        "id": len(annotations) + 1, "image_id": number, "bbox": [x, y, w, h], "area": w * h,
                        "category_id": names.index(item.findtext("name", "")) + 1,
                        "iscrowd": 0, "difficult": int(item.findtext("difficult", "0")),
                    }
                )  # fmt: skip
        except (OSError, ElementTree.ParseError, ValueError) as error:
            raise UserError(f"{file}: not a VOC annotation ({error}); fetch the archive again") from None
    categories = [{"id": i, "name": name} for i, name in enumerate(VOC_CLASSES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    if first < len(VOC_CLASSES):
        content = keep_categories(content, lambda c: c["id"] <= first)
    write_json(out, content)
    _say(out, content["images"], content["annotations"], content["categories"])
    return [out]


def _write(content: dict[str, Any], source: Path, suffix: str, out: Path | None) -> Path:
    path = (out or source.parent) / f"{source.stem}_{suffix}.json"
    write_json(path, content)
    _say(path, content["images"], content["annotations"], content["categories"])
    return path


def _say(path: Path, images: list, annotations: list, categories: list) -> None:
    print(f"{path}: {len(images)} images, {len(annotations)} objects of {len(categories)} classes")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write the files. UserError for faulty input."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    coco = commands.add_parser("coco", help="OV-COCO, or COCO-style data with a split of your own")
    coco.add_argument("--train", type=Path, help="official training file")
    coco.add_argument("--val", type=Path, help="official validation file")
    coco.add_argument("--split", type=Path, default=OV_COCO, help='json with class names, "base" and "novel"')
    coco.add_argument("--out", type=Path, help="folder to write to")
    coco.add_argument("--all-images", action="store_true", help="the training file keeps images without base objects")
    lvis = commands.add_parser("lvis", help="OV-LVIS")
    lvis.add_argument("--train", type=Path, required=True, help="official training file")
    lvis.add_argument("--out", type=Path, help="folder to write to")
    lvis.add_argument("--all-images", action="store_true", help="keep images that have rare classes' objects alone")
    voc = commands.add_parser("voc", help="VOC's XML files to one json")
    voc.add_argument("--root", type=Path, required=True, help="folder VOC2007")
    voc.add_argument("--subset", default="test", help="name of a file in ImageSets/Main")
    voc.add_argument("--out", type=Path, required=True, help="file to write")
    voc.add_argument("--first", type=int, default=len(VOC_CLASSES), help="only the first so many classes, by name")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if args.benchmark == "coco":
        prepare_coco(args.train, args.val, read_split(args.split), args.out, all_images=args.all_images)
    elif args.benchmark == "lvis":
        prepare_lvis(args.train, args.out, all_images=args.all_images)
    else:
        prepare_voc(args.root, args.subset, args.out, first=args.first)


def run() -> int:
    """The command line of this process; gives its exit status."""
    return run_program(main)
