"""What the benchmarks share: generated photographs and annotations, clocks, tables and the closing JSON line."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def photograph(rng: np.random.Generator, width: int = 640, height: int = 480) -> np.ndarray:
    """A picture with the statistics of a photograph, which is what makes a JPEG slow or fast to decode.

    Noise of several octaves (amplitude falling as 1/frequency), uint8 ``[height, width, 3]``.
    """
    image = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 9):
        side = 2**octave
        layer = rng.normal(size=(max(side * height // width, 1), side, 3)).astype(np.float32)
        planes = [
            np.asarray(Image.fromarray(p).resize((width, height), Image.BICUBIC)) for p in layer.transpose(2, 0, 1)
        ]
        image += np.stack(planes, -1) / octave
    image = (image - image.min()) / (image.max() - image.min())
    return (image * 255).astype(np.uint8)


def make_dataset(root: Path, count: int, *, segments: int = 11, seed: int = 0) -> dict[str, str]:
    """``count`` 640x480 JPEGs with COCO panoptic annotations, as many segments each as COCO has on average.

    Returns:
        ``images``, ``segments`` (folders) and ``annotations`` (the json).
    """
    paths = {name: root / name for name in ("images", "segments")}
    for folder in paths.values():
        folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    categories = [{"id": i + 1, "name": f"class {i + 1}", "isthing": int(i < 80)} for i in range(133)]
    images, panoptic = [], []
    for i in range(count):
        name = f"{i:012d}.jpg"
        Image.fromarray(photograph(rng)).save(paths["images"] / name, quality=90)
        images.append({"id": i + 1, "file_name": name, "width": 640, "height": 480})
        panoptic.append(_segments(paths["segments"], rng, i, name, segments))
    content = {"images": images, "annotations": panoptic, "categories": categories}
    (root / "panoptic.json").write_text(json.dumps(content))
    return {**{name: str(folder) for name, folder in paths.items()}, "annotations": str(root / "panoptic.json")}


def dataset_of(args: argparse.Namespace, folder: Path, *, count: int, entries: int) -> dict[str, str]:
    """Images and a panoptic annotation file to run on: those of ``--images`` and ``--annotations``, or generated ones.

    The annotation file lists its images again and again, under new ids, until there are ``entries`` of them: a few
    files stand for a large dataset, and no epoch ends while a loader is timed.

    Returns:
        ``{"images", "annotations", "segments", "what"}``: two folders, a file, and a word for the table.
    """
    if args.images:
        if not args.annotations:
            raise SystemExit("error: --images needs --annotations, a COCO panoptic json of these images")
        segments = args.segments or args.annotations.removesuffix(".json")
        source = {"images": args.images, "segments": segments, "what": "images of --images"}
        content = json.loads(Path(args.annotations).read_text())
    else:
        made = make_dataset(folder / "generated", count)
        source = {"images": made["images"], "segments": made["segments"], "what": "generated images, 640x480"}
        content = json.loads(Path(made["annotations"]).read_text())
    names = {image["id"]: image for image in content["images"]}
    annotations = [a for a in content["annotations"] if a["image_id"] in names][:count]
    times = -(-entries // len(annotations))
    numbered = [
        (number + 1, annotation) for number, annotation in enumerate(a for _ in range(times) for a in annotations)
    ]
    out = folder / f"panoptic_{entries}.json"
    out.write_text(
        json.dumps(
            {
                "images": [{**names[a["image_id"]], "id": number} for number, a in numbered],
                "annotations": [{**a, "image_id": number} for number, a in numbered],
                "categories": content["categories"],
            }
        )
    )
    return {**source, "annotations": str(out)}


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """``--images``, ``--annotations`` and ``--segments``: what to run on instead of generated images."""
    add = parser.add_argument
    add("--images", default="", metavar="DIR", help="folder of photographs to run on instead of generated images")
    add("--annotations", default="", metavar="JSON", help="their COCO panoptic annotations (only names for training)")
    add("--segments", default="", metavar="DIR", help="their panoptic PNGs; by default the json's path without .json")


def random_boxes(rng: np.random.Generator, count: int) -> Iterable[tuple[float, float, float, float]]:
    """``count`` boxes (x, y, w, h) in a 640x480 image, log-uniform sides from 12 to 320 pixels."""
    for _ in range(count):
        w, h = np.exp(rng.uniform(np.log(12), np.log(320), 2))
        yield float(rng.uniform(0, 640 - w)), float(rng.uniform(0, 480 - h)), float(w), float(h)


def _segments(folder: Path, rng: np.random.Generator, index: int, name: str, count: int) -> dict:
    ids = np.full((480, 640), 1, np.int32)
    for segment, (x, y, w, h) in enumerate(random_boxes(rng, count - 1), start=2):
        ids[int(y) : int(y + h), int(x) : int(x + w)] = segment
    info = []
    for segment in np.unique(ids).tolist():
        rows, columns = np.nonzero(ids == segment)
        box = [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
        category = int(rng.integers(81, 134)) if segment == 1 else int(rng.integers(1, 81))
        info.append({"id": segment, "category_id": category, "iscrowd": 0, "bbox": box, "area": len(rows)})
    png = name.replace(".jpg", ".png")
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(folder / png)
    return {"image_id": index + 1, "file_name": png, "segments_info": info}


# -- measuring --------------------------------------------------------------------------------------------------------


def run_self(script: str, arguments: Sequence[str]) -> dict:
    """Run a benchmark's own script in a fresh process (so that peaks and caches are its own) and read its JSON line.

    Raises:
        RuntimeError: the process failed; with the end of what it wrote.
    """
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    out = subprocess.run([sys.executable, script, *arguments], env=env, capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{out.stderr[-2000:]}")
    return json.loads(out.stdout.strip().splitlines()[-1])


class Clock:
    """Wall seconds since construction, read by calling it."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self.start


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table in aligned columns; floats with three significant digits."""
    text = [[f"{c:.3g}" if isinstance(c, float) else str(c) for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in text) for i in range(len(header))]
    print(f"\n{title}")
    for i, row in enumerate(text):
        print("  ".join(c.ljust(w) if j == 0 else c.rjust(w) for j, (c, w) in enumerate(zip(row, widths, strict=True))))
        if i == 0:
            print("  ".join("-" * w for w in widths))
