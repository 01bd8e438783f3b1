"""What leaving padding out of the dense pass gains, and what it does to the accuracy.

    python benchmarks/padding.py steps                      a training step on 4:3 images, with padding and without
    python benchmarks/padding.py steps --model ViT-Ti-8-64 --batch 2
    python benchmarks/padding.py study --out logs/padding   mAcc on 4:3 scenes after equal training, three seeds

Steps are timed in turns in one process, on a CPU in seconds of its cores; peak memory is that of a process of its own
for each. The study takes one tiny CLIP (`--start FILE`, or trains the quick start's) and distils it with CLIPSelf on
scenes of 4:3, upright and lying, with and without padding: same steps, same images, same regions. A study that was cut
short goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "src")]
from common import print_table, run_self  # noqa: E402
from program_runs import claim_folder  # noqa: E402

ARMS = {"padded": [], "dropped": ["--drop-padding"]}
MODEL = "ViT-Ti-8-64"


def make_step(args: argparse.Namespace, arm: str):
    """The program's step of one arm, on pictures of 640x480."""
    import torch
    from steps import OurStep, regions

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    flags = ["--model", args.model, "--lr", "1e-6", *ARMS[arm]]
    return OurStep(flags, size=args.size, device=torch.device(args.device), pictures=regions(args.batch, args.crops))


def steps(args: argparse.Namespace) -> dict:
    """Seconds of a step by arm, in turns, and peak memory."""
    from steps import synchronize

    made = {arm: make_step(args, arm) for arm in ARMS}
    # On a CPU the seconds of its cores, which other work on the machine does not stretch.
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    losses = {arm: made[arm]().item() for arm in ARMS}  # warm
    for _ in range(args.rounds):
        for arm, step in made.items():
            synchronize(step.device)
            begin = clock()
            step()
            synchronize(step.device)
            seconds[arm].append(clock() - begin)
    alone = [__file__, "peak", "--model", args.model, "--size", args.size, "--batch", args.batch, "--crops", args.crops,
             "--device", args.device, "--threads", args.threads]  # fmt: skip
    out = {"model": args.model, "size": args.size, "batch": args.batch, "loss": losses}
    out["seconds"] = {arm: statistics.median(values) for arm, values in seconds.items()}
    out["memory_gb"] = {arm: run_self(alone[0], [*map(str, alone[1:]), "--arm", arm])["gb"] for arm in ARMS}
    out["faster"] = statistics.median(a / b for a, b in zip(seconds["padded"], seconds["dropped"], strict=True))
    rows = [[arm, out["seconds"][arm], out["memory_gb"][arm], losses[arm]] for arm in ARMS]
    print_table(f"{args.model} at {args.size}, batch {args.batch}, 4:3", ["", "s/step", "peak GB", "first loss"], rows)
    print(f"{out['faster']:.2f} times faster (median of {args.rounds} pairs)")
    return out


def peak(args: argparse.Namespace) -> dict:
    """Peak memory of two steps of one arm."""
    import torch

    from training.engine.memory import peak_memory

    step = make_step(args, args.arm)
    for _ in range(2):
        step()
    return {"gb": peak_memory(torch.device(args.device)) / 1e9}


def program(module: str, *arguments: object) -> None:
    """A program of the project, in a process of its own."""
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], env=env, check=True)


def results_of(folder: Path) -> dict[str, float]:
    """The last accuracies of an experiment, in per cent."""
    record = json.loads((folder / "results.json").read_text())[-1]
    return {k: 100 * v for k, v in record.items() if k.endswith("macc1")}


