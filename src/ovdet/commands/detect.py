"""Detect classes of your choice: python detect.py IMAGE|FOLDER... --checkpoint FILE --classes "cat,dog,red car"."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

import ovdet
from ovdet.listing import check_folder, list_images, place_pictures, read_names
from ovdet.testing import count_skips
from ovdet.visualize import draw_detections
from training.engine.errors import UserError, as_user_error, run_program
from training.engine.files import write_json
from training.engine.flags import PATH, Parser
from training.engine.journal import setup_logging
from training.engine.skips import SkipPolicy


def draw(found: dict[str, Any], classes: Sequence[str], target: Path) -> None:
    """Write the picture of an image's detections."""
    masks = None
    if found.get("masks"):
        masks = torch.from_numpy(coco_mask.decode(found["masks"]).astype(bool).transpose(2, 0, 1))
    picture = draw_detections(
        found["pixels"], torch.from_numpy(found["boxes"]), found["labels"].tolist(), found["scores"].tolist(), classes,
        masks, captions=found["names"],
    )  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy())).save(target)


def record(found: dict[str, Any], source: str) -> dict[str, Any]:
    """An image's detections for the json file."""
    height, width = found["size"]
    detections = [
        {"class": name, "score": round(float(score), 5), "box": [round(float(v), 2) for v in box]}
        for name, score, box in zip(found["names"], found["scores"], found["boxes"], strict=True)
    ]
    for detection, mask in zip(detections, found.get("masks", ()), strict=False):
        detection["mask"] = mask
    return {"file": source, "width": width, "height": height, "detections": detections}


def chosen_names(classes: Sequence[str], file: str | None) -> list[str]:
    """Class names of ``--classes`` or ``--classes-from``. UserError unless one of the two names some."""
    if bool(classes) == bool(file):
        raise UserError("give names with --classes, or a file of them with --classes-from")
    if not file:
        return read_names(",".join(classes))
    if not Path(file).is_file():
        raise UserError(f"--classes-from {file}: no such file; names themselves go to --classes")
    return read_names(file, "--classes-from")


def check_json(file: Path | None, sources: Sequence[str]) -> None:
    """UserError where ``--json`` cannot be written, or is an image: found out before anything is detected."""
    if file is None:
        return
    if file.is_dir():
        raise UserError(f"--json {file}: a folder; give the file to write, such as {file / 'found.json'}")
    check_folder(file.parent, "--json")
    if file.resolve() in {Path(source).resolve() for source in sources}:
        raise UserError(f"--json {file}: it would replace one of the images; give another file")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, detect, print and draw. UserError for faulty input."""
    parser = Parser(description="Detect classes of your choice in images, and draw them.")
    parser.add_argument("images", nargs="+", help="image files, and folders, which are searched")
    parser.add_argument("--checkpoint", required=True, help="a detector file: epoch_N.pt or latest.pt")
    parser.add_argument("--classes", nargs="+", default=[], help='"cat,dog,red car", or a file with one name a line')
    parser.add_argument("--classes-from", metavar="FILE", help="file with one name a line")
    parser.add_argument(
        "--attributes", nargs="+", default=[], help='"red,green,...": say which of them each detection has (ViLD)'
    )
    parser.add_argument("--config", help="default: the config that the detector was trained with")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="config values: section.key=value")
    parser.add_argument("--score", type=float, default=0.3, help="smallest score shown, 0 to 1")
    parser.add_argument("--out", type=PATH, default=Path("detections"), help="folder of the pictures")
    parser.add_argument("--no-pictures", action="store_true", help="draw nothing")
    parser.add_argument("--json", type=PATH, metavar="FILE", help="write all detections to a json file as well")
    parser.add_argument("--batch-size", type=int, default=1, help="images at a time")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    args = parser.parse_args(argv)
    if not 0 <= args.score <= 1:
        raise UserError(f"--score {args.score}: give a number between 0 and 1")
    if args.batch_size < 1 or args.workers < 0:
        raise UserError(f"--batch-size {args.batch_size} --workers {args.workers}: give 1 or more, and 0 or more")
    names = chosen_names(args.classes, args.classes_from)
    attributes = read_names(",".join(args.attributes), "--attributes") if args.attributes else []
    setup_logging(0)
    sources = list_images(args.images, output=args.out)
    targets = [] if args.no_pictures else place_pictures(sources, args.out)
    check_json(args.json, sources)
    detector = ovdet.load_detector(
        args.checkpoint, device=args.device, config=args.config, overrides=[*args.set, f"test.score={args.score}"]
    )  # fmt: skip
    if not isinstance(detector, ovdet.LoadedDetector):
        raise UserError(f"{args.checkpoint} is a GLIP: use GLIP/ground.py for it")
    detector.use_classes(names)
    if attributes:
        with as_user_error():
            detector.use_attributes(attributes)
    policy = SkipPolicy("the command line", 1.0)
    bar = tqdm(total=len(sources), unit="img", desc="detecting", disable=len(sources) < 2, dynamic_ncols=True)
    records = []
    with bar:
        for found in detector.detect_files(
            sources, batch_size=args.batch_size, workers=args.workers, keep_pixels=not args.no_pictures,
            on_skipped=count_skips(policy),
        ):  # fmt: skip
            source = sources[found["index"]]
            if targets:
                draw(found, names, targets[found["index"]])
            if args.json:
                records.append(record(found, source))
            lines = [f"{source} -> {targets[found['index']]}" if targets else source]
            for name, score, box in zip(found["names"], found["scores"], found["boxes"], strict=True):
                lines.append(f"  {name:<20} {score:.3f}  {' '.join(f'{v:.0f}' for v in box)}")
            tqdm.write("\n".join(lines), file=sys.stdout)
            bar.update(1)
    if policy.skipped == len(sources):
        raise UserError("none of the images could be read: see the reasons above")
    if args.json:
        write_json(args.json, {"classes": names, "images": records})
        print(f"{args.json}: {len(records)} images, {sum(len(r['detections']) for r in records)} detections")


def run() -> int:
    """The command line of this process; gives its exit status."""
    return run_program(main)
