"""Generated scenes: a small panoptic dataset for the quick start, the tests and the benchmarks.

    python -m training.data.scenes --out data/scenes --train 2000 --val 200 --size 128 --seed 0

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
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from training.data.scenes_draw import COLORS, PATTERNS, SHAPES, TEXTURES, camera, noise, paint_object

SPLITS = ("train2017", "val2017", "pairs")
PHRASES = (
    *("a photo of {}.",) * 14, "a picture of {}.", "there is {} in the scene.", "this is a photo of {}.", "itap of {}.",
    "{}.", "a bad photo of {}.", "this is {}.", "a close-up photo of {}.", "a cropped photo of {}.", "{} in the scene.",
)  # fmt: skip


@dataclass(frozen=True)
class Category:
    """One class. ``color`` and ``shape`` are empty for stuff; an empty ``pattern`` means any."""

    id: int
    name: str
    is_thing: bool
    color: str = ""
    shape: str = ""
    pattern: str = ""


@dataclass(frozen=True)
class SceneOptions:
    """What a scene may hold. Sizes of objects are shares of the image's longer side.

    Attributes:
        size: longer side in pixels.
        things, stuff: numbers of classes (at most 80 and 8).
        colors: number of colours that the thing classes use (0: about the square root of ``things``).
        pattern_names: the pattern is part of the class ("red striped circle"); otherwise each object's is random.
        min_object, max_object: side of an object's square.
        max_objects: objects per scene, 1 to this many.
        min_aspect: the shorter side is a random share of the longer one, from this to 1.
        pair_size: side of the pictures in ``pairs/``, in pixels.
    """

    size: int = 128
    things: int = 20
    stuff: int = 8
    colors: int = 0
    pattern_names: bool = False
    min_object: float = 0.22
    max_object: float = 0.42
    max_objects: int = 5
    min_aspect: float = 1.0
    pair_size: int = 64


@dataclass
class Segment:
    """One thing or one stuff region of a scene; ``mask`` bool ``[H, W]`` is what shows, ``full_area`` the whole."""

    category: Category
    mask: NDArray[np.bool_]
    full_area: int


@dataclass
class Scene:
    """``image`` uint8 ``[H, W, 3]`` and its segments, which cover every pixel once."""

    image: NDArray[np.uint8]
    segments: list[Segment] = field(default_factory=list)


def categories(options: SceneOptions) -> list[Category]:
    """Thing classes, then stuff classes, with ids from 1.

    The things walk along the diagonals of the colour-by-shape table, so that any first few use many of both. With
    ``pattern_names`` each pair of colour and shape also has a pattern of its own, which all its objects wear.

    Raises:
        ValueError: more classes are asked for than there are.
    """
    limit = len(COLORS) * len(SHAPES)
    if not 1 <= options.things <= limit:
        raise ValueError(f"{options.things} thing classes: there are 1 to {limit}")
    if not 1 <= options.stuff <= len(TEXTURES):
        raise ValueError(f"{options.stuff} stuff classes: there are 1 to {len(TEXTURES)}")
    n_colors = options.colors or min(len(COLORS), math.ceil(math.sqrt(options.things)))
    n_colors = max(n_colors, math.ceil(options.things / len(SHAPES)))
    rows = math.ceil(options.things / n_colors)
    if n_colors > len(COLORS):
        raise ValueError(f"{n_colors} colours: there are {len(COLORS)}")
    # With patterns in the names, 4 or 8 shapes: then colour, pattern and shape each tell something about a class.
    n_shapes = len(SHAPES) if options.pattern_names and rows > 2 else rows
    colors, shapes = list(COLORS)[:n_colors], list(SHAPES)[:n_shapes]
    out: list[Category] = []
    for number in range(options.things):
        row, color = divmod(number, n_colors)
        shape = shapes[(color + row) % n_shapes]
        pattern = PATTERNS[row % len(PATTERNS)] if options.pattern_names else ""
        name = " ".join([colors[color], *([pattern] if pattern else []), shape])
        out.append(Category(len(out) + 1, name, True, colors[color], shape, pattern))
    for name in list(TEXTURES)[: options.stuff]:
        out.append(Category(len(out) + 1, name, False))
    return out


def _background(
    rng: Generator, h: int, w: int, unit: float, stuff: Sequence[Category]
) -> tuple[np.ndarray, list[Segment]]:
    """One to three textures with irregular borders, one above the other, beside it, or anywhere."""
    count = int(rng.choice([1, 2, 3], p=[0.3, 0.5, 0.2]))
    chosen = [stuff[i] for i in rng.permutation(len(stuff))[:count]]
    ramp_y, ramp_x = np.linspace(-1, 1, h)[:, None], np.linspace(-1, 1, w)[None]
    fields = []
    for _ in chosen:
        slope = rng.normal(0, 1.6, 2)
        fields.append(slope[0] * ramp_y + slope[1] * ramp_x + noise(rng, h, w, h / 2.5, w / 2.5, 3))
    owner = np.argmax(np.stack(fields), axis=0)
    image = np.zeros((h, w, 3), np.float32)
    segments = []
    for i, category in enumerate(chosen):
        mask = owner == i
        if mask.any():
            image[mask] = TEXTURES[category.name](rng, h, w, unit * rng.uniform(0.75, 1.3))[mask]
            segments.append(Segment(category, mask, int(mask.sum())))
    return image, segments


def draw_scene(rng: Generator, options: SceneOptions, classes: Sequence[Category] | None = None) -> Scene:
    """Draw one scene. An object hides at most 30 % of another, and at most 35 % of it lies outside the image."""
    classes = categories(options) if classes is None else classes
    things = [c for c in classes if c.is_thing]
    size = options.size
    short = max(1, round(size * rng.uniform(options.min_aspect, 1)))
    h, w = (size, short) if rng.random() < 0.5 else (short, size)
    image, segments = _background(rng, h, w, size / 128, [c for c in classes if not c.is_thing])
    backdrop = len(segments)
    for _ in range(int(rng.integers(1, options.max_objects + 1))):
        category = things[int(rng.integers(len(things)))]
        for _ in range(8):
            half = 0.5 * size * math.exp(rng.uniform(math.log(options.min_object), math.log(options.max_object)))
            place = dict(
                color=category.color,
                shape=category.shape,
                center=(rng.uniform(0.4 * half, w - 0.4 * half), rng.uniform(0.4 * half, h - 0.4 * half)),
                half_side=half,
                angle=rng.uniform(-0.45, 0.45),
                pattern=category.pattern or PATTERNS[int(rng.integers(len(PATTERNS)))],
            )
            found = paint_object(rng, image, mask_only=True, **place)
            # The whole object, to know how much of it lies outside the image.
            big = np.broadcast_to(np.float32(0), (int(4 * half) + 4, int(4 * half) + 4, 3))
            whole = paint_object(rng, big, mask_only=True, **{**place, "center": (big.shape[1] / 2, big.shape[0] / 2)})
            if found is None or whole is None:
                continue
            window, mask = found
            area, full = int(mask.sum()), int(whole[1].sum())
            hidden = [int((s.mask[window] & mask).sum()) for s in segments[backdrop:]]
            if area < 0.65 * full or any(
                over > 0.3 * s.full_area or over > 0.5 * s.mask.sum()
                for over, s in zip(hidden, segments[backdrop:], strict=True)
            ):
                continue
            paint_object(rng, image, **place)
            for s in segments:
                s.mask[window] &= ~mask
            placed = np.zeros((h, w), bool)
            placed[window] = mask
            segments.append(Segment(category, placed, full))
            break
    return Scene(camera(rng, image), [s for s in segments if s.mask.any()])


def describe(rng: Generator, segments: Sequence[tuple[Category, int, int]], pixels: int) -> str:
    """A caption of what is to be seen: up to three things, largest first, and the largest stuff.

    ``segments`` are (category, visible pixels, pixels of the whole segment). A thing is mentioned when a good part
    of it is to be seen; otherwise the caption would teach to recognise what is not there.
    """
    ranked = sorted(segments, key=lambda s: -s[1])
    things = [c for c, seen, full in ranked if c.is_thing and seen >= 0.45 * full and seen > 0.03 * pixels][:3]
    stuff = [c for c, seen, _ in ranked if not c.is_thing and seen > 0.06 * pixels]
    names = []
    for c in things:
        names.append(f"{'an' if c.name[0] in 'aeiou' else 'a'} {c.name}")
    if things:
        text = " and ".join(names)
        if stuff and rng.random() < 0.5:
            text += f" on {stuff[0].name}"
    elif stuff:
        text = " and ".join(c.name for c in stuff[:2])
    else:
        text = "something"
    return PHRASES[int(rng.integers(len(PHRASES)))].format(text)


def _cut(scene: Scene, box: tuple[int, int, int, int], size: int) -> NDArray[np.uint8]:
    """The window ``box`` (xyxy, pixels), longest side brought to ``size``, centred on black."""
    x0, y0, x1, y1 = box
    scale = size / max(x1 - x0, y1 - y0)
    w, h = max(1, round((x1 - x0) * scale)), max(1, round((y1 - y0) * scale))
    small = Image.fromarray(scene.image[y0:y1, x0:x1]).resize((w, h), Image.Resampling.BICUBIC)
    out = np.zeros((size, size, 3), np.uint8)
    out[(size - h) // 2 : (size - h) // 2 + h, (size - w) // 2 : (size - w) // 2 + w] = small
    return out


def draw_pairs(rng: Generator, options: SceneOptions, classes: Sequence[Category]) -> Iterator[tuple[np.ndarray, str]]:
    """Pictures uint8 ``[pair_size, pair_size, 3]`` with captions, cut from one scene.

    Every object in two loose, jittered windows; a cell of a random grid, as CLIPSelf cuts its patches; and now and
    then the whole scene. So the crops that the trained model is later shown look like its training pictures.
    """
    scene = draw_scene(rng, options, classes)
    h, w = scene.image.shape[:2]
    boxes: list[tuple[float, float, float, float]] = []
    for s in [s for s in scene.segments if s.category.is_thing] * 2:
        ys, xs = np.nonzero(s.mask)
        side_x, side_y = xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()
        grow = rng.uniform(0.9, 1.7)
        cx = (xs.max() + 1 + xs.min()) / 2 + rng.normal(0, 0.1) * side_x
        cy = (ys.max() + 1 + ys.min()) / 2 + rng.normal(0, 0.1) * side_y
        half_x, half_y = side_x * grow / 2, side_y * grow / 2
        boxes.append((cx - half_x, cy - half_y, cx + half_x, cy + half_y))
    rows = int(rng.integers(1, 6))
    columns = int(rng.integers(math.ceil(rows / 2), min(2 * rows, 6) + 1))
    r, c = int(rng.integers(rows)), int(rng.integers(columns))
    boxes.append((c * w / columns, r * h / rows, (c + 1) * w / columns, (r + 1) * h / rows))
    if rng.random() < 0.2:
        boxes.append((0, 0, w, h))
    for x0, y0, x1, y1 in boxes:
        box = (max(0, round(x0)), max(0, round(y0)), min(w, round(x1)), min(h, round(y1)))
        if box[2] - box[0] < 4 or box[3] - box[1] < 4:
            continue
        seen = [(s.category, int(s.mask[box[1] : box[3], box[0] : box[2]].sum()), s.full_area) for s in scene.segments]
        pixels = (box[2] - box[0]) * (box[3] - box[1])
        yield _cut(scene, box, options.pair_size), describe(rng, [s for s in seen if s[1]], pixels)


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
    """
    out, options = Path(out), options or SceneOptions()
    classes = categories(options)
    things = [c.name for c in classes if c.is_thing]
    info = {"description": "generated scenes", "seed": seed, "options": asdict(options)}
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.data.scenes",
        description="Generate a panoptic dataset of drawn scenes in COCO's layout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    d = SceneOptions()
    parser.add_argument("--out", required=True, help="folder to write")
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
    parser.add_argument("--min-object", type=float, default=d.min_object, help="share of the longer side")
    parser.add_argument("--max-object", type=float, default=d.max_object)
    parser.add_argument("--max-objects", type=int, default=d.max_objects, help="objects per scene")
    parser.add_argument("--min-aspect", type=float, default=d.min_aspect, help="smallest ratio of the sides")
    args = vars(parser.parse_args(argv))
    options = SceneOptions(**{k: args[k] for k in asdict(d)})
    try:
        write_dataset(
            args["out"], train=args["train"], val=args["val"], pairs=args["pairs"], seed=args["seed"], options=options,
            novel=args["novel"], workers=args["workers"], suffix="." + args["format"],
        )  # fmt: skip
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
