"""Pseudo labels to files: a palette PNG per photograph, to train any segmentation network on.

Pixels whose probability is under --confidence become 255, which every framework ignores. With --keep-seen the pixels of
unseen classes have the best unseen class, and probabilities are those among the unseen ones. Running the program again
goes on where it stopped; with torchrun the images are shared among processes.

Examples:
    python -m ovseg.pseudo_labels --model ViT-B-16-quickgelu --pretrained openai --images photos \\
        --classes road sky "tree|bush" car --confidence 0.5 --out labels
    python -m ovseg.pseudo_labels --model EVA02-CLIP-B-16 --pretrained clipself.pt --dataset voc20 --data-root data \\
        --split trainaug --protocol maskclip --denoise 0.5 --smooth 1.0 --out labels/voc
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from open_clip.identity import identity
from ovseg.classes import IGNORE, ClassList
from ovseg.data.label_files import LabelError
from ovseg.data.sets import DATASETS, SegmentationSet, Unusable, open_dataset
from ovseg.maskclip_plus.fill import TO_FILL, give_labels, mark_unlabelled
from ovseg.options import (
    add_class_options,
    add_model_options,
    add_protocol_options,
    build_segmenter,
    check_sources,
    classes_from,
    embeddings_digest,
    name_unused,
    protocol_from,
    with_readout,
)
from ovseg.pictures import class_colours, list_images, write_label_png
from ovseg.segment import Segmenter
from training.engine.data.images import ImageError, read_image
from training.engine.data.workers import Loader
from training.engine.distributed import Dist, gather_objects, init_distributed, together
from training.engine.errors import Flags, UserError, reason_of, run_program
from training.engine.files import write_atomically
from training.engine.flags import COUNT, NATURAL, PATH, Parser
from training.engine.journal import setup_logging

logger = logging.getLogger(__name__)

FLAGS = Flags(resume="the same command", folder="--out", checkpointing="a lower --short-side")

RECORD = "pseudo_labels.json"  # in the output folder: classes and settings


class Photographs(Dataset):
    """Photographs as the network's input; an item is a dict or :class:`Unusable`.

    Args:
        files: paths, and the label files to be written.
        segmenter: prepares images.
        data: annotations to be kept except for the unseen classes; None to label every pixel.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, Path]],
        segmenter: Segmenter,
        data: SegmentationSet | None,
        places: Sequence[int],
    ) -> None:
        self.files, self.prepare, self.data, self.places = list(files), segmenter.prepare, data, places

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any] | Unusable:
        file, target = self.files[index]
        try:
            image = read_image(file)
            item = {"input": self.prepare(image), "size": tuple(image.shape[-2:]), "target": target}
            if self.data is not None:
                label_file = self.data.files(self.places[index])[1]
                item["known"] = self.data.read_labels(label_file)
                if item["known"].shape != item["size"]:
                    return Unusable(file, "photograph and label file are of different sizes")
            return item
        except ImageError as error:
            return Unusable(error.file, error.reason)
        except LabelError as error:
            return Unusable(label_file, str(error), fatal=True)


def write_pseudo_labels(
    segmenter: Segmenter,
    photographs: Photographs,
    *,
    confidence: float | None = None,
    annotated: ClassList | None = None,
    batch_size: int = 4,
    workers: int = 2,
    progress: bool = True,
) -> tuple[int, list[Unusable]]:
    """Label photographs and write the PNGs.

    Args:
        segmenter: with a single variant.
        confidence: probability under which a pixel becomes 255.
        annotated: where photographs come with annotations: all classes of these. The segmenter's are the unseen ones
            among them, which are filled in; other annotations are kept.

    Returns:
        Files written, and photographs that could not be used.
    """
    (name, protocol), *_ = segmenter.variants.items()
    colours = class_colours(annotated or segmenter.classes)
    written, skipped = 0, []
    loader = Loader(photographs, workers=min(workers, len(photographs)), batch_size=batch_size, collate_fn=list)
    with tqdm(total=len(photographs), desc="pseudo labels", unit="img", disable=not progress) as bar:
        for batch in loader:
            items = [item for item in batch if not isinstance(item, Unusable)]
            skipped += [item for item in batch if isinstance(item, Unusable)]
            maps = segmenter.score([i["input"] for i in items], [i["size"] for i in items]) if items else []
            for item, scores in zip(items, maps, strict=True):
                found = segmenter.label(scores[name], protocol, item["input"], confidence=confidence is not None)
                labels = found.labels.cpu()
                unsure = None if confidence is None else found.confidence.cpu() < confidence
                if annotated is not None:
                    labels = fill_unseen(item["known"], labels, annotated.unseen, unsure)
                elif unsure is not None:
                    labels = labels.masked_fill(unsure, IGNORE)
                write_label_png(item["target"], labels.numpy(), colours)
                written += 1
            bar.update(len(batch))
    return written, skipped


