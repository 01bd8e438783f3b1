"""What a training step and a whole run should cost on a GPU, from counts and the card's figures; nothing is timed.

    python benchmarks/roofline.py                                    B/16 at 1024 on an H200, and the ten recipes
    python benchmarks/roofline.py --model EVA02-CLIP-L-14-336 --size 896 --device h100 --batch-size 4
    python benchmarks/roofline.py --measured results/H200.json       measured times beside the computed ones

FLOP, bytes and kernels come from the program's own code run on the meta device (`counting.py`). A kernel takes the
longest of its arithmetic, its memory traffic and its start. `eager` adds up all kernels; `fused` only matrix products
and attention, as if all other work were fused into them: a compiled step lies between the two.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from common import print_table  # noqa: E402
from counting import Count, counting  # noqa: E402

import open_clip  # noqa: E402
from open_clip.mlp_widths import pad_mlps  # noqa: E402
from open_clip.regions import roi_features  # noqa: E402
from training.data.grid import grid_choices  # noqa: E402


@dataclass(frozen=True)
class Device:
    """A GPU: what it reaches in matrix products and memory copies, not its data sheet.

    Attributes:
        tflops: bfloat16 TFLOP/s of large matrix products.
        bandwidth: memory, GB/s.
        memory: GB.
        link: GB/s of the ring between GPUs of one machine, each way.
        network: GB/s between machines for each GPU.
        launch: microseconds to start a kernel from Python.
        attention: share of ``tflops`` that attention with heads of 64 reaches; far less than matrix products.
    """

    tflops: float
    bandwidth: float
    memory: float
    link: float
    network: float = 25.0
    launch: float = 5.0
    attention: float = 0.45


DEVICES = {
    "a100": Device(tflops=250, bandwidth=1700, memory=80, link=200, network=12.5),
    "h100": Device(tflops=650, bandwidth=2900, memory=80, link=350),
    "h200": Device(tflops=790, bandwidth=4300, memory=141, link=350),
    "rtx4090": Device(tflops=150, bandwidth=900, memory=24, link=20, network=3),
}
# CPU seconds that an image costs the loader, crops made there or on the device (benchmarks/README.md, 2 workers).
LOADER_SECONDS = {"worker": 2 / 98, "device": 2 / 217}
COCO, LVIS = 118_287, 100_170  # images of train2017 and of LVIS's training set
GIB = 1024**3
FIGURES = ("tflops", "bandwidth", "link", "network", "launch", "attention")  # of a device, that flags can change


@dataclass(frozen=True)
class Recipe:
    """One of the scripts: what its run does."""

    script: str
    model: str
    size: int
    images: int
    teacher: bool
    regions: float
    epochs: int = 6
    batch_size: int = 2
    evaluates_only: bool = False


def mean_patches(max_split: int = 6, max_boxes: int = 20) -> float:
    """Expected crops of an image cut into a random grid."""
    counts = [min(rows * columns, max_boxes) for rows, columns in grid_choices(max_split)]
    return sum(counts) / len(counts)


def recipes() -> list[Recipe]:
    """The ten recipes of ``scripts/``. Proposals and nouns are taken at their limit of 20 regions an image."""
    out = []
    for short, model, size in (("vitb16", "EVA02-CLIP-B-16", 1024), ("vitl14", "EVA02-CLIP-L-14-336", 896)):
        patches = mean_patches()
        out += [
            Recipe(f"train_clipself_coco_image_patches_eva_{short}", model, size, COCO, True, patches),
            Recipe(f"train_clipself_coco_region_proposals_eva_{short}", model, size, COCO, True, 20),
            Recipe(f"train_clipself_lvis_image_patches_eva_{short}", model, size, LVIS, True, patches),
            Recipe(f"train_regionclip_coco_eva_{short}", model, size, COCO, False, 20),
            Recipe(f"test_eva_{short}_macc_boxes_masks", model, size, 5000, True, 11, 1, 1, evaluates_only=True),
        ]
    return out


@dataclass
class Step:
    """Counts of the parts of a step of one process, and what is held in memory."""

    parts: dict[str, Count]
    trained: int  # parameters
    frozen: int
    saved: float  # bytes of activations kept for the backward pass

    @property
    def model_flop(self) -> float:
        """FLOP that the method asks for: without the recomputation inside the attention's backward pass."""
        forward = self.parts["student forward"].flop
        return 3 * forward + self.parts["teacher"].flop if self.trained else forward + self.parts["teacher"].flop

    def memory(self) -> float:
        """Bytes at the peak: weights, gradients and two moments in float32, frozen copies in bfloat16, activations."""
        return 16.0 * self.trained + 2.0 * self.trained + 2.0 * self.frozen + self.saved


