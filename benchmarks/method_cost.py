"""What a step of each method costs against CLIPSelf's: seconds, memory, FLOP; all in turns on one machine.

    python benchmarks/method_cost.py --size 512 --crops 5          # a few minutes on 2 cores
    python benchmarks/method_cost.py --size 1024 --crops 20 --batch 2 8 --steps 5 --rounds 1      # on a GPU

Random weights throughout: they cost what trained ones do. Each method runs in a process of its own, whose largest
memory is reported; batches take turns in it, smaller ones first. Trunks of DINOv2 and a larger CLIP are part of the
step, as they are where their answers are not kept (``--cache-teacher``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "src")]

VFM = ["--vfm", "vit_base_patch14_reg4_dinov2", "--vfm-weights", "random"]
DENSE = ["--names", "{names}", "--dense-teacher", "EVA02-CLIP-L-14-336", "--dense-teacher-weights", "random"]
METHODS: dict[str, list[str]] = {
    "clipself": [],
    "clipself, windows": ["--readout", "window"],
    "regionclip": ["--method", "regionclip"],
    "sc": ["--method", "sc"],
    "declip": ["--method", "declip", *VFM],
    "synclip": ["--method", "synclip", *VFM],
    "denserc": ["--method", "denserc", *VFM],
    "densevlm": ["--method", "densevlm", *DENSE],
    "mixrc": ["--method", "mixrc", *VFM],
    "fineclip": ["--method", "fineclip"],
    "clim": ["--method", "clim"],
}
CLASSES = 133


def part(name: str, args: argparse.Namespace) -> dict[int, dict]:
    """One method in this process, by images of a batch: see :func:`measured`."""
    import torch
    from steps import OurStep, regions

    names = Path(args.folder) / "names.json"
    names.write_text(json.dumps([{"name": f"class {i}", "isthing": int(i < 80)} for i in range(CLASSES)]))
    flags = [f.format(names=names) for f in METHODS[name]]
    if name == "clim":
        flags += ["--mosaic-size", str(args.size)]
    device = torch.device(args.device)
    step = OurStep(["--model", args.model, *flags], size=args.size, device=device,
                   pictures=regions(max(args.batch), args.crops), classes=CLASSES)  # fmt: skip
    words = step.method.student.context_length
    found = {}
    for count in sorted(args.batch):  # the largest memory so far is then that of the batch at hand
        if name == "clim":  # as many images as there are crops, which is what its mosaics are made of
            n, side = count * args.crops, step.crop_size
            given = {"images": torch.randn(n, 3, side, side, device=device), "samples": n, "skipped": []}
            given["texts"] = torch.randint(1, 1000, (n, words), device=device)
        else:
            given = step.prepare(step.collated(regions(count, args.crops)))
            given |= _extras(given, words, device)
        found[count] = measured(step, given, args.steps)
    return found


def measured(step, given: dict, steps: int) -> dict:
    """Seconds of the best step, largest memory of the process so far in GB, TFLOP of a step."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from training.engine.memory import peak_memory

    device = step.device

    def run() -> float:
        batch = dict(given)
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    run()
    seconds = min(run() for _ in range(steps))
    memory = peak_memory(device) / 1e9
    with FlopCounterMode(display=False) as counter:
        run()
    return {"seconds": seconds, "memory_gb": memory, "tflop": counter.get_total_flops() / 1e12}


def _extras(batch: dict, length: int, device) -> dict:
    """What some methods ask for besides: captions, classes, labels."""
    import torch

    images, total = len(batch["boxes"]), sum(map(len, batch["boxes"]))
    words = torch.randint(1, 1000, (images + total, length), device=device)
    return {
        "captions": words[:images], "captions_of": torch.arange(images, device=device),
        "region_captions": words[images:], "region_captions_of": torch.arange(total, device=device),
        "classes": torch.arange(3, device=device), "classes_of": torch.zeros(3, dtype=torch.long, device=device),
        "labels": torch.randint(0, CLASSES, (total,), device=device),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    import tempfile

    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="EVA02-CLIP-B-16", help="the student (EVA02-CLIP-B-16)")
    add("--size", type=int, default=512, help="side of the image (512)")
    add("--batch", type=int, nargs="+", default=[1], help="images; several batches are measured one by one (1)")
    add("--crops", type=int, default=5, help="regions an image (5)")
    add("--steps", type=int, default=1, help="steps, of which the fastest counts (1)")
    add("--rounds", type=int, default=2, help="rounds over all methods; medians count (2)")
    add("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), metavar="NAME", help="all by default")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--part", help=argparse.SUPPRESS)
    add("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        print(json.dumps(part(args.part, args)))
        return
    seen: dict[str, list[dict]] = {name: [] for name in ["clipself", *(m for m in args.methods if m != "clipself")]}
    numbers = [f"--{n}={getattr(args, n)}" for n in ("model", "size", "crops", "steps", "device")]
    numbers += ["--batch", *map(str, args.batch)]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):  # in turns, so that a slow spell of the machine meets all of them
            for name in seen:
                command = [sys.executable, __file__, "--part", name, "--folder", folder, *numbers]
                done = subprocess.run(command, text=True, capture_output=True)
                if done.returncode:
                    raise SystemExit(f"error: {name}\n{done.stderr[-2000:]}")
                seen[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{name}: {json.dumps(seen[name][-1])}", file=sys.stderr, flush=True)
    result = {}
    for batch in map(str, sorted(args.batch)):
        rows = {n: {k: median(r[batch][k] for r in found) for k in found[0][batch]} for n, found in seen.items()}
        result[batch] = rows
        print(f"A step of {args.model} at {args.size}, batch {batch}, {args.crops} regions an image, on {args.device}")
        print_rows(rows)
    print(json.dumps({"rows": result, **{n: getattr(args, n) for n in ("model", "size", "crops", "device")}}))


def print_rows(rows: dict[str, dict]) -> None:
    """A batch's table, beside CLIPSelf."""
    base = rows["clipself"]
    print(f"{'method':<20}{'seconds':>9}{'':>8}{'memory':>10}{'':>8}{'TFLOP':>8}")
    for name, row in rows.items():
        ratios = {k: row[k] / base[k] for k in row}
        print(f"{name:<20}{row['seconds']:9.3f}{ratios['seconds']:7.2f}x{row['memory_gb']:8.2f} GB"
              f"{row['memory_gb'] - base['memory_gb']:+7.2f}{row['tflop']:8.2f}{ratios['tflop']:7.2f}x")  # fmt: skip


if __name__ == "__main__":
    main()
