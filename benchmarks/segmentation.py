"""Segmentation scores of several readings, against the conventional evaluation; and the memory of one huge photograph.

    python benchmarks/segmentation.py

Conventional: a pass of the network per reading, windows one by one, the scores of each upsampled to its pixels and
added to a float map of the input's size, that map resized to the photograph, softmax and argmax over it, and counts by
histograms. Both read the same files, see the same windows and take turns; their label maps must be the same but for
ties, and so their confusion matrices nearly.

The memory is the peak of a process of its own that labels a photograph of 4000 x 3000 pixels with 171 classes, against
the size that the scores alone would have at full size.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "src")]
from common import Clock, add_data_flags, dataset_of, photograph, print_table, run_self  # noqa: E402

import open_clip  # noqa: E402
from open_clip.transform import normalize  # noqa: E402
from ovseg.classes import ClassList, class_list  # noqa: E402
from ovseg.data.sets import open_dataset  # noqa: E402
from ovseg.evaluate import evaluate  # noqa: E402
from ovseg.options import variants_from  # noqa: E402
from ovseg.protocols import Protocol  # noqa: E402
from ovseg.segment import Segmenter, segment  # noqa: E402
from ovseg.windows import window_boxes  # noqa: E402
from training.engine.distributed import Dist  # noqa: E402
from training.engine.memory import peak_memory  # noqa: E402

READOUTS = ["value", "sclip", "clearclip", "naclip"]


def conventional_evaluation(
    model: nn.Module, data, embeddings: Tensor, protocol: Protocol, readouts: Sequence[str], workers: int
) -> dict[str, Tensor]:
    """Confusion matrix ``[C, C]`` of each reading, a pass over the data set for each."""
    tables, visual = {}, model.visual
    num_classes = len(data.classes)
    for readout in readouts:
        table = torch.zeros(num_classes, num_classes)
        for batch in DataLoader(data, batch_size=1, num_workers=workers, collate_fn=list):
            item = batch[0]
            pixels = normalize(item["input"], visual.image_mean, visual.image_std)[None]
            height, width = pixels.shape[-2:]
            total, cover = torch.zeros(1, num_classes, height, width), torch.zeros(1, 1, height, width)
            for y0, x0, y1, x1 in window_boxes(height, width, protocol.window, protocol.stride):
                dense = model.encode_dense(pixels[..., y0:y1, x0:x1], keep_shape=True, readout=readout)
                scores = torch.einsum("bdhw,cd->bchw", dense, embeddings)
                total[..., y0:y1, x0:x1] += F.interpolate(scores, (y1 - y0, x1 - x0), mode="bilinear")
                cover[..., y0:y1, x0:x1] += 1
            logits = F.interpolate(total / cover, tuple(item["labels"].shape), mode="bilinear")[0]
            labels = (protocol.scale * logits).softmax(0).argmax(0)
            known = item["labels"] != 255
            bins = num_classes * item["labels"][known].long() + labels[known]
            size = num_classes**2
            table += torch.histc(bins.float(), bins=size, min=0, max=size - 1).view(num_classes, num_classes)
        tables[readout] = table
    return tables


def _classes(count: int) -> ClassList:
    names = tuple(f"class {i}" for i in range(count))
    return ClassList(names, tuple((name,) for name in names))


def measure_speed(args: argparse.Namespace, folder: Path) -> dict:
    """Both evaluations in turns: images/s of each, their ratio, and how far their counts agree."""
    torch.manual_seed(0)
    model = open_clip.create_model(args.model).eval().requires_grad_(False)
    source = dataset_of(args, folder, count=args.count, entries=args.count)
    root = Path(source["annotations"])
    # The data set's PNGs are expected beside its json.
    root.with_suffix("").symlink_to(Path(source["segments"]).resolve(), target_is_directory=True)
    data = open_dataset("panoptic", root, image_root=source["images"])
    embeddings = F.normalize(torch.randn(len(data.classes), model.visual.embed_dim), dim=-1)
    protocol = Protocol(short_side=args.short_side, window=args.window, stride=args.window // 2, antialias=False)
    segmenter = Segmenter(model, data.classes, embeddings, variants_from(protocol, args.readouts, ["none"]))
    data.prepare = segmenter.prepare
    alone = Dist(0, 1, 0, torch.device("cpu"), False)
    ours, plain = [], []
    for _ in range(args.rounds):
        clock = Clock()
        found = evaluate(segmenter, data, alone, workers=args.workers, progress=False)
        ours.append(clock())
        clock = Clock()
        with torch.no_grad():
            tables = conventional_evaluation(model, data, embeddings, protocol, args.readouts, args.workers)
        plain.append(clock())
    moved = sum(float((found[r].counts - tables[r]).clamp(min=0).sum()) for r in args.readouts)
    pixels = sum(float(found[r].counts.sum()) for r in args.readouts)
    ours_s, plain_s = (statistics.median(times) / len(data) for times in (ours, plain))
    return {
        "what": source["what"], "model": args.model, "images": len(data), "classes": len(data.classes),
        "readouts": args.readouts, "images_per_s": 1 / ours_s, "conventional_images_per_s": 1 / plain_s,
        "ratio": plain_s / ours_s, "share_of_pixels_that_differ": moved / pixels,
    }  # fmt: skip


def measure_memory(args: argparse.Namespace) -> dict:
    """Label one huge photograph in this process: its peak, and the seconds it took."""
    import numpy as np

    torch.manual_seed(0)
    model = open_clip.create_model(args.model).eval().requires_grad_(False)
    image = torch.from_numpy(photograph(np.random.default_rng(0), args.width, args.height)).permute(2, 0, 1)
    classes = class_list("coco_stuff171") if args.classes == 171 else _classes(args.classes)
    embeddings = F.normalize(torch.randn(len(classes), model.visual.embed_dim), dim=-1)
    before, clock = peak_memory() / 1e9, Clock()
    protocol = Protocol(
        short_side=args.memory_side, long_side=10**6, window=args.memory_window, pamr_steps=args.pamr_steps
    )  # fmt: skip
    labels = segment(image, model, classes, embeddings=embeddings, protocol=protocol, confidence=True).labels
    assert labels.shape == (args.height, args.width)
    return {
        "width": args.width, "height": args.height, "classes": len(classes), "short_side": args.memory_side,
        "window": args.memory_window, "pamr_steps": args.pamr_steps, "seconds": clock(), "peak_gb": peak_memory() / 1e9,
        "before_gb": before, "scores_alone_gb": 4e-9 * args.width * args.height * len(classes),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print tables, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_data_flags(parser)
    add("--model", default="ViT-B-16")
    add("--readouts", nargs="+", default=READOUTS)
    add("--count", type=int, default=8, help="images of the speed part")
    add("--rounds", type=int, default=1, help="turns that both evaluations take; medians count")
    add("--short-side", type=int, default=336)
    add("--window", type=int, default=224)
    add("--workers", type=int, default=1)
    add("--width", type=int, default=4000, help="of the huge photograph")
    add("--height", type=int, default=3000)
    add("--classes", type=int, default=171)
    add("--memory-side", type=int, default=512, help="short side of the huge photograph's input")
    add("--memory-window", type=int, default=0)
    add("--pamr-steps", type=int, default=0)
    add("--part", choices=("all", "speed", "memory"), default="all")
    args = parser.parse_args(argv)
    logging.disable(logging.INFO)
    if args.part == "memory":
        print(json.dumps(measure_memory(args)))
        return
    results: dict = {}
    if args.part in ("all", "speed"):
        with tempfile.TemporaryDirectory() as folder:
            speed = results["speed"] = measure_speed(args, Path(folder))
        print_table(
            f"Segmentation scores of {len(speed['readouts'])} readings, {speed['classes']} classes, {speed['what']}",
            ("", "images/s"),
            [
                ("conventional", speed["conventional_images_per_s"]),
                ("this package", speed["images_per_s"]),
                ("ratio", speed["ratio"]),
                ("share of pixels labelled differently", speed["share_of_pixels_that_differ"]),
            ],
        )
    if args.part == "all":
        flags = ["--part", "memory", "--model", args.model]
        for name in ("width", "height", "classes", "memory_side", "memory_window", "pamr_steps"):
            flags += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        memory = results["memory"] = run_self(str(Path(__file__).resolve()), flags)
        print_table(
            f"One photograph of {memory['width']} x {memory['height']} pixels, {memory['classes']} classes",
            ("", "value"),
            [
                ("peak memory, GB", memory["peak_gb"]),
                ("of it before the photograph, GB", memory["before_gb"]),
                ("scores alone at full size, GB", memory["scores_alone_gb"]),
                ("seconds", memory["seconds"]),
            ],
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
