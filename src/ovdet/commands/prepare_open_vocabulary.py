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
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ovdet.data.annotations import read_json
from training.engine.errors import UserError, run_program
from training.engine.files import write_json
from training.engine.flags import PATH, Parser

log = logging.getLogger(__name__)

OV_COCO = Path(__file__).resolve().parents[1] / "fvit" / "ov_coco.json"  # class names with their split
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip


def read_entries(path: Path, flag: str) -> dict[str, Any]:
    """Content of an annotation file whose ids can be compared.

    Images and objects without such ids are left out, with their number. UserError for categories without id or name:
    objects of a class would go missing.
    """
    content = read_json(str(path), flag)
    for category in content["categories"]:
        named = isinstance(category, dict) and isinstance(category.get("name"), str)
        if not named or not _is_id(category.get("id")):
            raise UserError(
                f"{flag} {path}: category {json.dumps(category)[:80]} has no number as id or no text as name; mend it"
            )
    needed = {"images": ("id",), "annotations": ("image_id", "category_id")}
    for part, keys in needed.items():
        sound = [e for e in content[part] if isinstance(e, dict) and all(_is_id(e.get(k)) for k in keys)]
        if len(sound) < len(content[part]):
            log.warning("%s %s: %d of its %d %s are left out: their %s is no number", flag, path,
                        len(content[part]) - len(sound), len(content[part]), part, " or ".join(keys))  # fmt: skip
        content[part] = sound
    return content


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, float, str)) and not isinstance(value, bool)


def keep_categories(
    content: dict[str, Any], wanted: Callable[[dict[str, Any]], bool], *, all_images: bool = False
) -> dict[str, Any]:
    """An annotation file's content with some categories only, and the images that have objects of them.

    Ids, order and all other fields stay as they are.

    Args:
        all_images: keep images without such objects as well.
    """
    categories = [c for c in content["categories"] if wanted(c)]
    ids = {c["id"] for c in categories}
    annotations = [a for a in content["annotations"] if a["category_id"] in ids]
    images = {a["image_id"] for a in annotations}
    return {
        **content,
        "images": [i for i in content["images"] if all_images or i["id"] in images],
        "annotations": annotations,
        "categories": categories,
    }


