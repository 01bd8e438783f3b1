"""Train and test the detectors of the demonstration, and print their table.

Runs whose result is there are not repeated, so that an interrupted demonstration goes on. demo.sh calls this.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
COLUMNS = {"AP50_novel": "AP50 novel", "AP50_base": "AP50 base", "AP50": "AP50 all"}


@dataclass(frozen=True)
class Row:
    """A row of the table; see demo_rows.toml."""

    name: str
    title: str
    weights: str = "clipself"
    seeds: Sequence[int] = (0,)
    values: Sequence[str] = ()
    of: str = ""


@dataclass(frozen=True)
class Setting:
    """What all runs share: weights by name, data values, where results go, and how runs are shortened."""

    weights: Mapping[str, str]
    values: Sequence[str]
    out: Path
    environment: Mapping[str, str] = field(default_factory=dict)


def read_rows(path: Path, *, full: bool, only: Sequence[str] | None = None) -> list[Row]:
    """Rows of the file; without ``full`` those in ``only``, or else those of several seeds, with their first seed."""
    rows = [Row(name=name, **entry) for name, entry in tomllib.loads(path.read_text(encoding="utf-8")).items()]
    if full:
        return rows
    chosen = [row for row in rows if (row.name in only if only else len(row.seeds) > 1)]
    return [Row(**{**row.__dict__, "seeds": row.seeds[:1]}) for row in chosen]


def metrics_file(setting: Setting, row: Row, seed: int) -> Path:
    """Where a run's result is."""
    return setting.out / f"{row.name}_{seed}" / "test" / "metrics.json"


def run(setting: Setting, row: Row, seed: int) -> None:
    """Train (where the row trains) and test one detector. RuntimeError where a program fails."""
    result = metrics_file(setting, row, seed)
    if result.is_file():
        return
    folder = result.parents[1]
    folder.mkdir(parents=True, exist_ok=True)
    trained = setting.out / f"{row.of or row.name}_{seed}"
    values = [f"model.pretrained={setting.weights[row.weights]}", f"train.seed={seed}", *setting.values, *row.values]
    config = str(HERE / "demo.toml")
    commands = [[str(HERE.parent / "train.py"), config, "--work-dir", str(folder), "--resume", "--device", "cpu"]]
    test = [str(HERE.parent / "test.py"), config, str(trained / "latest.pt"), "--out", str(result.parent)]
    commands = ([] if row.of else commands) + [[*test, "--device", "cpu"]]
    with open(folder / "run.log", "w", encoding="utf-8") as log:
        for command in commands:
            done = subprocess.run(
                [sys.executable, *command, *values], stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, **setting.environment},
            )  # fmt: skip
            if done.returncode:
                last = (folder / "run.log").read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
                raise RuntimeError("\n".join([f"{row.title}, seed {seed} failed:", *last]))


def table(results: Mapping[str, Mapping[int, Mapping[str, float]]], rows: Sequence[Row]) -> str:
    """A markdown table in percent: means over seeds, with the standard deviation where there are several.

    A row of our own choices, which has fewer seeds than the row it varies, shows its difference to that row on the same
    seeds in brackets.

    Args:
        results: metrics by row and seed.
    """
    lines = [f"| detector on | {' | '.join(COLUMNS.values())} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    for row in rows:
        # The rows of the two models are named like their weights.
        cells, base = [], {} if row.name == row.weights else results.get(row.weights, {})
        for column in COLUMNS:
            values = [100 * one[column] for one in results[row.name].values()]
            text = f"{statistics.mean(values):.1f}"
            text += f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            paired = [100 * (one[column] - base[s][column]) for s, one in results[row.name].items() if s in base]
            cells.append(text + (f" ({statistics.mean(paired):+.1f})" if paired else ""))
        lines.append(f"| {row.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("values", nargs="*", help="config values of all runs: section.key=value")
    parser.add_argument("--start", required=True, help="weights of the start model")
    parser.add_argument("--clipself", required=True, help="weights of the CLIPSelf model")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of result.md")
    parser.add_argument("--rows", type=Path, default=HERE / "demo_rows.toml", help="which rows there are")
    parser.add_argument("--full", action="store_true", help="all rows, with all seeds")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows, with their first seed")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run")
    args = parser.parse_intermixed_args()
    rows = read_rows(args.rows, full=args.full, only=args.only)
    setting = Setting(
        weights={"start": args.start, "clipself": args.clipself}, values=args.values, out=args.out,
        environment={"OMP_NUM_THREADS": str(args.threads)},
    )  # fmt: skip
    runs = [(row, seed) for row in rows for seed in row.seeds]
    # Rows that only test wait for those that train.
    with tqdm(total=len(runs), unit="run", desc="demonstration", dynamic_ncols=True) as bar:
        for wave in ([r for r in runs if not r[0].of], [r for r in runs if r[0].of]):
            with ThreadPoolExecutor(args.jobs) as pool:
                for _ in pool.map(lambda one: run(setting, *one), wave):
                    bar.update(1)
    results = {
        row.name: {seed: json.loads(metrics_file(setting, row, seed).read_text())["bbox"] for seed in row.seeds}
        for row in rows
    }
    text = table(results, rows)
    (args.out / "result.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n")


if __name__ == "__main__":
    main()
