"""Tables and pictures of the study; study.sh calls this.

    python study_report.py table FOLDER --seeds 0 1        result.md and result.json
    python study_report.py enlarge FOLDER                  some validation images, four times as large, to draw on
    python study_report.py sheet PICTURES FILE             pictures of a folder side by side
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image

ROWS = {
    "text": "ViLD-text", "image": "ViLD-image", "vild": "ViLD", "ensemble": "ViLD-ensemble",
    "clip": "CLIP on proposals", "clip-objectness": "CLIP on proposals, with objectness",
}  # fmt: skip
COLUMNS = {"AP50_novel": "novel", "AP50_base": "base", "AP50": "all"}
SHOWN = 6  # pictures
SCALE = 4


def results_of(folder: Path, seeds: list[int]) -> dict[str, Any]:
    """AP50 of each row and recall of the proposals, a list over the seeds each."""
    detectors: dict[str, dict[str, list[float]]] = {}
    recall: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        own = folder / f"seed_{seed}"
        for row in ROWS:
            values = json.loads((own / row / "test" / "metrics.json").read_text())["bbox"]
            for key in COLUMNS:
                detectors.setdefault(row, {}).setdefault(key, []).append(values[key])
        for group, values in json.loads((own / "proposals_val" / "recall.json").read_text()).items():
            for key, value in values.items():
                recall.setdefault(group, {}).setdefault(key, []).append(value)
    return {"seeds": seeds, "detectors": detectors, "recall": recall}


def cell(values: list[float]) -> str:
    """Mean in percent and, of several, each."""
    each = [f"{100 * value:.1f}" for value in values]
    return each[0] if len(each) == 1 else f"{100 * mean(values):.1f} ({', '.join(each)})"


def write_table(args: argparse.Namespace) -> None:
    """Write and print result.md; write result.json."""
    found = results_of(args.folder, args.seeds)
    lines = [f"| AP50 | {' | '.join(COLUMNS.values())} |", "| --- |" + " --- |" * len(COLUMNS)]
    lines += [
        f"| {title} | {' | '.join(cell(found['detectors'][row][key]) for key in COLUMNS)} |"
        for row, title in ROWS.items()
    ]
    keys = list(next(iter(found["recall"].values())))
    lines += ["", f"| recall of proposals | {' | '.join(keys)} |", "| --- |" + " --- |" * len(keys)]
    lines += [
        f"| {group} | {' | '.join(cell(values[key]) for key in keys)} |" for group, values in found["recall"].items()
    ]
    text = "\n".join(lines) + "\n"
    (args.folder / "result.md").write_text(text, encoding="utf-8")
    (args.folder / "result.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(text)


def enlarge(args: argparse.Namespace) -> None:
    """The validation images with the most novel objects, for pictures that one can read."""
    annotations = args.folder / "data" / "annotations"
    content = json.loads((annotations / "instances_val2017.json").read_text())
    novel = set(json.loads((annotations / "split.json").read_text())["novel"])
    ids = {c["id"] for c in content["categories"] if c["name"] in novel}
    kinds: Counter[int] = Counter()
    for image, category in {(a["image_id"], a["category_id"]) for a in content["annotations"]}:
        kinds[image] += 10 * (category in ids) + 1
    chosen = [image for image, _ in sorted(kinds.items(), key=lambda entry: (-entry[1], entry[0]))[:SHOWN]]
    target = args.folder / "enlarged"
    target.mkdir(exist_ok=True)
    for entry in content["images"]:
        if entry["id"] in chosen:
            picture = Image.open(args.folder / "data" / "val2017" / entry["file_name"])
            size = (SCALE * picture.width, SCALE * picture.height)
            picture.resize(size, Image.BICUBIC).save(target / f"{Path(entry['file_name']).stem}.png")


def sheet(args: argparse.Namespace) -> None:
    """Pictures in rows of three."""
    pictures = [Image.open(file) for file in sorted(args.pictures.iterdir())]
    columns, side, gap = 3, max(max(p.size) for p in pictures), 8
    rows = -(-len(pictures) // columns)
    whole = Image.new("RGB", (columns * (side + gap), rows * (side + gap)), "white")
    for i, picture in enumerate(pictures):
        whole.paste(picture, (i % columns * (side + gap), i // columns * (side + gap)))
    whole.save(args.file)


def main() -> None:
    """Parse the command line and run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("table")
    part.add_argument("folder", type=Path)
    part.add_argument("--seeds", type=int, nargs="+", required=True)
    part.set_defaults(run=write_table)
    part = parts.add_parser("enlarge")
    part.add_argument("folder", type=Path)
    part.set_defaults(run=enlarge)
    part = parts.add_parser("sheet")
    part.add_argument("pictures", type=Path)
    part.add_argument("file", type=Path)
    part.set_defaults(run=sheet)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
