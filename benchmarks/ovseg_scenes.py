"""Dense labels on generated scenes: every reading of a start model and of the one distilled from it, and MaskCLIP+.

    python benchmarks/ovseg_scenes.py --out logs/ovseg_scenes         three seeds, students too: about 3 hours, 2 cores
    python benchmarks/ovseg_scenes.py --out logs/ovseg_scenes --no-students     readings alone: an hour on 2 CPU cores
    python benchmarks/ovseg_scenes.py --out logs/smoke --smoke           that everything runs

For each seed the quick start's tiny CLIP is trained and distilled with CLIPSelf, both are scored with all readings and
refinements on the validation scenes, and two students are trained on dense labels of the distilled model: one without
annotations, one with those of the seen classes. The tables show means over the seeds and, after the sign, their
standard deviation. A study that was cut short goes on where it was: finished stages are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import Clock, print_table  # noqa: E402
from program_runs import claim_folder  # noqa: E402

MODEL = "ViT-Ti-8-64"
READOUTS = ["value", "value_bare", "vanilla", "sclip", "sclip_bare", "clearclip", "clearclip_full", "kk_bare", "naclip"]
REFINEMENTS = ["none", "pd", "ks", "pdks"]
SETTINGS = ("annotation-free", "zero-shot")  # of the students
UNSEEN_EVERY = 5  # of the classes in label order, each fifth is unseen
SIZE = 128  # pixels of a scene


class Study:
    """A folder of stages.

    Args:
        args: the program's arguments.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.out)
        self.data = self.out / "data"
        self.machine = ["--device", args.device] if args.device else []

    def stage(self, name: str, action: Callable[[], None]) -> None:
        """Carry out a stage unless it is finished."""
        mark = self.out / "stages" / name
        if mark.is_file():
            return
        print(f"== {name}", flush=True)
        clock = Clock()
        action()
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(f"{clock():.0f} s\n")

    def run(self, module: str, *arguments: object) -> None:
        """A program of the project, in a process of its own."""
        path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", module, *map(str, arguments)]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True)

    # -- stages -------------------------------------------------------------------------------------------------------

    def generate(self) -> None:
        """The scenes of the quick start."""
        args = self.args
        self.run(
            "training.scenes", "--out", self.data, "--train", args.train, "--val", args.val, "--pairs", args.pairs,
            "--size", SIZE, "--pair-size", 64, "--things", 16, "--stuff", 6, "--pattern-names", "--min-object", 0.28,
            "--max-object", 0.5, "--max-objects", 4, "--seed", 0, "--workers", 2,
        )  # fmt: skip

    def _train(self, seed: int, name: str, *arguments: object) -> None:
        self.run(
            "training.main", "--model", MODEL, "--name", name, "--logs", self.folder(seed), "--seed", seed,
            "--precision", "fp32", "--workers", self.args.workers, "--epochs", 10**4, "--wd", 0.1, "--lr", 1e-3,
            "--save-frequency", 0, "--zeroshot-frequency", 0, *self._resume(self.folder(seed) / name), *self.machine,
            *arguments,
        )  # fmt: skip

    @staticmethod
    def _resume(folder: Path) -> list[str]:
        return ["--resume", "latest"] if folder.exists() else []

    def start(self, seed: int) -> None:
        """A tiny CLIP on image-text pairs."""
        self._train(
            seed, "start", "--dataset-type", "contrastive", "--train-data",
            self.data / "annotations" / "captions_pairs.json", "--train-image-root", self.data / "pairs",
            "--batch-size", self.args.start_batch, "--max-steps", self.args.start_steps,
            "--warmup", self.args.start_steps // 10,
        )  # fmt: skip

    def distil(self, seed: int) -> None:
        """CLIPSelf on image patches."""
        self._train(
            seed, "clipself", "--pretrained", self.weights(seed, "start"), "--dataset-type", "grid_distill",
            "--lock-image", "--lock-image-unlocked-groups", 8, "--train-data",
            self.data / "annotations" / "instances_train2017.json", "--train-image-root", self.data / "train2017",
            "--batch-size", 8, "--max-steps", self.args.distil_steps, "--warmup", self.args.distil_steps // 6,
            "--max-split", 4, "--max-boxes", 12, "--alpha", 1.0, "--det-image-size", SIZE,
        )  # fmt: skip

    def score(self, seed: int, name: str, readouts: Sequence[str], refinements: Sequence[str], output: str) -> None:
        """Readings and refinements on the validation scenes."""
        self.run(
            "ovseg.evaluate", "--model", MODEL, "--pretrained", self.weights(seed, name), "--dataset", "panoptic",
            "--data-root", self.data, "--short-side", SIZE, "--readouts", *readouts, "--refine", *refinements,
            "--workers", self.args.workers, "--output", self.folder(seed) / output, *self.machine,
        )  # fmt: skip

    def score_readings(self, seed: int, name: str) -> None:
        """All of them."""
        self.score(seed, name, READOUTS, REFINEMENTS, f"scores-{name}")

    def score_labels(self, seed: int) -> None:
        """The distilled model's value reading, whose labels the students learn from."""
        self.score(seed, "clipself", ["value"], ["none"], "scores-labels")

    def student(self, seed: int, setting: str) -> None:
        """MaskCLIP+ on dense labels of the distilled model."""
        name = f"student-{setting}"
        extra = []
        if setting == "zero-shot":
            extra = ["--unseen", *self.unseen(), "--guided", self.args.student_guided]
        self.run(
            "ovseg.maskclip_plus", "--model", MODEL, "--pretrained", self.weights(seed, "clipself"),
            "--setting", setting, "--dataset", "panoptic", "--data-root", self.data, "--split", "train",
            "--val-split", "val",
            "--steps", self.args.student_steps, "--batch-size", self.args.student_batch, "--crop", self.args.crop,
            "--short-side", self.args.student_side, "--backbone", self.args.backbone, "--lr", self.args.student_lr,
            "--templates", "project", "--logs", self.folder(seed), "--name", name,
            "--seed", seed, "--workers", self.args.workers, *extra, *self._resume(self.folder(seed) / name),
            *self.machine,
        )  # fmt: skip

    # -- results ------------------------------------------------------------------------------------------------------

    def folder(self, seed: int) -> Path:
        """Of a seed's runs."""
        return self.out / f"seed{seed}"

    def weights(self, seed: int, name: str) -> Path:
        """Released weights of a run."""
        return self.folder(seed) / name / "checkpoints" / "clipself.pt"

    def names(self) -> list[str]:
        """Classes in label order."""
        content = json.loads((self.data / "annotations" / "panoptic_val2017.json").read_text())
        return [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]

    def unseen(self) -> list[str]:
        """Every fifth class."""
        return self.names()[UNSEEN_EVERY - 1 :: UNSEEN_EVERY]

    def scores(self, seed: int, name: str) -> dict[str, dict]:
        """Results of :meth:`score` by reading and refinement; ``name`` is a model, or labels."""
        return json.loads((self.folder(seed) / f"scores-{name}" / "results.json").read_text())["results"]

    def student_scores(self, seed: int, setting: str) -> dict:
        """The last record of a student."""
        return json.loads((self.folder(seed) / f"student-{setting}" / "results.json").read_text())[-1]


