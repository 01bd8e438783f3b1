"""What the quick start reached: a table of accuracies before and after CLIPSelf, and a picture.

The picture holds the loss of both trainings, the mean accuracies as bars, and for some scenes the image, its true
classes, and the dense class map of the start model and of the distilled one.

    python tools/quickstart_report.py --start quickstart/logs/start --distilled quickstart/logs/clipself \\
        --data quickstart/data --output quickstart/report.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from open_clip import create_model, get_tokenizer
from ovseg.classes import ClassList
from ovseg.protocols import Protocol
from ovseg.segment import segment
from training.engine.data.images import read_image
from training.engine.errors import UserError, as_user_error, reason_of, run_program
from training.engine.flags import Parser
from training.engine.pictures import distinct_colours

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend without a screen)

KINDS = {"rois": "boxes", "maskpool": "masks", "crops": "crops"}


def read_results(folder: Path) -> tuple[dict, dict]:
    """First and last record of an experiment's results.json: before training and after it.

    Raises:
        UserError: missing, or without the two evaluations.
    """
    path = folder / "results.json"
    try:
        records = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no results to read ({reason_of(error)}); run scripts/quickstart.sh") from None
    if len(records) < 2 or records[0]["step"] != 0:
        raise UserError(f"{path}: it needs an evaluation before and one after training; run scripts/quickstart.sh")
    return records[0], records[-1]


def read_loss(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses that an experiment logged to TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    points = events.Scalars("train/loss") if "train/loss" in events.Tags()["scalars"] else []
    return np.array([p.step for p in points]), np.array([p.value for p in points])


def accuracies(record: dict) -> dict[tuple[str, str], float]:
    """(kind, thing or stuff) -> top-1 mean accuracy in per cent; with several input sizes, the first."""
    out: dict[tuple[str, str], float] = {}
    for key, value in record.items():
        parts = key.split(".")
        if parts[-1] == "macc1" and (parts[-3], parts[-2]) not in out:
            out[parts[-3], parts[-2]] = 100 * value
    return out


def table(before: dict, after: dict) -> str:
    """The comparison, and the two statements that the quick start is judged by."""
    lines = [f"{'top-1 mean accuracy (%)':<30}{'before':>10}{'after':>10}"]
    for group in ("thing", "stuff"):
        for kind, title in KINDS.items():
            if (kind, group) in before:
                name = f"{title}, {group}s" if group == "thing" else f"{title}, stuff"
                lines.append(f"{name:<30}{before[kind, group]:>10.1f}{after[kind, group]:>10.1f}")
    start, end, crops = before["rois", "thing"], after["rois", "thing"], before["crops", "thing"]
    ratio = f"{end / start:.1f} times" if start > 0 else "from nothing to"
    lines.append("")
    lines.append(
        f"Boxes of things: {ratio} the start model's accuracy, {end / max(crops, 1e-9):.0%} of the teacher's on crops."
    )
    lines.append("Crops are read through the class token: before, that is the teacher; distillation does not train it.")
    return "\n".join(lines)


def true_classes(data: Path, record: dict, ids: list[int]) -> np.ndarray:
    """Label of every pixel ``[H, W]`` of an annotated image, from its panoptic PNG."""
    from PIL import Image

    folder = data / "annotations" / "panoptic_val2017"
    rgb = np.asarray(Image.open(folder / record["file_name"]).convert("RGB")).astype(np.int64)
    segment = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
    out = np.zeros(segment.shape, np.int64)
    for s in record["segments_info"]:
        out[segment == s["id"]] = ids.index(s["category_id"])
    return out


def choose_scenes(panoptic: dict, count: int) -> list[dict]:
    """The first annotated images that show at least two things and two stuff regions, else the first ones."""
    things = {c["id"] for c in panoptic["categories"] if c["isthing"]}

    def rich(record: dict) -> bool:
        number = sum(s["category_id"] in things for s in record["segments_info"])
        return number >= 2 and len(record["segments_info"]) - number >= 2

    records = panoptic["annotations"]
    return sorted(records, key=lambda r: not rich(r))[:count]  # the sort is stable


def maps_of(model_name: str, weights: Path, images: list[Tensor], names: list[str], size: int) -> list[Tensor]:
    """Dense class map of each image under the weights of one checkpoint."""
    model = create_model(model_name, str(weights)).eval()
    classes = ClassList(tuple(names), tuple((name,) for name in names))
    protocol, tokenizer = Protocol(long_side=size, short_side=size), get_tokenizer(model_name)
    return [segment(image, model, classes, tokenizer=tokenizer, protocol=protocol).labels for image in images]


def draw(losses: dict, before: dict, after: dict, rows: list[list[np.ndarray]], names: list[str]):
    """The figure: curves and bars on top, a row per scene below."""
    figure = plt.figure(figsize=(14, 4.2 + 2.9 * len(rows)), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[4.2, 2.9 * max(1, len(rows))])
    axes = top.subplots(1, 3, width_ratios=[1, 1, 1.5])
    for axis, (title, (steps, values)) in zip(axes, losses.items(), strict=False):
        axis.plot(steps, values, color="tab:blue")
        axis.set(title=title, xlabel="step", ylabel="loss")
        axis.grid(alpha=0.3)
    keys = [(k, g) for g in ("thing", "stuff") for k in KINDS if (k, g) in before]
    x = np.arange(len(keys))
    for offset, values, label, color in (
        (-0.2, before, "before", "tab:gray"),
        (0.2, after, "after CLIPSelf", "tab:green"),
    ):
        bars = axes[2].bar(x + offset, [values[k] for k in keys], 0.4, label=label, color=color)
        axes[2].bar_label(bars, fmt="%.0f", fontsize=8)
    axes[2].set_xticks(x, [f"{KINDS[k]}\n{g}" for k, g in keys])
    axes[2].set(title="top-1 mean accuracy (%)", ylim=(0, 108))
    axes[2].legend(loc="upper left", ncols=2, fontsize=8)
    if rows:
        colours = distinct_colours(len(names)) / 255
        titles = ("scene", "true classes", "dense map before", "dense map after CLIPSelf")
        grid = bottom.subplots(len(rows), len(titles), squeeze=False)
        for axes_row, (image, *maps) in zip(grid, rows, strict=True):
            axes_row[0].imshow(image)
            for axis, labels in zip(axes_row[1:], maps, strict=True):
                axis.imshow(0.15 * image / 255 + 0.85 * colours[labels])
            shown = np.unique(maps[0])
            handles = [matplotlib.patches.Patch(color=colours[i], label=names[i]) for i in shown]
            axes_row[-1].legend(
                handles=handles, loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False, title="true"
            )
            for axis in axes_row:
                axis.axis("off")
        for axis, title in zip(grid[0], titles, strict=True):
            axis.set_title(title)
    return figure


def run(args: argparse.Namespace) -> None:
    """Print the table and write the picture."""
    data, start, distilled = Path(args.data), Path(args.start), Path(args.distilled)
    before, after = (accuracies(r) for r in read_results(distilled))
    print(table(before, after))
    val = data / "annotations" / "panoptic_val2017.json"
    panoptic = json.loads(val.read_text())
    categories = sorted(panoptic["categories"], key=lambda c: c["id"])
    ids, names = [c["id"] for c in categories], [c["name"] for c in categories]
    files = {image["id"]: image["file_name"] for image in panoptic["images"]}
    scenes = choose_scenes(panoptic, args.scenes)
    images = [read_image(str(data / "val2017" / files[s["image_id"]])) for s in scenes]
    maps = [
        maps_of(args.model, folder / "checkpoints" / "clipself.pt", images, names, args.size)
        for folder in (start, distilled)
    ]
    rows = [
        [image.permute(1, 2, 0).numpy(), true_classes(data, scene, ids), first.numpy(), second.numpy()]
        for image, scene, first, second in zip(images, scenes, *maps, strict=True)
    ]
    losses = {"image-text training": read_loss(start), "CLIPSelf on image patches": read_loss(distilled)}
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    draw(losses, before, after, rows, names).savefig(args.output, dpi=90)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", required=True, help="experiment of the contrastive training")
    parser.add_argument("--distilled", required=True, help="experiment of the distillation, evaluated before and after")
    parser.add_argument("--data", required=True, help="the generated dataset")
    parser.add_argument("--model", default="ViT-Ti-8-64")
    parser.add_argument("--size", type=int, default=128, help="input size of the dense maps")
    parser.add_argument("--scenes", type=int, default=5, help="rows of the picture")
    parser.add_argument("--out", "--output", dest="output", metavar="FILE", required=True, help="picture to write")
    torch.set_num_threads(min(4, torch.get_num_threads()))
    return run_program(lambda: as_user_error(lambda: run(parser.parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())