def study(args: argparse.Namespace) -> dict:
    """Equal training with and without padding, and the accuracy of either."""
    out, data = Path(args.out), Path(args.out) / "data"
    train = data / "annotations" / "instances_train2017.json"
    claim_folder(out, {n: getattr(args, n) for n in ("train", "val", "pairs", "start_steps", "distil_steps", "start")})
    if not (out / "drawn").is_file():
        program(
            "training.scenes", "--out", data, "--train", args.train, "--val", args.val, "--pairs", args.pairs, "--size",
            128, "--pair-size", 64, "--things", 16, "--stuff", 6, "--pattern-names", "--min-object", 0.28,
            "--max-object", 0.5, "--max-objects", 4, "--min-aspect", 0.75, "--max-aspect", 0.75, "--seed", 0,
        )  # fmt: skip
        (out / "drawn").touch()
    machine = ["--device", args.device, "--precision", "fp32", "--workers", args.workers, "--logs", out]
    common = ["--model", MODEL, *machine, "--epochs", 9999, "--lr", 1e-3, "--wd", 0.1, "--save-frequency", 0]
    start = args.start or out / "start" / "checkpoints" / "clipself.pt"
    if not Path(start).is_file():
        program(
            "training.main", *common, "--dataset-type", "contrastive", "--name", "start", "--train-data",
            data / "annotations" / "captions_pairs.json", "--train-image-root", data / "pairs", "--batch-size", 64,
            "--max-steps", args.start_steps, "--warmup", max(args.start_steps // 10, 1), "--seed", 0,
        )  # fmt: skip
    evaluation = ["--val-data", data / "annotations" / "panoptic_val2017.json", "--val-image-root", data / "val2017",
                  "--det-image-size", 128]  # fmt: skip
    found: dict[str, dict] = {}
    for arm, flags in ARMS.items():
        runs = [("start", ["--train-data", ""])]
        runs += [(str(seed), [
            "--dataset-type", "grid_distill", "--lock-image", "--lock-image-unlocked-groups", 8, "--train-data", train,
            "--train-image-root", data / "train2017", "--batch-size", 8, "--max-steps", args.distil_steps, "--warmup",
            max(args.distil_steps // 6, 1), "--max-split", 4, "--max-boxes", 12, "--skip-first-eval",
            "--zeroshot-frequency", 0,
        ]) for seed in range(args.seeds)]  # fmt: skip
        found[arm] = {}
        for name, more in runs:
            folder = out / f"{arm}_{name}"
            if not (folder / "results.json").is_file():
                seed = 0 if name == "start" else name
                again = ["--resume", "latest"] if (folder / "checkpoints").exists() else []
                program(
                    "training.main", *common, *evaluation, *flags, *more, *again, "--pretrained", start, "--name",
                    folder.name, "--seed", seed,
                )  # fmt: skip
            found[arm][name] = results_of(folder)
    keys = [f"{p}.{k}.macc1" for p in ("rois", "maskpool") for k in ("thing", "stuff")]
    rows = []
    for arm, runs in found.items():
        rows.append([f"start model, {arm}", *(f"{runs['start'][k]:.1f}" for k in keys)])
        trained = [[r[k] for n, r in runs.items() if n != "start"] for k in keys]
        spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in trained]
        cells = (f"{statistics.mean(v):.1f} +- {s:.1f}" for v, s in zip(trained, spread, strict=True))
        rows.append([f"distilled, {arm}", *cells])
    print_table("top-1 mAcc (%) on 4:3 scenes", ["", "boxes things", "stuff", "masks things", "stuff"], rows)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure; the last line is the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("steps", "peak"):
        part = parts.add_parser(name)
        part.add_argument("--model", default="EVA02-CLIP-B-16")
        part.add_argument("--size", type=int, default=1024, help="side of the dense input")
        part.add_argument("--batch", type=int, default=1, help="images of a step")
        part.add_argument("--crops", type=int, default=20, help="regions of an image")
        part.add_argument("--rounds", type=int, default=3, help="pairs of steps")
        part.add_argument("--threads", type=int, default=1)
        part.add_argument("--arm", choices=tuple(ARMS), default="padded", help=argparse.SUPPRESS)
    part = parts.add_parser("study")
    part.add_argument("--out", required=True, help="folder of the study")
    part.add_argument("--start", default="", help="weights of the tiny CLIP; trained here by default")
    for name, value in (("train", 2000), ("val", 150), ("pairs", 3000), ("start-steps", 480), ("distil-steps", 320),
                        ("seeds", 3), ("workers", 1)):  # fmt: skip
        part.add_argument(f"--{name}", type=int, default=value)
    for part in parts.choices.values():
        part.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(argv)
    print(json.dumps({"steps": steps, "peak": peak, "study": study}[args.part](args)))


if __name__ == "__main__":
    main()
