"""ViLD's store: rows of it written and read, beside the usual loop over crops and beside a training step.

    python benchmarks/vild.py                                        the teacher ViT-B-32
    python benchmarks/vild.py --teacher ViT-Ti-8-64 --images 4       a small one

"plain" cuts each crop out of the image with Pillow, prepares it and embeds it, one at a time, as is usual (and keeps a
float32 file an image). Both embed the same boxes of the same generated photographs at 1 and 1.5 times their size, by
turns; weights are random. The store is filled by a process for each core, as torchrun does; the loop uses all cores as
torch does; the start of processes is not counted. Reading takes 300 rows an image, in random order, from a store opened
anew, as training does. Everything runs on the CPU. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "src")]
from common import ROOT, Clock, photograph, print_table, random_boxes  # noqa: E402
from conventional import to_float  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from ovdet.data.images import read_image  # noqa: E402
from ovdet.data.transforms import View  # noqa: E402
from ovdet.vild import embed as embedding  # noqa: E402
from ovdet.vild.assemble import build_detector, load_teacher, read_config  # noqa: E402
from ovdet.vild.config import VildConfig  # noqa: E402
from ovdet.vild.crops import crop_pixels  # noqa: E402
from ovdet.vild.dataset import Distilled  # noqa: E402
from ovdet.vild.embed import SHARD_IMAGES, Embedder  # noqa: E402
from ovdet.vild.proposals import ProposalList, ProposalWriter  # noqa: E402
from training.engine.data.annotations import load_annotations  # noqa: E402
from training.engine.data.store import TeacherStore  # noqa: E402
from training.engine.distributed import Dist  # noqa: E402
from training.engine.precision import make_precision  # noqa: E402

CPU = torch.device("cpu")
CONFIG = ROOT / "ViLD" / "configs" / "lvis_r50_ensemble.toml"
READ_IMAGES, READ_ROWS, READ_WIDTH = 300, 300, 512  # 92 MB


def prepare(folder: Path, images: int, boxes: int) -> None:
    """Photographs in ``folder``, and a list of ``boxes`` proposals of each."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(images):
        Image.fromarray(photograph(rng)).save(folder / f"{i}.jpg", quality=90)
        own = np.array(list(random_boxes(rng, boxes)), np.float32)
        own[:, 2:] += own[:, :2]
        found.append(own)
    write_list(folder / "proposals", found)


