"""Tables of the study: python study_report.py FOLDER --seeds 0 1 --shots 1 3 10 0."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

MODES = {"full": "full", "linear_prob": "linear probe", "language_prompt_v2": "prompt"}
TOWERS = {"trained": "the quick start's text tower", "untrained": "random, untrained", "scratch": "random at first"}
KINDS = {"seen": "pairs seen in training", "unseen": "pairs held out", "unknown": "held out, unknown to the towers too"}


def read(path: Path) -> dict[str, float]:
    return json.loads(path.read_text())


def percent(values: list[float]) -> str:
    """Mean, and each value where there are several."""
    shown = f"{100 * mean(values):.1f}"
    return shown if len(values) == 1 else f"{shown} ({', '.join(f'{100 * v:.1f}' for v in values)})"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)


def grounding(folder: Path, seeds: list[int]) -> str:
    chance = json.loads((folder / "a" / "glip" / "chance.json").read_text())["chance"]
    results = {
        name: {
            part: [read(folder / f"{name}_{s}" / part / "metrics.json") for s in seeds] for part in ("phrases", "names")
        }
        for name in TOWERS
    }
    rows = []
    for kind, label in KINDS.items():
        if kind in chance:
            cells = [percent([m[f"R@1 {kind}"] for m in results[n]["phrases"]]) for n in TOWERS]
            rows.append([f"recall@1, {label}", *cells, f"{100 * chance[kind]:.1f}"])
    for key, label in (("AP50_base", "AP50, names seen"), ("AP50_novel", "AP50, names held out")):
        cells = [percent([m[key] for m in results[n]["names"]]) for n in TOWERS]
        rows.append([label, *cells, "-"])
    return table(["", *TOWERS.values(), "chance"], rows)


def tuning(folder: Path, seeds: list[int], shots: list[int]) -> str:
    zero = [read(folder / f"trained_{s}" / "domain_b" / "metrics.json")["AP50"] for s in seeds]
    rows = [["none (zero shot)", percent(zero), *["" for _ in shots[1:]]]]
    for mode, label in MODES.items():
        cells = []
        for shot in shots:
            files = [folder / f"tune_{mode}_{shot}_{s}" / "test" / "metrics.json" for s in seeds]
            cells.append(percent([read(f)["AP50"] for f in files]))
        rows.append([label, *cells])
    return table(["AP50 on domain B", *(f"{s} shots" if s else "all data" for s in shots)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--shots", type=int, nargs="+", required=True)
    args = parser.parse_args()
    text = f"{grounding(args.folder, args.seeds)}\n\n{tuning(args.folder, args.seeds, args.shots)}\n"
    (args.folder / "result.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