def fill_unseen(known: np.ndarray, found: Tensor, unseen: Sequence[int], unsure: Tensor | None = None) -> Tensor:
    """Annotations with the pixels of unseen classes labelled anew, uint8 ``[H, W]``.

    Args:
        known: annotations, uint8 ``[H, W]``.
        found: integers ``[H, W]``, numbers of classes in ``unseen``.
        unseen: labels of the unseen classes.
        unsure: ``[H, W]``, where such a pixel becomes 255 instead.
    """
    labels = mark_unlabelled(torch.from_numpy(known), unseen)
    wanted = labels == TO_FILL
    return give_labels(labels, found[wanted], unseen, None if unsure is None else unsure[wanted]).to(torch.uint8)


# -- program ----------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The program's arguments."""
    parser = Parser(
        "python -m ovseg.pseudo_labels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    group = parser.add_argument_group("photographs", "files and folders with classes of your own, or a data set")
    group.add_argument("--images", nargs="+", default=[], help="photographs, or folders of them")
    group.add_argument("--dataset", default="", choices=DATASETS, help="a data set; its classes are used")
    group.add_argument("--data-root", default="", help="folder that the data set was unpacked into")
    group.add_argument("--split", default="train", help="part of the data set")
    group.add_argument("--image-root", default=None, help="photographs of a panoptic set, where they lie elsewhere")
    add_class_options(parser)
    add_protocol_options(parser)
    parser.add_argument("--readout", default=None, help="dense reading (own: the model's); by default the protocol's")
    parser.add_argument("--confidence", type=float, default=None, help="probability under which a pixel becomes 255")
    parser.add_argument(
        "--keep-seen", action="store_true", help="zero-shot setting: keep annotations, fill in the unseen classes only"
    )
    parser.add_argument(
        "--out", "--output", type=PATH, dest="output", metavar="DIR", required=True, help="folder of the PNGs"
    )
    parser.add_argument("--batch-size", type=COUNT, default=4, help="images at a time")
    parser.add_argument("--workers", type=NATURAL, default=2, help="processes that read images, per process")
    return parser.parse_args(argv)


def _sources(args: argparse.Namespace) -> tuple[list[tuple[str, Path]], ClassList, SegmentationSet | None]:
    """Photographs with the names of their PNGs, the classes, and the data set if there is one."""
    check_sources(args)
    if args.images:
        if args.keep_seen:
            raise UserError("--keep-seen needs annotations: a --dataset with unseen classes")
        files = [(str(path), name.with_suffix(".png")) for path, name in list_images(args.images)]
        return _without_clashes(files), classes_from(args), None
    words = protocol_from(args, args.dataset).words
    data = open_dataset(args.dataset, args.data_root, args.split, words=words, image_root=args.image_root)
    if args.keep_seen and not data.classes.unseen:
        raise UserError(f"--keep-seen: {args.dataset} has no unseen classes")
    pairs = [data.files(i)[0] for i in range(len(data))]
    common = os.path.commonpath([os.path.dirname(p) for p in pairs])
    return [(p, Path(os.path.relpath(p, common)).with_suffix(".png")) for p in pairs], data.classes, data


def _without_clashes(files: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """The same files; UserError when two of them would be written to one PNG."""
    seen: dict[Path, str] = {}
    for path, target in files:
        if target in seen:
            raise UserError(f"{seen[target]} and {path} would both become {target}: label them in two runs")
        seen[target] = path
    return files


def run(args: argparse.Namespace, dist: Dist) -> int:
    """Write what the flags ask for; returns how many files this and the other processes wrote."""
    if args.confidence is not None and not 0 <= args.confidence <= 1:
        raise UserError(f"--confidence {args.confidence}: give a probability from 0 to 1")
    protocol = protocol_from(args, args.dataset or "images")
    if args.readout:
        protocol = with_readout(protocol, args.readout)
    output = args.output
    with together():
        if output.exists() and not output.is_dir():
            raise UserError(f"--out {output}: is a file; give a folder")
        files, classes, data = _sources(args)
    unseen = classes.unseen if args.keep_seen else None
    name_unused(args, classes if unseen is None else classes.only(unseen))
    segmenter = build_segmenter(args, classes, protocol, dist.device, only=unseen, progress=dist.is_master)
    with together():
        if dist.is_master:
            _record(output, args, segmenter, classes)
    left = [i for i, (_, target) in enumerate(files) if not (output / target).is_file()]
    if dist.is_master and len(left) < len(files):
        logger.info("%d of %d label maps are there already", len(files) - len(left), len(files))
    gather_objects(None)  # nobody writes before all have looked
    mine = left[dist.rank :: dist.world_size]
    photographs = Photographs(
        [(files[i][0], output / files[i][1]) for i in mine], segmenter, data if args.keep_seen else None, mine
    )
    written, skipped = write_pseudo_labels(
        segmenter, photographs, confidence=args.confidence, annotated=classes if args.keep_seen else None,
        batch_size=args.batch_size, workers=args.workers, progress=dist.is_master,
    )  # fmt: skip
    everybody = [item for part in gather_objects(skipped) for item in part]
    for item in everybody if dist.is_master else ():
        logger.warning("no labels for %s: %s", item.file, item.reason)
    total = sum(gather_objects(written))
    if everybody and not total:
        raise UserError(
            f"none of {len(everybody)} images could be used, for example {everybody[0].file}: {everybody[0].reason}"
        )
    return total


def _record(output: Path, args: argparse.Namespace, segmenter: Segmenter, classes: ClassList) -> None:
    """Write down classes and settings; UserError when the folder holds label maps of others."""
    (protocol,) = segmenter.variants.values()
    record = {
        "classes": list(classes.names), "words": [list(w) for w in classes.words], "ignore": IGNORE,
        "colours": class_colours(classes).tolist(), "confidence": args.confidence, "keep_seen": args.keep_seen,
        "filled": list(segmenter.classes.names), "model": args.model, "weights": identity(segmenter.model.visual),
        "embeddings": embeddings_digest(args), "external": args.external,
        "precision": args.precision, "drop_padding": segmenter.model.visual.drop_padding,
        "settings": json.loads(json.dumps(asdict(protocol))),
    }  # fmt: skip
    file = output / RECORD
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            write_atomically(file, json.dumps(record) + "\n")
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--out {output}: {reason_of(error)}") from None
    other = sorted(key for key in record if before.get(key) != record[key])
    if other:
        raise UserError(f"--out {output}: holds label maps with other {', '.join(other)}; choose another folder")


def main(argv: Sequence[str] | None = None) -> int:
    """The program; see :func:`~training.engine.errors.run_program` for its exit status."""
    return run_program(lambda: _main(argv), FLAGS)


def _main(argv: Sequence[str] | None) -> None:
    args = parse_args(argv)
    dist = init_distributed(args.device)
    setup_logging(dist.rank)
    total = run(args, dist)
    if dist.is_master:
        print(f"{total} label maps written to {args.output}")


if __name__ == "__main__":
    sys.exit(main())
