"""Show what a model sees where: one picture per photograph, a row per checkpoint and reading.

Columns: the photograph; with class names, the label map with its legend and the cosine to the largest classes; the
first three principal components of the dense map as colours; with --query, the cosine of all cells to a point or box.

Examples:
    python tools/show.py street.jpg --model EVA02-CLIP-B-16 --pretrained eva.pt clipself.pt \\
        --classes person car road sky tree --out pictures
    python tools/show.py photos/ --model ViT-B-16-quickgelu --pretrained openai --readouts value sclip naclip \\
        --classes-from panoptic_val2017.json --query 320,240
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ovseg.classes import ClassList
from ovseg.options import (
    REFINEMENTS,
    add_class_options,
    add_model_options,
    add_protocol_options,
    build_segmenter,
    classes_from,
    protocol_from,
    short_names,
    variants_from,
)
from ovseg.pictures import class_colours, list_images
from ovseg.segment import Box, Segmenter, at_pixels, on_input
from training.engine.data.images import ImageError, read_image
from training.engine.distributed import init_distributed
from training.engine.errors import Flags, UserError, run_program
from training.engine.flags import Parser
from training.engine.pictures import overlay, principal_components, similarity_to

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend without a screen)

LEGEND = 12  # classes named beside a map, those with the largest areas
FLAGS = Flags(resume="the same command", folder="--out", batch_size="--short-side", checkpointing="fewer --readouts")
PICTURES = (".png", ".jpg", ".jpeg", ".pdf", ".webp")


@dataclass
class Row:
    """What is drawn for one checkpoint and reading.

    Attributes:
        title: names it.
        labels: uint8 ``[H, W]``; None without classes.
        similarities: class label -> cosine ``[H, W]``.
        components: principal components as colours, 0..1 ``[H, W, 3]``.
        query: cosine ``[H, W]`` to the query; None without one.
    """

    title: str
    labels: np.ndarray | None = None
    similarities: dict[int, np.ndarray] = field(default_factory=dict)
    components: np.ndarray | None = None
    query: np.ndarray | None = None


def parse_query(text: str) -> tuple[float, ...]:
    """``x,y`` or ``x1,y1,x2,y2`` in pixels of the photograph.

    Raises:
        UserError: anything else.
    """
    try:
        values = tuple(float(v) for v in text.split(","))
    except ValueError:
        values = ()
    if len(values) == 2:
        values = values * 2
    if len(values) != 4 or values[2] < values[0] or values[3] < values[1]:
        raise UserError(f"--query {text}: give a point x,y or a box x1,y1,x2,y2 in pixels, its corners in order")
    return values


def query_box(query: tuple[float, ...], height: int, width: int) -> Box:
    """The query in 0..1 of a photograph; UserError when it lies outside."""
    box = (query[0] / width, query[1] / height, query[2] / width, query[3] / height)
    if box[0] < 0 or box[1] < 0 or box[0] >= 1 or box[1] >= 1:
        raise UserError(
            f"--query {','.join(f'{v:g}' for v in query)}: outside a photograph of {width} x {height} pixels"
        )
    return box[0], box[1], min(box[2], 1.0), min(box[3], 1.0)


@torch.inference_mode()
def make_rows(
    segmenters: Sequence[Segmenter],
    titles: Sequence[str],
    image: Tensor,
    *,
    classes: bool,
    similar: int,
    query: Box | None,
) -> list[Row]:
    """Rows of all checkpoints, one per reading (and refinement) of each.

    Args:
        titles: one per segmenter.
        image: uint8 ``[3, H, W]``.
        classes: whether there are classes to show.
        similar: classes whose cosines are shown, the same for all rows: those with the largest areas over all of them.
        query: see :func:`query_box`.
    """
    size = tuple(image.shape[-2:])
    rows, cosines = [], []
    for segmenter, title in zip(segmenters, titles, strict=True):
        prepared = segmenter.prepare(image)
        maps, plan = segmenter.dense(prepared)
        scores = segmenter.score([prepared], [size])[0] if classes else {}
        for name, protocol in segmenter.variants.items():
            dense = maps[protocol.readout]
            row = Row(f"{title}\n{name}" if len(segmenter.variants) > 1 or protocol.readout else title)
            row.components = at_pixels(principal_components(dense), plan, size).transpose(1, 2, 0).clip(0, 1)
            if query is not None:
                row.query = at_pixels(similarity_to(dense, on_input(query, plan))[None], plan, size)[0]
            if classes:
                row.labels = segmenter.label(scores[name], protocol, prepared).labels.cpu().numpy()
                cosines.append((torch.einsum("dhw,cd->chw", dense, segmenter.embeddings), plan))
            rows.append(row)
    if classes:
        owner, count = segmenters[0].classes.word_classes, len(segmenters[0].classes)
        area = sum(np.bincount(row.labels.ravel(), minlength=count) for row in rows)
        for row, (cosine, plan) in zip(rows, cosines, strict=True):
            for label in area.argsort(kind="stable")[::-1][:similar].tolist():
                row.similarities[label] = at_pixels(cosine[owner == label].amax(0)[None], plan, size)[0]
    return rows


def draw(image: Tensor, rows: Sequence[Row], classes: ClassList | None, query: Box | None, opacity: float):
    """Figure of one photograph: a line of panels per row."""
    picture = image.permute(1, 2, 0).numpy()
    height, width = picture.shape[:2]
    panels = [_panels(picture, row, classes, query, opacity) for row in rows]
    columns = max(map(len, panels))
    ratio = min(max(height / width, 0.3), 3.0)
    wide = 3.4 if ratio <= 1 else 3.4 / ratio + 0.8  # inches of a panel
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(wide * columns + (2.0 if classes else 0.0), (0.85 * wide * ratio + 0.5) * len(rows)),
        squeeze=False,
        layout="constrained",
    )
    for line, items in zip(axes, panels, strict=True):
        for axis in line:
            axis.axis("off")
        for axis, (title, paint) in zip(line, items, strict=False):
            paint(axis)
            axis.set_title(title, fontsize=9)
    return figure


def _panels(picture: np.ndarray, row: Row, classes: ClassList | None, query: Box | None, opacity: float) -> list[tuple]:
    """(title, function that paints an axis) of one row."""
    height, width = picture.shape[:2]

    def photograph(axis):
        axis.imshow(picture)
        if query is not None:
            x1, y1, x2, y2 = query[0] * width, query[1] * height, query[2] * width, query[3] * height
            if x1 == x2 and y1 == y2:
                for size, colour in ((14, "black"), (9, "yellow")):  # seen on light and dark alike
                    axis.plot([x1], [y1], "+", color=colour, markersize=size, markeredgewidth=size / 5)
            else:
                for thick, colour in ((3.5, "black"), (1.5, "yellow")):
                    axis.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, lw=thick, edgecolor=colour))

    def heat(values):
        def paint(axis):
            shown = axis.imshow(values, cmap="viridis")
            axis.figure.colorbar(shown, ax=axis, fraction=0.046, pad=0.02).ax.tick_params(labelsize=7)

        return paint

    panels = [(row.title, photograph)]
    if row.labels is not None:
        panels.append(("labels", lambda axis: _paint_labels(axis, picture, row.labels, classes, opacity)))
    if row.components is not None:
        panels.append(("principal components", lambda axis: axis.imshow(row.components)))
    if row.query is not None:
        panels.append(("cosine to the query", heat(row.query)))
    panels += [(f"cosine to {classes.names[label]}", heat(values)) for label, values in row.similarities.items()]
    return panels


def _paint_labels(axis, picture: np.ndarray, labels: np.ndarray, classes: ClassList, opacity: float) -> None:
    """A label map with the names of its largest classes beside it."""
    colours = class_colours(classes)
    axis.imshow(overlay(picture, labels, colours, opacity))
    area = np.bincount(labels.ravel(), minlength=len(classes)) / labels.size
    largest = [label for label in area.argsort(kind="stable")[::-1][:LEGEND] if area[label] >= 0.005]
    patches = [
        matplotlib.patches.Patch(
            facecolor=colours[i] / 255, edgecolor="black", linewidth=0.5, label=f"{classes.names[i]} {area[i]:.0%}"
        )
        for i in largest
    ]
    axis.legend(handles=patches, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False, borderpad=0.2)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER", help="photographs, or folders of them")
    add_model_options(parser, several=True)
    add_class_options(parser)
    add_protocol_options(parser)
    parser.add_argument("--readouts", nargs="+", default=None, help="dense readings, a row each")
    parser.add_argument("--refine", nargs="+", default=["none"], choices=REFINEMENTS, help="each with every reading")
    parser.add_argument("--query", default="", metavar="X,Y|X1,Y1,X2,Y2", help="point or box in pixels")
    parser.add_argument("--similar", type=int, default=3, help="classes whose cosines are shown")
    parser.add_argument("--opacity", type=float, default=0.65, help="of the labels over the photograph, 0 to 1")
    parser.add_argument(
        "--out", "--output", dest="output", metavar="DIR|FILE", default="pictures",
        help="folder of the pictures; or one picture's file",
    )  # fmt: skip
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[Path]:
    """Make the pictures; their paths.

    Raises:
        UserError: one line, when something is wrong.
    """
    with_classes = bool(args.classes or args.classes_from)
    classes = classes_from(args) if with_classes else ClassList(("nothing",), (("nothing",),))
    query = parse_query(args.query) if args.query else None
    if not 0 <= args.opacity <= 1 or args.similar < 0:
        raise UserError(f"--opacity {args.opacity} --similar {args.similar}: from 0 to 1, and 0 or more")
    if "" in args.images:
        raise UserError("an image is an empty word, which is no file: is a shell variable unset?")
    files = list_images(args.images)
    targets = _targets(args.output, files)
    first = _read(files[0][0])  # before the models are loaded
    if query:
        query_box(query, *first.shape[-2:])
    titles = short_names(args.pretrained)
    variants = variants_from(protocol_from(args, "images"), args.readouts, args.refine)
    device = init_distributed(args.device).device
    # All checkpoints side by side need each image again, so the models stay in memory together.
    segmenters = [build_segmenter(args, classes, variants, device, pretrained=p) for p in args.pretrained]
    for (path, _), target in zip(tqdm(files, "pictures", unit="img", disable=len(files) < 3), targets, strict=True):
        image = _read(path)
        box = query_box(query, *image.shape[-2:]) if query else None
        rows = make_rows(segmenters, titles, image, classes=with_classes, similar=args.similar, query=box)
        figure = draw(image, rows, classes if with_classes else None, box, args.opacity)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=110)
        plt.close(figure)
    return targets


def _read(path: Path) -> Tensor:
    """A photograph, uint8 ``[3, H, W]``; UserError where it is none."""
    try:
        return read_image(str(path))
    except ImageError as error:
        raise UserError(str(error)) from None


def _targets(output: str, files: Sequence[tuple[Path, Path]]) -> list[Path]:
    """Where the pictures go. Files of the same name from different places keep apart by a number."""
    path = Path(output)
    if path.suffix.lower() in PICTURES:
        if len(files) > 1:
            raise UserError(f"--out {output}: one picture for {len(files)} photographs; name a folder")
        return [path]
    targets: list[Path] = []
    for _, name in files:
        target, number = path / name.with_suffix(".png"), 2
        while target in targets:
            target, number = path / name.with_name(f"{name.stem}_{number}.png"), number + 1
        targets.append(target)
    return targets


def main(argv: Sequence[str] | None = None) -> int:
    """The program; see :func:`~training.engine.errors.run_program` for its exit status."""
    return run_program(lambda: _main(argv), FLAGS)


def _main(argv: Sequence[str] | None) -> None:
    for path in run(parse_args(argv)):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
