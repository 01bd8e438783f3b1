"""Segmentation scores of dense labels on a data set: mIoU, mAcc, aAcc, for several readings from one pass.

Examples:
    python -m ovseg.evaluate --model ViT-B-16-quickgelu --pretrained openai --dataset voc20 --data-root data \\
        --protocol sclip --readouts value sclip naclip --out results/voc20
    torchrun --nproc_per_node 8 -m ovseg.evaluate --model EVA02-CLIP-B-16 --pretrained clipself.pt \\
        --dataset ade150 --data-root data --out results/ade
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from tqdm import tqdm

from open_clip.identity import identity
from ovseg.data.sets import DATASETS, SegmentationSet, Unusable, open_dataset
from ovseg.metrics import Confusion
from ovseg.options import (
    REFINEMENTS,
    add_model_options,
    add_protocol_options,
    build_segmenter,
    embeddings_digest,
    name_unused,
    protocol_from,
    variants_from,
)
from ovseg.progress import Counts
from ovseg.segment import Segmenter
from training.engine.data.workers import Loader
from training.engine.distributed import Dist, gather_objects, init_distributed, together
from training.engine.errors import Flags, UserError, run_program
from training.engine.files import write_atomically
from training.engine.flags import COUNT, NATURAL, SHARE, Parser
from training.engine.journal import setup_logging

logger = logging.getLogger(__name__)

FLAGS = Flags(resume="the same command", folder="--out", checkpointing="a lower --short-side")

NAMED_SKIPS = 10  # unusable images named in the log; the others are counted
SAVE_SECONDS = 30.0  # between two savings of the counts


def evaluate(
    segmenter: Segmenter,
    data: SegmentationSet,
    dist: Dist,
    *,
    counts: Counts | None = None,
    batch_size: int = 4,
    workers: int = 2,
    max_images: int | None = None,
    max_skipped: float = 0.0,
    progress: bool = True,
) -> dict[str, Confusion]:
    """Confusion matrices of all variants over a data set; every process calls it and gets the same result.

    Args:
        segmenter: the model with its classes and variants.
        data: images with labels of the same classes.
        dist: this process; process r takes every ``world_size``-th of the images that are left.
        counts: where counts are kept on the way, and taken up again; None for nowhere.
        batch_size: images read together; their windows share passes.
        workers: processes that read images.
        max_images: only the first so many.
        max_skipped: share of unusable images above which evaluation stops.
        progress: show a bar (process 0).

    Raises:
        UserError: too many unusable images, or labels of another data set.
    """
    confusions = {name: Confusion(len(data.classes), segmenter.device) for name in segmenter.variants}
    total = min(len(data), max_images or len(data))
    # One process looks, and all take what it saw: the others may start to write meanwhile.
    before, done = gather_objects(counts.restore() if counts is not None and dist.is_master else ({}, set()))[0]
    left = [i for i in range(total) if i not in done][dist.rank :: dist.world_size]
    data.prepare = segmenter.prepare
    # Workers end with the pass.
    loader = Loader(
        Subset(data, left), workers=min(workers, len(left)), batch_size=batch_size, collate_fn=list,
        **({"persistent_workers": False} if workers and left else {}),
    )  # fmt: skip
    skipped: list[Unusable] = []
    saved = time.monotonic()
    bar = tqdm(total=len(left), desc="evaluate", unit="img", disable=not (progress and dist.is_master))
    finished: list[int] = []
    with bar, torch.inference_mode():
        for batch in loader:
            good = [item for item in batch if not isinstance(item, Unusable)]
            skipped += [item for item in batch if isinstance(item, Unusable)]
            if any(item.fatal for item in skipped):
                break
            _count(segmenter, good, confusions)
            finished += [item["index"] for item in good]
            bar.update(len(batch))
            if counts is not None and time.monotonic() - saved > SAVE_SECONDS:
                counts.save({name: c.counts for name, c in confusions.items()}, finished)
                saved = time.monotonic()
    with together():
        _judge(data, skipped)
        if counts is not None and finished:
            counts.save({name: c.counts for name, c in confusions.items()}, finished)
    _judge_all(data, skipped, total, max_skipped)
    for name, confusion in confusions.items():
        if dist.is_master and name in before:
            confusion.counts += before[name].to(confusion.counts.device)
        confusion.reduce()
    return confusions


def _count(segmenter: Segmenter, items: Sequence[dict[str, Any]], confusions: Mapping[str, Confusion]) -> None:
    """Label the images of a batch and add them to the counts."""
    if not items:
        return
    sizes = [tuple(item["labels"].shape) for item in items]
    maps = segmenter.score([item["input"] for item in items], sizes)
    for item, scores in zip(items, maps, strict=True):
        truth = item["labels"].to(segmenter.device, non_blocking=True)
        for name, protocol in segmenter.variants.items():
            confusions[name].update(segmenter.label(scores[name], protocol, item["input"]).labels, truth)


def _judge(data: SegmentationSet, skipped: Sequence[Unusable]) -> None:
    """Name this process's unusable images; stop for one that shows that nothing fits."""
    for item in skipped[:NAMED_SKIPS]:
        logger.warning("skipped %s: %s", item.file, item.reason)
    if len(skipped) > NAMED_SKIPS:
        logger.warning("skipped %d more images", len(skipped) - NAMED_SKIPS)
    fatal = [item for item in skipped if item.fatal]
    if fatal:
        raise UserError(f"{data.name}: {fatal[0].file} {fatal[0].reason}")


