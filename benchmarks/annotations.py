"""Annotation files at the scale of COCO and LVIS: time to open, memory of a worker, and speed over dataset size.

    python benchmarks/annotations.py

Files of that scale are generated in a temporary folder. The conventional path reads the json into dictionaries and
indexes them by image, in every process that asks for samples.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "src")]
from common import Clock, make_dataset, print_table, run_self  # noqa: E402

PER_IMAGE = 7.3  # annotations an image, COCO's average
POINTS = 24  # of a polygon; with it an annotation has the length that COCO's have
CATEGORIES = {"coco": 80, "lvis": 1203}


def write_annotations(path: Path, images: int, annotations: int, kind: str, files: list[str], seed: int = 0) -> None:
    """A COCO- or LVIS-like instance file whose images are the given files, again and again.

    LVIS entries name their image by ``coco_url`` only.
    """
    rng = np.random.default_rng(seed)
    owners = np.sort(rng.integers(0, images, annotations))
    sides = np.exp(rng.uniform(np.log(12), np.log(320), (annotations, 2)))
    corners = rng.uniform(0, 1, (annotations, 2)) * ((640, 480) - sides.clip(max=470))
    categories = rng.integers(1, CATEGORIES[kind] + 1, annotations)
    polygons = [json.dumps([np.round(rng.uniform(0, 480, 2 * POINTS), 2).tolist()]) for _ in range(256)]
    with path.open("w") as out:
        out.write('{"images": [')
        for i in range(images):
            file = files[i % len(files)]
            name = f'"file_name": "{file}"' if kind == "coco" else f'"coco_url": "http://host/{file}"'
            out.write(f'{", " if i else ""}{{"id": {i + 1}, {name}, "width": 640, "height": 480, "license": 1}}')
        out.write('], "annotations": [')
        rows = zip(owners.tolist(), sides.tolist(), corners.tolist(), categories.tolist(), strict=True)
        for i, (owner, (w, h), (x, y), category) in enumerate(rows):
            out.write(
                f'{", " if i else ""}{{"id": {i + 1}, "image_id": {owner + 1}, "category_id": {category}, '
                f'"iscrowd": 0, "bbox": [{x:.2f}, {y:.2f}, {w:.2f}, {min(h, 470):.2f}], "area": {w * h / 2:.2f}, '
                f'"segmentation": {polygons[i % len(polygons)]}}}'
            )
        names = [{"id": i + 1, "name": f"class {i + 1}"} for i in range(CATEGORIES[kind])]
        out.write(f'], "categories": {json.dumps(names)}}}')


def proportional_memory_mb(pid: int) -> float:
    """Memory of a process in MB, pages that it shares divided by the number of processes that share them (Linux)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1e3
    raise RuntimeError(f"/proc/{pid}/smaps_rollup has no Pss")


# -- the parts that run in a process of their own ---------------------------------------------------------------------


def open_ours(path: str, cache: str) -> dict:
    """Seconds to open a file with a cache folder, and the peak memory of the process in GB."""
    from training.engine.data.annotations import load_annotations
    from training.engine.memory import peak_memory

    before, clock = peak_memory() / 1e9, Clock()
    annotations = load_annotations(path, cache_dir=cache)
    seconds = clock()
    return {"seconds": seconds, "images": len(annotations), "annotations": len(annotations.boxes),
            "peak_gb": peak_memory() / 1e9 - before}  # fmt: skip


def open_conventional(path: str) -> dict:
    """Seconds to read the json into dictionaries indexed by image, and the memory that they take, in GB."""
    from training.engine.memory import peak_memory

    before, clock = peak_memory() / 1e9, Clock()
    content = json.loads(Path(path).read_text())
    by_image: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    return {"seconds": clock(), "images": len(by_image), "peak_gb": peak_memory() / 1e9 - before}


def deliver(path: str, images: str, cache: str, workers: int, seconds: float) -> dict:
    """Images/s of the loader of proposals (crops left to the device: the loader does little else than look up
    annotations and decode) and the largest memory of a worker."""
    from training.data import build_train_data
    from training.params import parse_args

    flags = [
        "--dataset-type", "proposals_distill", "--train-data", path, "--train-image-root", images, "--crop-on",
        "device", "--annotation-cache", cache, "--workers", str(workers),
    ]  # fmt: skip
    options = parse_args(flags, check=False)
    data = build_train_data(options.data, options.regions, image_size=1024, crop_size=224)
    rates: list[float] = []
    batches = epochs(data)
    for _ in islice(batches, 8 * workers):  # workers start and fill their queues
        pass
    for _ in range(3):
        clock, images = Clock(), 0
        while clock() < seconds / 3:
            images += next(batches)["samples"]
        rates.append(images / clock())
    memory = max((proportional_memory_mb(process.pid) for process in multiprocessing.active_children()), default=0.0)
    return {"images_per_s": sorted(rates)[1], "worker_mb": memory}