def write_list(folder: Path, found: Sequence[np.ndarray]) -> ProposalList:
    """A list of boxes ``[K, 4]`` of the images 0.jpg, 1.jpg, ..."""
    listed = [{"id": i + 1, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(len(found))]
    file = folder.with_suffix(".json")
    file.write_text(json.dumps({"images": listed, "annotations": [], "categories": [{"id": 1, "name": "object"}]}))
    writer = ProposalWriter(folder, load_annotations(str(file)), {"made": "benchmark"})
    writer.create()
    for part in writer.missing():
        writer.write(part, [(found[i], np.linspace(1, 0, len(found[i]))) for i in writer.images_of(part)])
    return writer.finish()


# -- writing ----------------------------------------------------------------------------------------------------------


def plain_squares(image: Image.Image, boxes: np.ndarray, scales: Sequence[float], size: int) -> Iterator[Tensor]:
    """Crops of an image, normalised ``[1, 3, size, size]``, each box at every scale."""
    for box in boxes:
        for scale in scales:
            pixels = tuple(crop_pixels(box[None], scale, image.height, image.width)[0].tolist())
            yield to_float(image.crop(pixels).resize((size, size), Image.BICUBIC))[None]


@torch.inference_mode()
def plain_fill(folder: Path, proposals: ProposalList, embedder: Embedder, root: Path) -> np.ndarray:
    """The usual loop; the rows ``[R, D]`` that it wrote."""
    scales, rows = embedder.options.crop_scales, []
    folder.mkdir()
    for row in range(len(proposals)):
        image = Image.open(root / proposals.names[row]).convert("RGB")
        squares = plain_squares(image, proposals.boxes[proposals.of(row)], scales, embedder.size)
        raw = torch.cat([embedder.clip.encode_image(square) for square in squares])
        own = F.normalize(raw.unflatten(0, (-1, len(scales))).sum(1), dim=-1).numpy()
        np.save(folder / f"{row}.npy", own)
        rows.append(own)
    return np.concatenate(rows)


def writer(rank: int, processes: int, values: list[str], folder: Path, barrier: Any, turns: int) -> None:
    """One process that fills its shards of the store of each turn, between two barriers."""
    torch.set_num_threads(max((os.cpu_count() or 1) // processes, 1))
    logging.getLogger("ovdet").setLevel(logging.WARNING)
    embedding.SHARD_IMAGES = 1  # so that every process has some
    config = read_config(str(CONFIG), values)
    embedder, teacher = embedder_of(config)
    proposals = ProposalList.open(folder / "proposals")
    for turn in range(turns):
        store = embedding.open_store(str(folder / f"store_{turn}"), config, proposals, teacher)
        barrier.wait()
        dist = Dist(rank, processes, rank, CPU, False)
        embedding.fill(store, proposals, embedder, root=str(folder), exif=True, dist=dist, workers=0)
        barrier.wait()


def embedder_of(config: VildConfig) -> tuple[Embedder, nn.Module]:
    """The teacher, warm, and what embeds crops with it."""
    teacher = load_teacher(config).model
    embedder = Embedder(teacher, config.teacher, device=CPU, precision=make_precision("fp32", CPU))
    embedder.raw(torch.zeros(2, 3, embedder.size, embedder.size))
    return embedder, teacher


def writing(values: list[str], folder: Path, processes: int, turns: int) -> dict[str, float]:
    """Rows/s of both ways and, in this process, of their crops alone; the best of the turns, which alternate."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes + 1)
    children = [
        context.Process(target=writer, args=(rank, processes, values, folder, barrier, turns), daemon=True)
        for rank in range(processes)
    ]
    for child in children:
        child.start()
    torch.set_num_threads(os.cpu_count() or 1)
    config = read_config(str(CONFIG), values)
    embedder, teacher = embedder_of(config)
    proposals = ProposalList.open(folder / "proposals")
    seconds: dict[str, list[float]] = {"store": [], "plain": [], "store_crops": [], "plain_crops": []}
    for turn in range(turns):
        barrier.wait(600)
        clock = Clock()
        barrier.wait(3600)
        seconds["store"].append(clock())
        clock = Clock()
        plain = plain_fill(folder / f"plain_{turn}", proposals, embedder, folder)
        seconds["plain"].append(clock())
        clock = Clock()
        for row in range(len(proposals)):
            image = read_image(str(folder / proposals.names[row]))
            pixels = embedder.pixels_of(proposals.boxes[proposals.of(row)], *image.shape[-2:])
            embedder.cut(image, pixels.reshape(-1, 4))
        seconds["store_crops"].append(clock())
        clock = Clock()
        for row in range(len(proposals)):
            image = Image.open(folder / proposals.names[row]).convert("RGB")
            boxes = proposals.boxes[proposals.of(row)]
            for _ in plain_squares(image, boxes, config.teacher.crop_scales, embedder.size):
                pass
        seconds["plain_crops"].append(clock())
    for child in children:
        child.join(60)
    embedding.SHARD_IMAGES = 1
    store = embedding.open_store(str(folder / "store_0"), config, proposals, teacher)
    stored = np.concatenate([store.of_image(row) for row in range(len(proposals))])
    rates = {f"{name}_rows_s": len(proposals.boxes) / min(times) for name, times in seconds.items()}
    return {**rates, "cosine": float((stored.astype(np.float32) * plain).sum(1).min())}


# -- reading ----------------------------------------------------------------------------------------------------------


def reading(folder: Path, images: int) -> float:
    """Seconds an image: READ_ROWS boxes through a view, with their targets, from a store opened anew."""
    rng = np.random.default_rng(0)
    boxes = []
    for _ in range(images):
        own = np.array(list(random_boxes(rng, READ_ROWS)), np.float32)
        own[:, 2:] += own[:, :2]
        boxes.append(own)
    proposals = write_list(folder / "many", boxes)
    settings = (folder / "read", proposals.offsets, READ_WIDTH, {"made": "benchmark"})
    store = TeacherStore(*settings, shard_images=SHARD_IMAGES)
    store.create()
    for shard in range(store.num_shards):
        store.write(shard, rng.normal(size=store.shape(shard)).astype(np.float16))
    distilled = Distilled(
        ProposalList.open(proposals.folder), TeacherStore(*settings, shard_images=SHARD_IMAGES), np.arange(images)
    )
    view = View((768, 1024), 0, 0, (768, 1024), True)
    clock = Clock()
    for image in rng.permutation(images).tolist():
        assert len(distilled.of(image, view, (480, 640))["distil_targets"]) > 0
    return clock() / images


def training_step(config: VildConfig, size: int) -> float:
    """Seconds an image of a training step of the config's network, READ_ROWS boxes to distil, at ``size`` pixels."""
    rng = np.random.default_rng(0)
    detector = build_detector(config, READ_WIDTH).train()
    detector.set_vocabulary(torch.randn(65, READ_WIDTH), torch.ones(65, dtype=torch.bool))

    def some(number: int) -> Tensor:
        corners = torch.from_numpy(np.sort(rng.uniform(0, size - 8, (number, 2, 2)), axis=1).reshape(-1, 4)).float()
        return corners + torch.tensor([0.0, 0, 8, 8])

    target = {
        "boxes": some(7), "labels": torch.arange(7), "masks": torch.zeros(7, size, size, dtype=torch.bool),
        "distil_boxes": some(READ_ROWS), "distil_targets": F.normalize(torch.randn(READ_ROWS, READ_WIDTH), dim=1),
    }  # fmt: skip
    pictures = torch.randint(0, 255, (2, 3, size, size), dtype=torch.uint8)
    clock = Clock()
    losses = detector(detector.prepare(pictures, [(size, size)] * 2), [(size, size)] * 2, [target] * 2)
    sum(losses.values()).backward()
    return clock() / 2


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("values", nargs="*", help="config values of the training step: section.key=value")
    parser.add_argument("--teacher", default="ViT-B-32-quickgelu", help="a model of open_clip; its weights are random")
    parser.add_argument("--images", type=int, default=2, help="photographs whose proposals are embedded")
    parser.add_argument("--proposals", type=int, default=100, help="boxes of each")
    parser.add_argument("--rounds", type=int, default=1, help="turns; the best counts")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="that fill the store (default: one for each core)"
    )
    parser.add_argument("--trunk", default="resnet50.tv_in1k", help="of the training step; its weights are random")
    parser.add_argument("--size", type=int, default=512, help="image side of the training step")
    parser.add_argument("--read-images", type=int, default=READ_IMAGES, help="images of the store that is read")
    args = parser.parse_intermixed_args(argv)
    logging.getLogger("ovdet").setLevel(logging.WARNING)
    values = [f"teacher.name={args.teacher}", 'teacher.pretrained=""', f"model.trunk={args.trunk}",
              "model.trunk_weights=random", *args.values]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, args.images, args.proposals)
        found = writing(values, folder, args.processes, args.rounds)
        found["read_s"] = reading(folder, args.read_images)
    found["step_s"] = training_step(read_config(str(CONFIG), values), args.size)
    found["ratio"] = found["store_rows_s"] / found["plain_rows_s"]
    found["crops_ratio"] = found["store_crops_rows_s"] / found["plain_crops_rows_s"]
    found["read_share"] = found["read_s"] / found["step_s"]
    print_table(
        f"rows/s written ({args.teacher}, {args.images} images of {args.proposals} proposals)",
        ["", "store", "plain", "ratio"],
        [["crops cut and embedded", found["store_rows_s"], found["plain_rows_s"], found["ratio"]],
         ["crops alone", found["store_crops_rows_s"], found["plain_crops_rows_s"], found["crops_ratio"]]],
    )  # fmt: skip
    print(f"least cosine of the rows of both ways: {found['cosine']:.5f}")
    print_table(
        f"ms an image ({READ_ROWS} rows of {READ_WIDTH}; {args.trunk} at {args.size} pixels)",
        ["rows and boxes read", "training step", "share"],
        [[1e3 * found["read_s"], 1e3 * found["step_s"], f"{100 * found['read_share']:.2f} %"]],
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
