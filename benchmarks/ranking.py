"""Numbers, tables and pictures of a ranking of methods: paired differences over seeds, and how sure they are.

    python benchmarks/ranking.py benchmarks/ranking.json            # its table, against CLIPSelf
    python benchmarks/ranking.py ranking/results.json --base denserc --metrics "128 masks things" "128 masks stuff"
    python benchmarks/ranking.py ranking/results.json --metrics "128 boxes" masks       # means of things and stuff
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent)]
from ranking_rows import BASE, METHODS, row_name  # noqa: E402

KINDS = {"rois": "boxes", "maskpool": "masks"}
WHAT = {"thing": "things", "stuff": "stuff"}
Scores = dict[str, float]  # metric -> per cent


def metrics(sizes: Sequence[int]) -> list[str]:
    """Names of what is ranked: "128 boxes things", ..., and things of classes that training never showed.

    The last two, of crops embedded as images, are what the model that all begin from can teach.
    """
    names = [f"{s} {kind} {what}" for s in sizes for kind in KINDS.values() for what in WHAT.values()]
    return names + [f"{s} {kind} unseen" for s in sizes for kind in KINDS.values()] + ["crops things", "crops stuff"]


def scores_of(folder: Path, sizes: Sequence[int], unseen: Sequence[str]) -> Scores | None:
    """Top-1 mean accuracies of a run's last evaluation, in per cent; None while there is none.

    Args:
        folder: of the run, with results.json and per_class_*.json.
        unseen: names of the classes whose objects were never in a training image.
    """
    try:
        record = json.loads((folder / "results.json").read_text())[-1]
        classes = json.loads((folder / f"per_class_{record['kind']}_{record['step']}.json").read_text())
    except (OSError, ValueError, IndexError):
        return None
    found: Scores = {f"crops {n}": 100 * record.get(f"crops.{w}.macc1", math.nan) for w, n in WHAT.items()}
    for size in sizes:
        for key, kind in KINDS.items():
            name = f"{size}.{key}" if len(sizes) > 1 else key
            for what, plural in WHAT.items():
                found[f"{size} {kind} {plural}"] = 100 * record.get(f"{name}.{what}.macc1", math.nan)
            right = [c["top1"] for c in classes[name] if c["kind"] == "thing" and c["class"] in unseen]
            found[f"{size} {kind} unseen"] = 100 * float(np.mean(right)) if right else math.nan
    return found


def value(scores: Scores, metric: str) -> float:
    """A score by its name; of a part of names, such as "128 boxes" or "masks", the mean of its things and stuff.

    Raises:
        KeyError: there is none.
    """
    if metric in scores:
        return scores[metric]
    words = set(metric.split())
    parts = [v for n, v in scores.items() if words < set(n.split()) and n.split()[-1] in WHAT.values()]
    if not parts:
        raise KeyError(metric)
    return float(np.mean(parts))


def summary(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard error of the mean)."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def usable(record: Mapping[str, Any], start: str, rows: Iterable[str]) -> tuple[dict[str, Scores], dict[int, str]]:
    """What of another ranking by the same plan can stand beside runs from a start model.

    Differences are paired within a seed, so a seed's runs must have one start model; the choice of rates may have
    another.

    Args:
        record: of its results.json.
        start: fingerprint of the start model.
        rows: the rows that are ranked.

    Returns:
        (scores by name of run, the other start model of each whole seed from there).
    """
    scores, theirs = record["scores"], record["key"].get("start")
    starts = {int(s): found for s, found in record.get("starts", {}).items()}
    seeds = {int(e) for n in scores if not n.startswith("untrained") and (e := n.rpartition("-")[2]).isdigit()}
    foreign = {s: starts.get(s, theirs) for s in seeds if starts.get(s, theirs) != start}
    whole = {s: f for s, f in foreign.items() if all(f"{row_name(row)}-{s}" in scores for row in rows)}

    def fits(name: str) -> bool:
        end = name.rpartition("-")[2]
        if end.startswith("lr"):
            return True
        if name.startswith("untrained") or not end.isdigit():
            return theirs == start
        return int(end) in whole or int(end) not in foreign

    return {name: found for name, found in scores.items() if fits(name)}, whole


def compare(runs: Mapping[int, Scores], base: Mapping[int, Scores], metric: str) -> tuple[float, float, int, int]:
    """(mean difference to the base over the seeds both have, its standard error, wins, seeds)."""
    seeds = sorted(set(runs) & set(base))
    differences = [value(runs[s], metric) - value(base[s], metric) for s in seeds]
    if not differences:
        return math.nan, math.nan, 0, 0
    return *summary(differences), sum(d > 0 for d in differences), len(seeds)


def table(
    runs: Mapping[str, Mapping[int, Scores]], untrained: Mapping[str, Scores], names: Sequence[str], base: str,
    rates: Mapping[str, float],
) -> str:  # fmt: skip
    """Markdown: means over seeds; in brackets the paired difference to the base, its standard error, and wins."""
    lines = ["| row | lr | seeds | " + " | ".join(names) + " |", "|---|---|---|" + "---|" * len(names)]
    for row, scores in untrained.items():
        cells = " | ".join(f"{value(scores, n):.1f}" for n in names)
        lines.append(f"| untrained, `{row}` | | | {cells} |")
    for row, seeds in runs.items():
        if not seeds:
            continue
        cells = [f"{summary([value(s, n) for s in seeds.values()])[0]:.1f}" for n in names]
        if row != base and runs.get(base):
            found = [compare(seeds, runs[base], n) for n in names]
            cells = [f"{c} ({m:+.1f} ± {e:.1f}, {w}/{k})" for c, (m, e, w, k) in zip(cells, found, strict=True)]
        lines.append(f"| **{row}** | {rates.get(row, math.nan):g} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def runs_of(scores: Mapping[str, Scores], rows: Iterable[str] = METHODS) -> dict[str, dict[int, Scores]]:
    """Rows' scores by seed, out of scores by the name of the run."""
    runs: dict[str, dict[int, Scores]] = {row: {} for row in rows}
    for row in runs:
        for name, found in scores.items():
            start, _, end = name.rpartition("-")
            if start == row_name(row) and end.isdigit():
                runs[row][int(end)] = found
    return {row: dict(sorted(seeds.items())) for row, seeds in runs.items()}