def _judge_all(data: SegmentationSet, skipped: Sequence[Unusable], total: int, allowed: float) -> None:
    """Stop when too many images of all processes were unusable."""
    everybody = [item for part in gather_objects(list(skipped)) for item in part]
    if len(everybody) > allowed * total:
        raise UserError(
            f"{data.name}: {len(everybody)} of {total} images could not be used (for example {everybody[0].file}: "
            f"{everybody[0].reason}), more than the share {allowed:g} of --max-skipped; mend the data or raise it"
        )


# -- results ----------------------------------------------------------------------------------------------------------


def results_of(confusions: Mapping[str, Confusion], data: SegmentationSet, *, zero_shot: bool) -> dict[str, Any]:
    """Scores by variant, in 0..1, with a record per class."""
    results = {}
    for name, confusion in confusions.items():
        values = confusion.per_class()
        records = [
            {"class": label, **{key: _number(values[key][i]) for key in ("IoU", "Acc")}}
            for i, label in enumerate(data.classes.names)
        ]
        scores = confusion.compute(data.classes.unseen if zero_shot else ())
        results[name] = {**{k: _number(v) for k, v in scores.items()}, "per_class": records}
    return results


def _number(value: Any) -> float | None:
    """A float for json, which has no NaN."""
    value = float(value)
    return None if math.isnan(value) else value


def format_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Scores in per cent, a line per variant."""
    keys = [key for key in next(iter(results.values())) if key != "per_class"]
    width = max(len("reading"), *map(len, results))
    lines = ["  ".join([f"{'reading':<{width}}", *(f"{key:>12}" for key in keys)])]
    for name, scores in results.items():
        cells = (f"{100 * scores[key]:12.2f}" if scores[key] is not None else f"{'-':>12}" for key in keys)
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    return "\n".join(lines)


# -- program ----------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The program's arguments."""
    parser = Parser(
        "python -m ovseg.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", required=True, choices=DATASETS)
    group.add_argument("--data-root", required=True, help="folder that the data set was unpacked into")
    group.add_argument("--split", default="val", help="part of the data set")
    group.add_argument("--image-root", default=None, help="photographs of a panoptic set, where they lie elsewhere")
    group.add_argument("--max-images", type=COUNT, default=None, help="only the first so many")
    group.add_argument("--max-skipped", type=SHARE, default=0.0, help="share of unusable images that is put up with")
    add_protocol_options(parser)
    group = parser.add_argument_group("what is compared")
    group.add_argument(
        "--readouts", nargs="+", default=None, help="dense readings (own: the model's); else the protocol's"
    )
    group.add_argument("--refine", nargs="+", default=["none"], choices=REFINEMENTS, help="each with every reading")
    group.add_argument("--zero-shot", action="store_true", help="also the means over seen and unseen classes, and hIoU")
    group = parser.add_argument_group("run")
    group.add_argument(
        "--out", "--output", dest="output", metavar="DIR", default="",
        help="folder of results.json; a run that was cut short goes on there",
    )  # fmt: skip
    group.add_argument("--batch-size", type=COUNT, default=4, help="images at a time")
    group.add_argument("--workers", type=NATURAL, default=2, help="processes that read images, per process")
    return parser.parse_args(argv)


def run(args: argparse.Namespace, dist: Dist) -> dict[str, Any]:
    """Evaluate as the flags say; results by variant (:func:`results_of`).

    Raises:
        UserError: anything for the user to mend.
    """
    protocol = protocol_from(args, args.dataset)
    variants = variants_from(protocol, args.readouts, args.refine)
    with together():
        if args.output and Path(args.output).is_file():
            raise UserError(f"--out {args.output}: is a file; give a folder")
        data = open_dataset(args.dataset, args.data_root, args.split, words=protocol.words, image_root=args.image_root)
        if args.zero_shot and not data.classes.unseen:
            raise UserError(
                f"--zero-shot: {args.dataset} has no published unseen classes, as voc20, voc21, context60 and "
                "coco_stuff171 have; leave the flag out"
            )
    name_unused(args, data.classes)
    segmenter = build_segmenter(args, data.classes, variants, dist.device, progress=dist.is_master)
    with together():
        counts = Counts(Path(args.output), fingerprint(args, data, segmenter)) if args.output else None
    confusions = evaluate(
        segmenter, data, dist, counts=counts, batch_size=args.batch_size, workers=args.workers,
        max_images=args.max_images, max_skipped=args.max_skipped,
    )  # fmt: skip
    results = results_of(confusions, data, zero_shot=args.zero_shot)
    if dist.is_master and args.output:
        record = {
            "dataset": args.dataset, "split": args.split, "model": args.model, "pretrained": args.pretrained,
            "settings": {n: asdict(p) for n, p in variants.items()}, "results": results,
        }  # fmt: skip
        write_atomically(Path(args.output) / "results.json", json.dumps(record, indent=1) + "\n")
    return results


def fingerprint(args: argparse.Namespace, data: SegmentationSet, segmenter: Segmenter) -> dict[str, Any]:
    """What a run's counts depend on: counts of another are never added to it."""
    return {
        "dataset": args.dataset, "split": args.split, "images": len(data), "first": data.files(0)[0],
        "max_images": args.max_images, "model": args.model,
        "weights": identity(segmenter.model.visual),
        "external": args.external, "precision": args.precision, "embed_path": embeddings_digest(args),
        "drop_padding": segmenter.model.visual.drop_padding,
        "settings": json.loads(json.dumps({n: asdict(p) for n, p in segmenter.variants.items()})),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The program; see :func:`~training.engine.errors.run_program` for its exit status."""
    return run_program(lambda: _main(argv), FLAGS)


def _main(argv: Sequence[str] | None) -> None:
    args = parse_args(argv)
    dist = init_distributed(args.device)
    setup_logging(dist.rank)
    results = run(args, dist)
    if dist.is_master:
        print(format_table(results))


if __name__ == "__main__":
    sys.exit(main())
