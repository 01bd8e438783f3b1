"""Generated scenes: a small panoptic dataset for the quick start, the tests and the benchmarks.

    python -m training.scenes --out data/scenes --train 2000 --val 200 --size 128 --seed 0

Textured regions (sky, grass, brick wall, ...) are the stuff; coloured, patterned shapes ("red striped circle") are
the things. What comes out is COCO's own layout: ``train2017/``, ``val2017/``, ``annotations/instances_*2017.json``
(run-length masks), ``annotations/panoptic_*2017.json`` with their PNG folders, ``annotations/captions_*2017.json``, and
for contrastive training ``pairs/`` with ``annotations/captions_pairs.json``: small pictures, cut from further scenes
the way regions are cut in training. ``annotations/split.json`` names the base and the novel classes.

Image ``i`` of a split depends on (seed, split, i) alone, not on the number of images or of worker processes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from training.engine.errors import UserError, as_user_error, run_program
from training.engine.flags import PATH, Parser
from training.scenes.compose import Category, SceneOptions, categories, describe, draw_pairs, draw_scene

DESCRIPTION = "generated scenes"
SPLITS = ("train2017", "val2017", "pairs")
MARK = "scenes.json"  # in every folder that the generator made


def _rng(seed: int, split: str, index: int) -> Generator:
    return np.random.default_rng([seed, SPLITS.index(split), index])


def _save(array: np.ndarray, path: Path) -> None:
    Image.fromarray(array).save(path, **({"quality": 92} if path.suffix == ".jpg" else {"compress_level": 1}))


def _write_scene(index: int, *, out: Path, split: str, seed: int, options: SceneOptions, suffix: str) -> dict:
    """Draw and write image ``index`` of a split; returns its records for the annotation files."""
    rng = _rng(seed, split, index)
    scene = draw_scene(rng, options)
    h, w = scene.image.shape[:2]
    stem = f"{index + 1:012d}"
    _save(scene.image, out / split / f"{stem}{suffix}")
    ids = np.zeros((h, w), np.int64)
    records = []
    for k, s in enumerate(scene.segments):
        segment_id = int(rng.integers(1, 2**15)) * 256 + k + 1  # unique within the image; uses several colour channels
        ids[s.mask] = segment_id
        rle = coco_mask.encode(np.asfortranarray(s.mask))
        x, y, bw, bh = (int(v) for v in coco_mask.toBbox(rle))
        rle = {"size": [h, w], "counts": rle["counts"].decode("ascii")}
        records.append(
            {"id": segment_id, "category_id": s.category.id, "iscrowd": 0, "bbox": [x, y, bw, bh],
             "area": int(s.mask.sum()), "segmentation": rle, "is_thing": s.category.is_thing}
        )  # fmt: skip
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    _save(rgb, out / "annotations" / f"panoptic_{split}" / f"{stem}.png")
    seen = [(s.category, int(s.mask.sum()), s.full_area) for s in scene.segments]
    image = {"id": index + 1, "file_name": f"{stem}{suffix}", "height": h, "width": w}
    return {"image": image, "segments": records, "caption": describe(rng, seen, h * w), "png": f"{stem}.png"}


def _write_pairs(index: int, *, out: Path, seed: int, options: SceneOptions, suffix: str) -> list[dict]:
    """Write the pictures of pair scene ``index``; at most 16 a scene, so that ids are (index, number) alone."""
    rng = _rng(seed, "pairs", index)
    records = []
    for k, (image, caption) in enumerate(draw_pairs(rng, options, categories(options))):
        name = f"{index * 16 + k + 1:09d}{suffix}"
        _save(image, out / "pairs" / name)
        size = {"height": image.shape[0], "width": image.shape[1]}
        records.append({"image": {"id": index * 16 + k + 1, "file_name": name, **size}, "caption": caption})
    return records


def _run(function, count: int, workers: int, label: str) -> list:
    """``[function(0), ..., function(count - 1)]`` over worker processes, with a progress bar."""
    bar = partial(
        tqdm, total=count, desc=label, unit="img", disable=not sys.stderr.isatty() and count < 200, mininterval=1
    )
    if workers <= 1:
        return list(bar(map(function, range(count))))
    with ProcessPoolExecutor(workers) as pool:
        return list(bar(pool.map(function, range(count), chunksize=max(1, min(64, count // (4 * workers))))))


def _dump(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, separators=(",", ":")))


def _write_annotations(out: Path, split: str, results: list[dict], classes: list[Category], info: dict) -> None:
    """The three annotation files of a split, from the records of its images."""
    images = [r["image"] for r in results]
    listed = [
        {"id": c.id, "name": c.name, "isthing": int(c.is_thing), "supercategory": c.shape or "stuff"} for c in classes
    ]
    instances, panoptic, captions = [], [], []
    for r in results:
        for s in r["segments"]:
            if s["is_thing"]:
                keys = ("category_id", "iscrowd", "bbox", "area", "segmentation")
                instances.append({"id": len(instances) + 1, "image_id": r["image"]["id"], **{k: s[k] for k in keys}})
        keys = ("id", "category_id", "iscrowd", "bbox", "area")
        segments = [{k: s[k] for k in keys} for s in r["segments"]]
        panoptic.append({"image_id": r["image"]["id"], "file_name": r["png"], "segments_info": segments})
        captions.append({"id": len(captions) + 1, "image_id": r["image"]["id"], "caption": r["caption"]})
    folder = out / "annotations"
    things = [c for c in listed if c["isthing"]]
    base = {"info": info, "images": images}
    _dump(folder / f"instances_{split}.json", {**base, "annotations": instances, "categories": things})
    _dump(folder / f"panoptic_{split}.json", {**base, "annotations": panoptic, "categories": listed})
    _dump(folder / f"captions_{split}.json", {**base, "annotations": captions})


def check_folder(out: Path) -> None:
    """UserError for a folder that holds something which this generator did not make.

    Its own are known by :data:`MARK`; older ones by what their annotation files say of themselves.
    """
    if not out.exists() or out.is_dir() and (out / MARK).is_file():
        return
    if not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder")
    found = sorted(f.name for f in out.iterdir() if not f.name.startswith("."))
    try:
        info = json.loads((out / "annotations" / "instances_train2017.json").read_text(encoding="utf-8")).get("info")
    except (OSError, ValueError, AttributeError):
        info = None
    ours = isinstance(info, dict) and info.get("description") == DESCRIPTION
    if found and not ours:
        raise UserError(
            f"--out {out} holds {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}, which the generator did not "
            "make: give a new or empty folder, so that nothing is overwritten"
        )


def write_dataset(
    out: str | Path,
    *,
    train: int,
    val: int,
    pairs: int = 0,
    seed: int = 0,
    options: SceneOptions | None = None,
    novel: int = 0,
    workers: int = 1,
    suffix: str = ".jpg",
) -> list[Category]:
    """Write a dataset and return its classes.

    Args:
        train, val: numbers of scenes.
        pairs: number of further scenes that the pictures of ``pairs/`` are cut from (about 6 pictures each).
        novel: number of thing classes that ``split.json`` lists as novel, spread over the list.
        suffix: ``".jpg"`` or ``".png"`` (lossless) for the images.

    Raises:
        UserError: the folder holds something that the generator did not make.
        ValueError: nothing to draw, or impossible options.
    """
    out, options = Path(out), options or SceneOptions()
    if min(train, val, pairs) < 0 or not train + val + pairs:
        raise ValueError(f"{train} training, {val} validation and {pairs} pair scenes: nothing to draw")
    classes = categories(options)
    things = [c.name for c in classes if c.is_thing]
    info = {"description": DESCRIPTION, "seed": seed, "options": asdict(options)}
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    # Before the first image: a folder that is left half-made may be written again.
    _dump(out / MARK, {**info, "train": train, "val": val, "pairs": pairs, "novel": novel, "format": suffix})
    for split, count in (("train2017", train), ("val2017", val)):
        (out / split).mkdir(parents=True, exist_ok=True)
        (out / "annotations" / f"panoptic_{split}").mkdir(parents=True, exist_ok=True)
        write = partial(_write_scene, out=out, split=split, seed=seed, options=options, suffix=suffix)
        _write_annotations(out, split, _run(write, count, workers, split), classes, info)
    if pairs:
        (out / "pairs").mkdir(exist_ok=True)
        write = partial(_write_pairs, out=out, seed=seed, options=options, suffix=suffix)
        records = [r for scene in _run(write, pairs, workers, "pairs") for r in scene]
        captions = [{"id": r["image"]["id"], "image_id": r["image"]["id"], "caption": r["caption"]} for r in records]
        data = {"info": info, "images": [r["image"] for r in records], "annotations": captions}
        _dump(out / "annotations" / "captions_pairs.json", data)
    held_out = things[:: max(1, len(things) // novel)][:novel] if novel else []
    split_names = {"base": [n for n in things if n not in held_out], "novel": held_out}
    _dump(out / "annotations" / "split.json", split_names)
    return classes


def main(argv: Sequence[str] | None = None) -> int:
    """The program; see :func:`~training.engine.errors.run_program` for its exit status."""
    return run_program(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> None:
    parser = Parser(
        prog="python -m training.scenes",
        description="Generate a panoptic dataset of drawn scenes in COCO's layout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    d = SceneOptions()
    parser.add_argument("--out", type=PATH, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=2000, help="scenes in train2017")
    parser.add_argument("--val", type=int, default=200, help="scenes in val2017")
    parser.add_argument("--pairs", type=int, default=0, help="scenes that pairs/ is cut from, about 6 pictures each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes; the result does not depend on it")
    parser.add_argument("--format", choices=("jpg", "png"), default="jpg")
    parser.add_argument("--novel", type=int, default=0, help="thing classes that split.json lists as novel")
    parser.add_argument("--size", type=int, default=d.size, help="longer side in pixels")
    parser.add_argument("--pair-size", type=int, default=d.pair_size, help="side of the pictures of pairs/")
    parser.add_argument("--things", type=int, default=d.things, help="thing classes")
    parser.add_argument("--stuff", type=int, default=d.stuff, help="stuff classes")
    parser.add_argument(
        "--colors", type=int, default=d.colors, help="colours among the things; 0: about the square root"
    )
    parser.add_argument("--pattern-names", action="store_true", help="the pattern is part of the class")
    parser.add_argument(
        "--exchange-colors",
        action="store_true",
        help="all segments of a scene wear the same two colours; classes are patterns and shapes",
    )
    parser.add_argument("--min-object", type=float, default=d.min_object, help="share of the longer side")
    parser.add_argument("--max-object", type=float, default=d.max_object)
    parser.add_argument("--max-objects", type=int, default=d.max_objects, help="objects per scene")
    parser.add_argument("--min-aspect", type=float, default=d.min_aspect, help="smallest ratio of the sides")
    parser.add_argument("--max-aspect", type=float, default=d.max_aspect, help="largest ratio of the sides")
    args = vars(parser.parse_args(argv))
    with as_user_error():
        options = SceneOptions(**{k: args[k] for k in asdict(d)})
        classes = write_dataset(
            args["out"], train=args["train"], val=args["val"], pairs=args["pairs"], seed=args["seed"], options=options,
            novel=args["novel"], workers=args["workers"], suffix="." + args["format"],
        )  # fmt: skip
    print(
        f"{args['out']}: {args['train']} training, {args['val']} validation and {args['pairs']} pair scenes of "
        f"{sum(c.is_thing for c in classes)} thing and {sum(not c.is_thing for c in classes)} stuff classes"
    )