def mean_iou(record: dict, names: Sequence[str]) -> float:
    """Mean IoU over some classes of a record, those that are 0/0 left out; NaN where all are."""
    values = [c["IoU"] for c in record["per_class"] if c["class"] in names and c["IoU"] is not None]
    return statistics.fmean(values) if values else math.nan


def over_seeds(values: Sequence[float]) -> str:
    """Mean and standard deviation in per cent."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.fmean(values):.1f} ± {100 * spread:.1f}"


def report_readings(study: Study, seeds: Sequence[int]) -> dict[str, list[float]]:
    """Print the table of readings; its numbers by model, reading and refinement."""
    scores = {name: [study.scores(seed, name) for seed in seeds] for name in ("start", "clipself")}
    rows, numbers = [], {}
    for readout in READOUTS:
        row = [readout]
        for name in ("start", "clipself"):
            for refinement in REFINEMENTS:
                key = readout if refinement == "none" else f"{readout}+{refinement}"
                values = [s[key]["mIoU"] for s in scores[name]]
                numbers[f"{name} {key}"] = values
                row.append(over_seeds(values))
        rows.append(row)
    header = ["reading", *(f"{n} {r}" for n in ("start", "distilled") for r in REFINEMENTS)]
    print_table(f"mIoU (%) on {study.args.val} scenes, {len(seeds)} seeds", header, rows)
    return numbers


def report_students(study: Study, seeds: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """Print the table of students; its numbers by row and group of classes."""
    every, unseen = study.names(), study.unseen()
    seen = [name for name in every if name not in unseen]
    rows = {
        "pseudo labels (distilled, value)": [study.scores(seed, "labels")["value"] for seed in seeds],
        **{f"MaskCLIP+, {of}": [study.student_scores(seed, of) for seed in seeds] for of in SETTINGS},
    }
    lines, numbers = [], {}
    for label, records in rows.items():
        columns = [[mean_iou(r, names) for r in records] for names in (every, seen, unseen)]
        numbers[label] = dict(zip(("all", "seen", "unseen"), columns, strict=True))
        lines.append([label, *(over_seeds(c) for c in columns)])
    title = f"Students, mIoU (%) on {study.args.val} scenes, {len(seeds)} seeds"
    print_table(title, ["", "all classes", "seen", "unseen"], lines)
    return numbers


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is left of the study, print the tables, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", required=True, help="folder of the study")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--smoke", action="store_true", help="a handful of scenes and steps")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--no-students", action="store_true", help="readings only, without MaskCLIP+")
    parts.add_argument("--no-readings", action="store_true", help="MaskCLIP+ only")
    add("--train", type=int, default=2000, help="training scenes")
    add("--val", type=int, default=150, help="validation scenes")
    add("--pairs", type=int, default=3000, help="image-text pairs")
    add("--start-steps", type=int, default=480)
    add("--start-batch", type=int, default=64)
    add("--distil-steps", type=int, default=320)
    add("--student-steps", type=int, default=1000)
    add("--student-batch", type=int, default=16)
    add("--student-lr", type=float, default=0.05)
    add("--student-guided", type=float, default=0.5, help="share of steps before a zero-shot student teaches itself")
    add("--student-side", type=int, default=SIZE, help="pixels that a scene has for the student")
    add("--crop", type=int, default=SIZE, help="side of a student's training sample")
    add("--backbone", default="lraspp_mobilenet_v3_large", help="of the student")
    add("--workers", type=int, default=1)
    add("--device", default="", choices=("", "cpu", "cuda"))
    args = parser.parse_args(argv)
    if args.smoke:
        small = {"train": 16, "val": 6, "pairs": 32, "start_steps": 4, "start_batch": 16, "distil_steps": 6,
                 "student_steps": 3, "student_batch": 2, "crop": 64, "workers": 0}  # fmt: skip
        for name, value in small.items():
            setattr(args, name, value)
        args.seeds = args.seeds[:1]
    free = ("out", "seeds", "smoke", "no_students", "no_readings", "workers", "device")  # may differ from run to run
    claim_folder(Path(args.out), {n: v for n, v in vars(args).items() if n not in free})
    study = Study(args)
    study.stage("data", study.generate)
    for seed in args.seeds:
        study.stage(f"start-{seed}", lambda s=seed: study.start(s))
        study.stage(f"distil-{seed}", lambda s=seed: study.distil(s))
        if not args.no_readings:
            for name in ("start", "clipself"):
                study.stage(f"score-{name}-{seed}", lambda s=seed, n=name: study.score_readings(s, n))
        if not args.no_students:
            study.stage(f"score-labels-{seed}", lambda s=seed: study.score_labels(s))
            for setting in SETTINGS:
                study.stage(f"student-{setting}-{seed}", lambda s=seed, k=setting: study.student(s, k))
    numbers = {"seeds": args.seeds}
    if not args.no_readings:
        numbers["readings"] = report_readings(study, args.seeds)
    if not args.no_students:
        numbers["students"] = report_students(study, args.seeds)
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