def picture(runs: Mapping[str, Mapping[int, Scores]], names: Sequence[str], base: str, out: Path) -> None:
    """Paired differences to the base with two standard errors, one panel for each metric."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in runs if r != base and runs[r] and runs.get(base)]
    if not rows:
        return
    columns = min(len(names), 4)
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.2 * columns, 0.5 + lines * (0.8 + 0.28 * len(rows))),
                                sharey=True, squeeze=False)  # fmt: skip
    for axis, name in zip(axes.flat, names, strict=False):
        points = [compare(runs[row], runs[base], name) for row in rows]
        axis.axvline(0, color="0.7", linewidth=1)
        axis.errorbar([p[0] for p in points], range(len(rows)), xerr=[2 * p[1] for p in points], fmt="o", capsize=3)
        axis.set_title(name, fontsize=9)
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        axis.invert_yaxis() if axis is axes.flat[0] else None
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    figure.supxlabel(f"difference to {base}, % points; bars: two standard errors over seeds", fontsize=9)
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of a ranking")
    parser.add_argument("--base", choices=tuple(METHODS), default=BASE, metavar="ROW", help="row to compare with")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="columns (all), or parts of their names: means")
    args = parser.parse_args(argv)
    record = json.loads(args.results.read_text())
    some = next(iter(record["scores"].values()))
    for name in args.metrics or []:
        try:
            value(some, name)
        except KeyError:
            names = ", ".join(map(repr, some))
            raise SystemExit(f"error: --metrics {name!r} is not in {args.results}: {names}") from None
    untrained = {name.partition("-")[2]: s for name, s in record["scores"].items() if name.startswith("untrained-")}
    print(table(runs_of(record["scores"]), untrained, args.metrics or list(some), args.base, record.get("rates", {})))


if __name__ == "__main__":
    main()
