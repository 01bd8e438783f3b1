"""A training step of CLIPSelf (student forward, backward, optimizer; teacher on crops) against the conventional one.

    python benchmarks/train_step.py                                             # CPU: 512 and 1024, batch 1
    python benchmarks/train_step.py --sizes 1024 --batches 1 2 4 8 16 --compile # GPU: eager and compiled
    python benchmarks/train_step.py --model EVA02-CLIP-L-14-336 --sizes 896 --batches 1 2 4 8 16 --compile

Each measurement has a process of its own, so that its peak memory is its own: resident memory on a CPU, allocated
memory on a GPU. Both steps start from the same weights and pictures, and their first losses are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "src")]
from common import Clock, add_data_flags, dataset_of, print_table, run_self  # noqa: E402


def make_parser() -> argparse.ArgumentParser:
    import torch

    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="EVA02-CLIP-B-16", help="name of the model (EVA02-CLIP-B-16)")
    add("--sizes", type=int, nargs="+", default=[1024] if gpu else [512, 1024], help="sides of the dense input")
    add("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16] if gpu else [1], help="images of a step")
    add("--crops", type=int, default=20, help="regions of an image (20)")
    add("--steps", type=int, default=10 if gpu else 2, help="timed steps, after a first one that is not")
    add("--rounds", type=int, default=1, help="rounds over all measurements; medians count (1)")
    add("--compile", action="store_true", help="measure compiled blocks as well")
    add("--grad-checkpointing", action="store_true", help="with recomputed activations (this package's step)")
    add("--precision", default=None, help="of both steps; amp_bf16 on GPUs that have it, else fp32, if absent")
    add("--device", default="cuda" if gpu else "cpu", help="where to compute")
    add("--no-baseline", action="store_true", help="leave the conventional step out")
    add("--curve-size", type=int, default=1024 if gpu else 224, help="side at which the number of regions varies")
    add("--curve-regions", type=int, nargs="*", default=[5, 10, 20, 40, 80] if gpu else [2, 4, 8, 16],
        help="numbers of regions; none for no curve")  # fmt: skip
    add("--curve-sizes", type=int, nargs="*", default=[320, 512, 768, 1024] if gpu else [160, 224, 320, 448],
        help="sides at which the number of tokens varies, with few regions; none for no curve")  # fmt: skip
    add("--loader-steps", type=int, default=30 if gpu else 4,
        help="steps fed by the loader, for the share of time spent waiting for data; 0 for none")  # fmt: skip
    add("--workers", type=int, default=8 if gpu else 1, help="loader processes of these steps")
    add("--crop-on", choices=("worker", "device"), default="worker", help="of these steps")
    add_data_flags(parser)
    add("--part", choices=("ours", "conventional", "curves", "loader", "peak"), help=argparse.SUPPRESS)
    return parser


# -- the parts that run in a process of their own ---------------------------------------------------------------------


def flags_of(args: argparse.Namespace) -> list[str]:
    """Flags of the training program."""
    flags = ["--model", args.model]
    flags += ["--precision", args.precision] if args.precision else []
    flags += ["--compile"] if args.compile else []
    return flags + (["--grad-checkpointing"] if args.grad_checkpointing else [])


def timed(step, device, count: int) -> tuple[list[float], float]:
    """(seconds of each of ``count`` steps after a first, loss of the first)."""
    from steps import synchronize

    first = step().item()
    seconds = []
    for _ in range(count):
        synchronize(device)
        clock = Clock()
        step()
        synchronize(device)
        seconds.append(clock())
    return seconds, first


def part_step(args: argparse.Namespace) -> dict:
    """Seconds, first loss and peak memory of one kind of step; ``{"out_of_memory": true}`` where it does not fit."""
    import torch
    from steps import ConventionalStep, OurStep, regions, step_flop

    from training.engine.memory import peak_memory

    device = torch.device(args.device)
    pictures = regions(args.batches[0], args.crops)
    kind = OurStep if args.part == "ours" else ConventionalStep
    try:
        step = kind(flags_of(args), size=args.sizes[0], device=device, pictures=pictures)
        seconds, loss = timed(step, device, args.steps)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    tower = step.visual if args.part == "ours" else step.student.visual
    peak = peak_memory(device) / 1e9
    flop = args.batches[0] * step_flop(tower, args.sizes[0], args.crops)
    return {"seconds": seconds, "loss": loss, "peak_gb": peak, "flop": flop}


def part_curves(args: argparse.Namespace) -> dict:
    """Step time (fastest of a few) against the number of regions, and against tokens."""
    import torch
    from steps import OurStep, regions, step_flop

    device = torch.device(args.device)

    def best(size: int, crops: int) -> tuple[float, float, int]:
        step = OurStep(flags_of(args), size=size, device=device, pictures=regions(1, crops))
        tokens = (size // step.visual.patch_size) ** 2
        return min(timed(step, device, max(args.steps, 3))[0]), step_flop(step.visual, size, crops), tokens

    few = 2
    return {
        "regions": [(crops, *best(args.curve_size, crops)[:2]) for crops in args.curve_regions],
        "tokens": [(size, few, *best(size, few)) for size in args.curve_sizes],
    }


def part_loader(args: argparse.Namespace) -> dict:
    """Share of the time that steps wait for the loader, when the real one feeds them."""
    import torch
    from steps import OurStep, regions

    from training.data import DevicePrefetcher, build_train_data
    from training.params import parse_args

    device = torch.device(args.device)
    size, batch = args.sizes[0], args.batches[0]
    step = OurStep(flags_of(args), size=size, device=device, pictures=regions(1, 1))
    with tempfile.TemporaryDirectory() as folder:
        data = dataset_of(args, Path(folder), count=32, entries=(args.loader_steps + 5) * batch)
        flags = ["--train-data", data["annotations"], "--train-image-root", data["images"], "--batch-size", str(batch)]
        flags += ["--workers", str(args.workers), "--crop-on", args.crop_on, "--max-boxes", str(args.crops)]
        options = parse_args([*flags, "--det-image-size", str(size)], check=False)
        loader = build_train_data(
            options.data, options.regions, image_size=size, crop_size=step.crop_size,
            pin_memory=device.type == "cuda",
        ).loader
        batches = iter(DevicePrefetcher(loader, step.prepare, device))
        for _ in range(2):
            step(next(batches)).item()
        wait, whole = 0.0, Clock()
        for _ in range(args.loader_steps):
            clock = Clock()
            prepared = next(batches)
            wait += clock()
            step(prepared).item()  # the program reads the loss of every step, too
        seconds = whole()
    return {"wait_share": wait / seconds, "seconds": seconds / args.loader_steps}


def part_peak(args: argparse.Namespace) -> dict:
    """FLOP/s of a large matrix product in the dtype of the steps."""
    import torch
    from steps import measured_peak

    from training.engine.precision import make_precision

    device = torch.device(args.device)
    return {"flop_per_s": measured_peak(device, make_precision(args.precision, device).input_dtype)}


# -- the program ------------------------------------------------------------------------------------------------------


def part(name: str, args: argparse.Namespace, *more: str) -> dict:
    """A part of the program in a process of its own."""
    common = ["--part", name, "--model", args.model, "--crops", args.crops, "--steps", args.steps]
    common += ["--device", args.device, *(["--precision", args.precision] if args.precision else [])]
    return run_self(__file__, [str(v) for v in [*common, *more]])


def steps_table(args: argparse.Namespace, peak: float) -> list[dict]:
    """Measure every size, batch and kind of step; print and return the rows."""
    kinds = [("conventional", "conventional", [])] if not args.no_baseline else []
    extra = ["--grad-checkpointing"] if args.grad_checkpointing else []
    kinds.append(("this package", "ours", extra))
    if args.compile:
        kinds.append(("this package, compiled", "ours", [*extra, "--compile"]))
    settings = [(s, b, *kind) for s in args.sizes for b in args.batches for kind in kinds]
    seen: dict[tuple, list[dict]] = {}
    for _ in range(args.rounds):
        for size, batch, title, name, flags in settings:
            result = part(name, args, "--sizes", size, "--batches", batch, *flags)
            seen.setdefault((size, batch, title), []).append(result)
    rows = []
    for (size, batch, title), results in seen.items():
        row = {"size": size, "batch": batch, "step": title}
        rows.append(row)
        if any(r.get("out_of_memory") for r in results):
            row["out_of_memory"] = True
            continue
        seconds = statistics.median(s for r in results for s in r["seconds"])
        row |= {"seconds": seconds, "images_per_s": batch / seconds, "peak_gb": max(r["peak_gb"] for r in results),
                "tflop": results[0]["flop"] / 1e12, "mfu": results[0]["flop"] / seconds / peak,
                "loss": results[0]["loss"]}  # fmt: skip
        plain = next((r for r in rows if (r["size"], r["batch"], r["step"]) == (size, batch, "conventional")), {})
        if title != "conventional" and "seconds" in plain:
            row |= {"speedup": plain["seconds"] / seconds, "memory_ratio": row["peak_gb"] / plain["peak_gb"],
                    "loss_difference": abs(row["loss"] - plain["loss"])}  # fmt: skip
    columns = ["seconds", "images_per_s", "peak_gb", "tflop", "mfu", "speedup", "memory_ratio", "loss_difference"]
    print_table(
        f"A training step of {args.model}, {args.crops} crops an image, on {args.device}",
        ["size", "batch", "step", "s", "images/s", "peak GB", "TFLOP", "MFU", "speed-up", "memory", "loss differs by"],
        [[r["size"], r["batch"], r["step"], *(r.get(c, "out of memory" if "seconds" not in r else "") for c in columns)]
         for r in rows],
    )  # fmt: skip
    return rows


def curves(args: argparse.Namespace) -> dict:
    """Measure and print step time against regions and tokens."""
    lists = ["--curve-regions", *args.curve_regions, "--curve-sizes", *args.curve_sizes]
    result = part("curves", args, "--curve-size", args.curve_size, *lists)
    out: dict = {}
    if len(result["regions"]) > 2:
        counts, seconds = (np.array(v) for v in zip(*((r[0], r[1]) for r in result["regions"]), strict=True))
        slope, start = np.polyfit(counts, seconds, 1)
        residual = 1 - ((seconds - slope * counts - start) ** 2).sum() / ((seconds - seconds.mean()) ** 2).sum()
        out["regions"] = {"seconds": dict(zip(counts.tolist(), seconds.tolist(), strict=True)),
                          "seconds_per_region": slope, "seconds_without": start, "linear_r2": residual}  # fmt: skip
        print_table(
            f"Step time against regions, at {args.curve_size}: {1e3 * start:.0f} ms + {1e3 * slope:.1f} ms a region "
            f"(r2 of the line {residual:.4f})",
            ["regions", "ms", "line, ms"],
            [[int(n), 1e3 * s, 1e3 * (start + slope * n)] for n, s in zip(counts, seconds, strict=True)],
        )
    if result["tokens"]:
        rows = [(tokens, s, flop) for _, _, s, flop, tokens in result["tokens"]]
        out["tokens"] = {n: {"seconds": s, "gflop_per_s": f / s / 1e9} for n, s, f in rows}
        print_table(
            "Step time against tokens, 2 regions", ["tokens", "ms", "us a token", "GFLOP/s"],
            [[n, 1e3 * s, 1e6 * s / n, f / s / 1e9] for n, s, f in rows],
        )  # fmt: skip
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    args = make_parser().parse_args(argv)
    if args.part:
        parts = {"curves": part_curves, "loader": part_loader, "peak": part_peak}
        print(json.dumps(parts.get(args.part, part_step)(args)))
        return
    peak = part("peak", args)["flop_per_s"]
    print(f"A large matrix product on {args.device}: {peak / 1e12:.3g} TFLOP/s, which MFU refers to")
    result: dict = {"model": args.model, "device": args.device, "peak_tflop_per_s": peak / 1e12}
    result["steps"] = steps_table(args, peak)
    if args.loader_steps:
        given = [f"--{k}={getattr(args, k)}" for k in ("images", "annotations", "segments") if getattr(args, k)]
        given += ["--sizes", args.sizes[0], "--batches", args.batches[0], "--loader-steps", args.loader_steps]
        found = part("loader", args, *given, "--workers", args.workers, "--crop-on", args.crop_on)
        print(f"\nWaiting for data: {100 * found['wait_share']:.2f} % of the time at {args.sizes[0]}, batch "
              f"{args.batches[0]}, {args.workers} workers, crops on the {args.crop_on}")  # fmt: skip
        result["data_wait_share"] = found["wait_share"]
    if args.curve_regions or args.curve_sizes:
        result["curves"] = curves(args)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