def count_step(
    model: str, size: int, batch: int, regions: float, *, teacher: bool, train: bool = True, pads: bool = False
) -> Step:
    """Count a step from the code that it runs.

    Args:
        model: name of a config. size: side of the dense input, a multiple of the patch. batch: images a process.
        regions: boxes, and crops where there is a teacher, of an image on average.
        pads: count MLPs of odd width padded (:mod:`open_clip.mlp_widths`), with all that padding copies.
    """
    half = torch.bfloat16
    student = open_clip.create_model(model, device="meta", load_weights=False).to(dtype=half)
    pad_mlps(student.visual.trunk, pads)
    frozen = sum(p.numel() for p in student.visual.parameters()) if teacher else 0
    crops = max(round(batch * regions), 1)
    native = student.visual.image_size
    parts: dict[str, Count] = {}
    expert = copy.deepcopy(student)
    with counting() as parts["teacher"], torch.no_grad():
        if teacher:
            expert.encode_image(torch.empty(crops, 3, native, native, device="meta", dtype=half))
    student.requires_grad_(False)
    if train:
        student.lock_image_tower(len(student.visual.trunk.blocks))
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            saved[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
            held.append(tensor)
        return tensor

    held: list[Tensor] = []  # so that no two storages share an id
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        with counting() as parts["student forward"]:
            dense = student.encode_dense(
                torch.empty(batch, 3, size, size, device="meta", dtype=half), keep_shape=True
            )  # fmt: skip
        with counting() as parts["RoIAlign and loss"]:
            boxes = [torch.empty(max(round(regions), 1), 4, device="meta")] * batch
            pooled = torch.nn.functional.normalize(roi_features(dense, boxes), dim=-1)
            loss = (pooled * torch.empty_like(pooled)).sum()
    parts["backward"], parts["optimizer"] = Count(), Count()
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    if train:
        with counting() as parts["backward"]:
            loss.backward()
        # Read weight, gradient and two moments, write three of them, and the bfloat16 copies for the next step.
        parts["optimizer"] = Count([(0.0, (7 * 4 + 4 + 2) * trained, False)])
    return Step(parts, trained, frozen, float(sum(saved.values())))


def seconds(step: Step, device: Device, *, fused: bool) -> dict[str, float]:
    """Expected seconds of each part."""
    flops, bandwidth, launch = device.tflops * 1e12, device.bandwidth * 1e9, 0 if fused else device.launch * 1e-6
    out = {}
    for name, count in step.parts.items():
        count = count.products() if fused and name not in ("optimizer", "RoIAlign and loss") else count
        out[name] = count.seconds(flops=flops, bandwidth=bandwidth, launch=launch, attention=device.attention)
    return out


def exchange_seconds(step: Step, device: Device, gpus: int, *, per_machine: int = 8) -> float:
    """Ring all-reduce of float32 gradients; over the slowest link on the way (Patarasuk and Yuan 2009)."""
    link = device.link if gpus <= per_machine else device.network
    return 0.0 if gpus == 1 else 2 * (gpus - 1) / gpus * 4.0 * step.trained / (link * 1e9)


def run_cost(recipe: Recipe, step: Step, device: Device, gpus: int, *, fused: bool, crop_on: str) -> dict[str, float]:
    """Hours, rates and limits of a whole run on a number of GPUs; the gradients' exchange hides behind the backward."""
    parts = seconds(step, device, fused=fused)
    exchange = exchange_seconds(step, device, gpus) if step.trained else 0.0
    alone = sum(parts.values())
    length = alone + max(exchange - parts["backward"], 0.0)
    rate = gpus * recipe.batch_size / length
    # Epochs are the same images however many GPUs share them.
    return {
        "gpus": gpus,
        "images_per_second": rate,
        "hours": recipe.images * recipe.epochs / rate / 3600,
        "gpu_hours": recipe.images * recipe.epochs / rate / 3600 * gpus,
        "loader_cores": rate * LOADER_SECONDS[crop_on],
        "exchange_ms": exchange * 1e3,
        "efficiency": alone / length,
        "memory_gb": step.memory() / GIB,
        "steps": recipe.images * recipe.epochs / (gpus * recipe.batch_size),
    }


def show_parts(title: str, step: Step, device: Device, measured: dict[str, float] | None = None) -> None:
    """Print the parts of a step: counts, and expected milliseconds on a device."""
    eager, fused = seconds(step, device, fused=False), seconds(step, device, fused=True)
    rows = []
    for name, count in step.parts.items():
        seen = (measured or {}).get(name)
        rows.append([
            name, f"{count.flop / 1e12:.2f}", f"{count.bytes / 1e9:.1f}", len(count.kernels),
            f"{1e3 * eager[name]:.1f}", f"{1e3 * fused[name]:.1f}", "not measured" if seen is None else f"{seen:.1f}",
        ])  # fmt: skip
    total = [sum(c.flop for c in step.parts.values()), sum(c.bytes for c in step.parts.values())]
    rows.append([
        "all", f"{total[0] / 1e12:.2f}", f"{total[1] / 1e9:.1f}", sum(len(c.kernels) for c in step.parts.values()),
        f"{1e3 * sum(eager.values()):.1f}", f"{1e3 * sum(fused.values()):.1f}", "",
    ])  # fmt: skip
    print_table(title, ["part", "TFLOP", "GB moved", "kernels", "eager ms", "fused ms", "measured ms"], rows)


def show_costs(title: str, device: Device, gpus: Sequence[int], *, fused: bool, crop_on: str) -> list[dict]:
    """Print, and return, what whole runs of the ten recipes cost."""
    rows, values, steps = [], [], {}
    for recipe in recipes():
        key = (recipe.model, recipe.teacher, recipe.regions, recipe.evaluates_only)
        if key not in steps:
            steps[key] = count_step(
                recipe.model, recipe.size, recipe.batch_size, recipe.regions, teacher=recipe.teacher,
                train=not recipe.evaluates_only,
            )  # fmt: skip
        for n in gpus:
            cost = run_cost(recipe, steps[key], device, n, fused=fused, crop_on=crop_on)
            values.append({"recipe": recipe.script, **cost})
            rows.append([
                recipe.script if n == gpus[0] else "", n, f"{cost['hours']:.2f}", f"{cost['gpu_hours']:.1f}",
                f"{cost['images_per_second']:.0f}", f"{cost['loader_cores']:.0f}", f"{cost['memory_gb']:.1f}",
                f"{cost['exchange_ms']:.1f}", f"{100 * cost['efficiency']:.0f} %", f"{cost['steps']:.0f}",
            ])  # fmt: skip
    head = ["recipe", "GPUs", "hours", "GPU hours", "images/s", "cores", "GB", "exchange ms", "scaling", "steps"]
    print_table(title, head, rows)
    return values


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="EVA02-CLIP-B-16")
    parser.add_argument("--size", type=int, default=1024, help="side of the dense input in pixels")
    parser.add_argument("--batch-size", type=int, default=2, help="images a process")
    parser.add_argument("--regions", type=float, default=20, help="crops an image")
    parser.add_argument("--no-teacher", action="store_true", help="a method without crops (RegionCLIP)")
    parser.add_argument("--device", choices=sorted(DEVICES), default="h200")
    for name in FIGURES:
        parser.add_argument(f"--{name}", type=float, default=None, help="instead of the device's own")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--crop-on", choices=("worker", "device"), default="worker")
    parser.add_argument("--eager", action="store_true", help="cost runs by all kernels instead of the fused bound")
    parser.add_argument("--pad-mlps", action="store_true", help="count the padding of MLPs of odd width (L/14)")
    parser.add_argument("--measured", type=Path, help="json of benchmarks/gpu.py, whose times are shown beside")
    parser.add_argument("--no-recipes", action="store_true", help="the step's table alone")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print both tables, and one line of JSON."""
    args = make_parser().parse_args(argv)
    changed = {n: getattr(args, n) for n in FIGURES if getattr(args, n) is not None}
    device = Device(**{**asdict(DEVICES[args.device]), **changed})
    measured = json.loads(args.measured.read_text()).get("step_parts_ms") if args.measured else None
    step = count_step(
        args.model, args.size, args.batch_size, args.regions, teacher=not args.no_teacher, pads=args.pad_mlps
    )
    title = f"{args.model} at {args.size}, batch {args.batch_size}, {args.regions:g} regions an image, on {args.device}"
    show_parts(title, step, device, measured)
    totals = {kind: sum(seconds(step, device, fused=kind == "fused").values()) for kind in ("eager", "fused")}
    for kind, total in totals.items():
        mfu = step.model_flop / total / (device.tflops * 1e12)
        print(f"{kind}: {args.batch_size / total:.0f} images/s, MFU {100 * mfu:.0f} % of {device.tflops:g} TFLOP/s")
    print(f"memory about {step.memory() / GIB:.1f} GB; {step.trained / 1e6:.0f} million parameters train")
    values: list[dict] = []
    if not args.no_recipes:
        title = f"Whole runs on {args.device}, computed, {'eager' if args.eager else 'fused'}"
        values = show_costs(title, device, args.gpus, fused=not args.eager, crop_on=args.crop_on)
    print(json.dumps({"device": asdict(device), "seconds": totals, "runs": values}))


if __name__ == "__main__":
    main()
