"""Images a second that reach the training process, against the conventional path, in one run.

    python benchmarks/data.py --workers 2

Two loaders for training on grid patches (crops made in the worker, or left to the device), one for the panoptic
evaluation, and next to each the conventional loader of the same batches. The figure that counts is the ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "src")]
from common import Clock, add_data_flags, dataset_of, print_table  # noqa: E402
from conventional import GridPatches, Panoptic  # noqa: E402

from open_clip.image_tower import OPENAI_MEAN, OPENAI_STD  # noqa: E402
from training.data import View, build_train_data, prepare_batch  # noqa: E402
from training.evaluation.panoptic import build_eval_data  # noqa: E402
from training.params import parse_args  # noqa: E402


def bytes_of(value: object) -> int:
    """Bytes of all tensors in a batch."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(bytes_of, value.values()))
    return sum(map(bytes_of, value)) if isinstance(value, (list, tuple)) else 0


def images_of(batch: dict | tuple) -> int:
    """Images in a batch of either path."""
    return len(batch["images" if "boxes" not in batch else "counts"]) if isinstance(batch, dict) else len(batch[0])


def measure(loader: Iterable, seconds: float, warm_up: int) -> tuple[float, float]:
    """(images/s delivered, bytes per image) of a loader, after ``warm_up`` batches (workers have started by then)."""
    images = size = 0
    batches = iter(loader)
    for _ in islice(batches, warm_up):
        pass
    clock = Clock()
    for batch in batches:
        images += images_of(batch)
        size += bytes_of(batch)
        elapsed = clock()
        if elapsed > seconds:
            break
    else:
        raise SystemExit("error: the dataset ended before the time was over: lower --seconds")
    return images / elapsed, size / images


def loaders(args: argparse.Namespace, data: dict[str, str]) -> dict[str, Callable[[], Iterable]]:
    """A maker of each loader, by name."""
    flags = [
        "--train-data", data["annotations"], "--train-image-root", data["images"], "--val-data", data["annotations"],
        "--val-image-root", data["images"], "--val-segm-root", data["segments"], "--det-image-size", str(args.size),
        "--batch-size", str(args.batch_size), "--workers", str(args.workers),
    ]  # fmt: skip
    options = parse_args(flags, check=False)
    sizes = {"image_size": args.size, "crop_size": args.crop_size}

    def conventional(dataset: torch.utils.data.Dataset) -> DataLoader:
        return DataLoader(
            dataset, args.batch_size, shuffle=True, num_workers=args.workers, pin_memory=torch.cuda.is_available()
        )

    def ours(crop_on: str) -> Iterable:
        return build_train_data(replace(options.data, crop_on=crop_on), options.regions, **sizes)

    return {
        "grid conventional": lambda: conventional(
            GridPatches(data["images"], data["annotations"], args.size, args.crop_size)
        ),
        "grid worker": lambda: ours("worker"),
        "grid device": lambda: ours("device"),
        "panoptic conventional": lambda: conventional(
            Panoptic(data["images"], data["annotations"], data["segments"], args.size, args.patch, args.crop_size)
        ),
        "panoptic": lambda: (
            build_eval_data(
                options.eval, image_sizes=[args.size], patch_size=args.patch, crop_size=args.crop_size,
                batch_size=args.batch_size, workers=args.workers,
            ).loader
        ),
    }