def read_split(path: Path) -> dict[str, list[str]]:
    """Base and novel class names of a json. UserError unless both are lists of distinct names."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        split = {side: content[side] for side in ("base", "novel")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'--split {path}: not a json with lists "base" and "novel" ({type(error).__name__})') from None
    for side, given in split.items():
        if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
            raise UserError(f'--split {path}: "{side}" is {json.dumps(given)[:60]}; give a list of names: ["a", "b"]')
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
        content = read_entries(source, flag)
        known = {c["name"] for c in content["categories"]}
        missing = [n for n in names if n not in known]
        if missing:
            raise UserError(
                f"{flag} {source}: it has no category {', '.join(missing[:4])}; give the official file, or "
                "--split with the names of yours"
            )
        kept = keep_categories(
            content, lambda c, names=frozenset(names): c["name"] in names,
            all_images=all_images and flag == "--train",
        )  # fmt: skip
        written.append(_write(kept, source, suffix, out, flag))
    return written


def prepare_lvis(train: Path, out: Path | None, *, all_images: bool = False) -> list[Path]:
    """LVIS without its rare classes; with ``all_images`` also images that have no others."""
    content = read_entries(train, "--train")
    if not any(c.get("frequency") == "r" for c in content["categories"]):
        raise UserError(f'--train {train}: no category has the frequency "r"; give the official LVIS file')
    kept = keep_categories(content, lambda c: c.get("frequency") != "r", all_images=all_images)
    return [_write(kept, train, "norare", out, "--train")]


def prepare_voc(root: Path, split: str, out: Path, *, first: int = len(VOC_CLASSES)) -> list[Path]:
    """A VOC split as a COCO file. Boxes become 0-based; difficult objects are marked ``difficult``, as VOC does.

    Images without a size or listed again, and boxes that are none, are left out, with their number.

    Args:
        first: of the 20 classes, by name, the first so many, with the images that have objects of them.
    """
    if not 1 <= first <= len(VOC_CLASSES):
        raise UserError(f"--first {first}: VOC has {len(VOC_CLASSES)} classes")
    listing = root / "ImageSets" / "Main" / f"{split}.txt"
    if not listing.is_file():
        raise UserError(f"--root {root}: there is no {listing}; give the folder VOC2007 of the official archive")
    try:
        listed = listing.read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{listing}: not readable as UTF-8 text ({type(error).__name__}); save it as UTF-8") from None
    names = [name.replace(" ", "") for name in VOC_CLASSES]  # as the XML files have them
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, name in enumerate(listed, 1):
        if name in seen:
            left_out["images that are listed again"] += 1
            continue
        seen.add(name)
        file = root / "Annotations" / f"{name}.xml"
        try:
            tree = ElementTree.parse(file)
            size = {k: int(tree.findtext(f"size/{k}", "")) for k in ("width", "height")}
            if min(size.values()) < 1:
                left_out["images of size 0"] += 1
                continue
            images.append({"id": number, "file_name": f"{name}.jpg", **size})
            for item in tree.iterfind("object"):
                corners = [float(item.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax")]
                # VOC counts pixels from 1, both corners included; boxes of makers who count from 0 begin at the edge.
                x, y = max(corners[0] - 1, 0.0), max(corners[1] - 1, 0.0)
                w, h = corners[2] - x, corners[3] - y
                if not all(map(math.isfinite, corners)) or min(corners) < 0 or min(w, h) <= 0:
                    left_out["objects whose box is negative, empty or no number"] += 1
                    continue
                annotations.append(
                    {
                        "id": len(annotations) + 1, "image_id": number, "bbox": [x, y, w, h], "area": w * h,
                        "category_id": names.index(item.findtext("name", "")) + 1,
                        "iscrowd": 0, "difficult": int(item.findtext("difficult", "0")),
                    }
                )  # fmt: skip
        except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
            raise UserError(f"{file}: not a VOC annotation ({error}); fetch the archive again") from None
    categories = [{"id": i, "name": name} for i, name in enumerate(VOC_CLASSES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    if first < len(VOC_CLASSES):
        content = keep_categories(content, lambda c: c["id"] <= first)
    if left_out:
        log.warning("%s: left out %s", listing, ", ".join(f"{count} {what}" for what, count in left_out.items()))
    _check_images(content, f"--root {root}: {listing.name}")
    write_json(out, content)
    _say(out, content["images"], content["annotations"], content["categories"])
    return [out]


def _check_images(content: dict[str, Any], source: str) -> None:
    """UserError where no image is left: neither training nor a test could use the file."""
    if not content["images"]:
        raise UserError(f"{source}: no image of it has an object of the classes kept; give another file")


def _write(content: dict[str, Any], source: Path, suffix: str, out: Path | None, flag: str) -> Path:
    _check_images(content, f"{flag} {source}")
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
    coco.add_argument("--train", type=PATH, help="official training file")
    coco.add_argument("--val", type=PATH, help="official validation file")
    coco.add_argument("--split", type=PATH, default=OV_COCO, help='json with class names, "base" and "novel"')
    coco.add_argument("--out", type=PATH, help="folder to write to")
    coco.add_argument("--all-images", action="store_true", help="the training file keeps images without base objects")
    lvis = commands.add_parser("lvis", help="OV-LVIS")
    lvis.add_argument("--train", type=PATH, required=True, help="official training file")
    lvis.add_argument("--out", type=PATH, help="folder to write to")
    lvis.add_argument("--all-images", action="store_true", help="keep images that have rare classes' objects alone")
    voc = commands.add_parser("voc", help="VOC's XML files to one json")
    voc.add_argument("--root", type=PATH, required=True, help="folder VOC2007")
    voc.add_argument("--subset", default="test", help="name of a file in ImageSets/Main")
    voc.add_argument("--out", type=PATH, required=True, help="file to write")
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
