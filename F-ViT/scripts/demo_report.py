"""The table of the demonstration: AP50 of the two detectors on novel, base and all classes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

ROWS = {"start": "start model", "clipself": "CLIPSelf model"}
COLUMNS = {"AP50_novel": "AP50 novel", "AP50_base": "AP50 base", "AP50": "AP50 all"}


def table(metrics: dict[str, dict[str, float]]) -> str:
    """A markdown table in percent from ``{row: {metric: 0..1}}``."""
    lines = [f"| detector on | {' | '.join(COLUMNS.values())} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    for key, title in ROWS.items():
        lines.append(f"| {title} | {' | '.join(f'{100 * metrics[key][c]:.1f}' for c in COLUMNS)} |")
    return "\n".join(lines)


def main() -> None:
    """Read both metrics.json, print the table and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    for key, title in ROWS.items():
        parser.add_argument(f"--{key}", type=Path, required=True, help=f"work dir of the detector on the {title}")
    parser.add_argument("--out", type=Path, required=True, help="markdown file to write")
    args = parser.parse_args()
    metrics = {
        key: json.loads((getattr(args, key) / "test" / "metrics.json").read_text(encoding="utf-8"))["bbox"]
        for key in ROWS
    }
    text = table(metrics)
    args.out.write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n")


if __name__ == "__main__":
    main()