def epochs(data: Any) -> Iterator[dict]:
    """Batches of one epoch after the other."""
    for epoch in count():
        data.set_epoch(epoch)
        yield from data


# -- the program ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=int, default=118_000, help="images of the large files (118000, COCO's train2017)")
    add("--annotations", type=int, default=860_000, help="annotations of the large files (860000)")
    add("--kinds", nargs="+", choices=CATEGORIES, default=list(CATEGORIES), help="kinds of file (coco lvis)")
    add("--sizes", nargs="+", type=int, default=[1_000, 10_000, 100_000], metavar="N",
        help="annotations of the files for the speed over dataset size (1000 10000 100000)")  # fmt: skip
    add("--workers", type=int, default=2, help="loader processes (2)")
    add("--seconds", type=float, default=12, help="measured time of each loader (12)")
    add("--no-baseline", action="store_true", help="leave the dictionaries out")
    add("--part", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        name, *values = args.part
        parts = {"ours": open_ours, "conventional": open_conventional, "deliver": deliver}
        print(json.dumps(parts[name](*values[:3], *(float(v) if "." in v else int(v) for v in values[3:]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        run(args, Path(folder))


def part(*values: object) -> dict:
    """A part of the program in a process of its own."""
    return run_self(__file__, ["--part", *map(str, values)])


def run(args: argparse.Namespace, folder: Path) -> None:
    """Generate, measure and print."""
    images = make_dataset(folder / "pictures", 32)["images"]
    files = [f"{Path(images).name}/{name}" for name in sorted(os.listdir(images))]
    root = str(Path(images).parent)
    caches = str(folder / "caches")
    result: dict[str, dict] = {}
    opening = []

    small = folder / "small.json"
    write_annotations(small, 1000, 7300, "coco", files)
    seconds = f"{args.seconds:.1f}"
    reference = part("deliver", small, root, caches, args.workers, seconds)
    for kind in args.kinds:
        path = folder / f"{kind}.json"
        write_annotations(path, args.images, args.annotations, kind, files)
        first, cached = part("ours", path, caches), part("ours", path, caches)
        loader = part("deliver", path, root, caches, args.workers, seconds)
        result[kind] = {
            "images": first["images"], "annotations": first["annotations"], "file_mb": path.stat().st_size / 1e6,
            "first_open_s": first["seconds"], "cached_open_s": cached["seconds"],
            "cached_open_mb": 1e3 * cached["peak_gb"], "worker_mb": loader["worker_mb"],
            "worker_extra_mb": loader["worker_mb"] - reference["worker_mb"], "images_per_s": loader["images_per_s"],
        }  # fmt: skip
        now = result[kind]
        opening.append([f"{kind}, {now['file_mb']:.0f} MB", first["seconds"], cached["seconds"],
                        now["cached_open_mb"], now["worker_extra_mb"]])  # fmt: skip
        if not args.no_baseline:
            plain = part("conventional", path)
            now |= {"conventional_open_s": plain["seconds"], "conventional_mb": 1e3 * plain["peak_gb"]}
            opening.append([f"{kind}, conventional", plain["seconds"], plain["seconds"], now["conventional_mb"], "-"])
        path.unlink()
    print_table(
        f"Opening {args.images:,} images with {args.annotations:,} annotations; memory beyond a 1,000-image file",
        ["file", "first open, s", "later, s", "opening takes, MB", "more per worker, MB"],
        opening,
    )

    curve = []
    for size in args.sizes:
        path = folder / f"size_{size}.json"
        write_annotations(path, max(round(size / PER_IMAGE), 100), size, "coco", files)
        curve.append((size, part("deliver", path, root, caches, args.workers, seconds)["images_per_s"]))
        path.unlink()
    print_table(f"Loader of proposals, {args.workers} workers, crops on the device", ["annotations", "images/s"], curve)
    rates = [rate for _, rate in curve]
    result["curve"] = {"images_per_s": dict(curve), "slowest_over_fastest": min(rates) / max(rates)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