def preparation_rate(loader: Iterable, args: argparse.Namespace) -> float:
    """Images/s that the device turns from delivered batches into a method's input; batches are at hand beforehand."""
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    batches = list(islice(iter(loader), 4))
    if device.type == "cuda":
        batches = [{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in b.items()} for b in batches]

    pixels = (OPENAI_MEAN, OPENAI_STD, dtype)
    views = {"images": View("images", args.size, *pixels), "crops": View("crops", args.crop_size, *pixels)}

    def prepare() -> None:
        for batch in batches:
            prepare_batch(batch, views, device)
        if device.type == "cuda":
            torch.cuda.synchronize()

    prepare()
    clock, rounds = Clock(), 0
    while clock() < args.seconds or not rounds:
        prepare()
        rounds += 1
    return rounds * sum(map(images_of, batches)) / clock()


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_data_flags(parser)
    add("--workers", type=int, default=2, help="loader processes (2)")
    add("--size", type=int, default=1024, help="side of the dense input, pixels (1024)")
    add("--patch", type=int, default=16, help="patch size of the model, for masks (16)")
    add("--crop-size", type=int, default=224, help="side of a crop, pixels (224)")
    add("--batch-size", type=int, default=2, help="images of a batch (2)")
    add("--seconds", type=float, default=8, help="measured time of each loader and round (8)")
    add("--rounds", type=int, default=3, help="rounds over all loaders; medians count (3)")
    add("--count", type=int, default=64, help="image files (64)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="for the rates of preparation")
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as folder:
        entries = int(2000 * max(args.seconds, 1) * max(args.workers, 1))  # more than any loader here can deliver
        data = dataset_of(args, Path(folder), count=args.count, entries=min(entries, 40000))
        makers = loaders(args, data)
        seen: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
        for _ in range(args.rounds):  # in turns, so that a slow spell of the machine meets all of them
            for name, make in makers.items():
                seen[name].append(measure(make(), args.seconds, warm_up=2 * max(args.workers, 1)))
        prepared = {name: preparation_rate(makers[f"grid {name}"](), args) for name in ("worker", "device")}
    rate = {name: statistics.median(r for r, _ in values) for name, values in seen.items()}
    size = {name: statistics.fmean(b for _, b in values) for name, values in seen.items()}

    def row(title: str, name: str, baseline: str) -> list[object]:
        ratio = "" if name == baseline else f"{rate[name] / rate[baseline]:.1f}x"
        share = "" if name == baseline else f"1/{size[baseline] / size[name]:.1f}"
        return [title, rate[name], ratio, size[name] / 1e6, share]

    grid, panoptic = "grid conventional", "panoptic conventional"
    print_table(
        f"Delivery by {args.workers} workers, {data['what']} to {args.size}, batches of {args.batch_size}",
        ["loader", "images/s", "ratio", "MB an image", "share"],
        [
            row("grid patches, conventional", grid, grid),
            row("grid patches, crops in the worker", "grid worker", grid),
            row("grid patches, crops on the device", "grid device", grid),
            row("panoptic evaluation, conventional", panoptic, panoptic),
            row("panoptic evaluation", "panoptic", panoptic),
        ],
    )
    print_table(
        f"Preparation on {args.device} (batches at hand)",
        ["what is left to do there", "images/s"],
        [["normalisation (crops from the worker)", prepared["worker"]],
         ["resizing, crops and normalisation", prepared["device"]]],
    )  # fmt: skip
    result = {
        "grid": {
            "ratio": rate["grid worker"] / rate[grid],
            "ratio_device": rate["grid device"] / rate[grid],
            "images_per_s": rate["grid worker"],
            "images_per_s_device": rate["grid device"],
            "baseline_images_per_s": rate[grid],
            "bytes_per_sample": size["grid worker"],
            "bytes_per_sample_device": size["grid device"],
            "baseline_bytes_per_sample": size[grid],
        },
        "panoptic": {
            "ratio": rate["panoptic"] / rate[panoptic],
            "images_per_s": rate["panoptic"],
            "baseline_images_per_s": rate[panoptic],
            "bytes_per_sample": size["panoptic"],
            "baseline_bytes_per_sample": size[panoptic],
        },
        "preparation": {"device": args.device, "images_per_s": prepared["worker"],
                        "images_per_s_crop_on_device": prepared["device"]},
        "workers": args.workers, "size": args.size, "batch_size": args.batch_size, "images": data["what"],
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
