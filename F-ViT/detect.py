"""Detect classes of your choice: python detect.py IMAGE... --checkpoint FILE --classes "cat,dog,red car"."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

try:
    import open_clip  # noqa: F401
except ImportError:  # run from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from PIL import Image
from pycocotools import mask as coco_mask

from ovdet import files as checkpoint
from ovdet.data.dataset import TestDataset
from ovdet.data.images import read_image
from ovdet.data.loader import test_loader
from ovdet.distributed import join
from ovdet.errors import UserError, run
from ovdet.fvit.assemble import (
    config_of_checkpoint,
    free_vocabulary,
    load_detector,
    load_vit,
    make_detector,
    read_config,
)
from ovdet.journal import setup_logging
from ovdet.testing import SkipJudge, detect
from ovdet.visualize import draw_detections


def read_names(text: str) -> list[str]:
    """Class names of ``"cat, dog"`` or of a file with one name a line. UserError when there is none, or one twice."""
    path = Path(text)
    names = path.read_text(encoding="utf-8").splitlines() if path.is_file() else text.split(",")
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise UserError(f'--classes "{text}": give names separated by commas, or a file with one name a line')
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f'--classes: "{repeated[0]}" is named twice')
    return names


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, detect, print and draw. UserError for faulty input."""
    parser = argparse.ArgumentParser(description="Detect classes of your choice in images, and draw them.")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--checkpoint", required=True, help="a detector file: epoch_N.pt or latest.pt")
    parser.add_argument("--classes", required=True, help='"cat,dog,...", or a file with one name a line')
    parser.add_argument("--config", help="default: the config that the detector was trained with")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="config values: section.key=value")
    parser.add_argument("--score", type=float, default=0.3, help="smallest score drawn")
    parser.add_argument("--out", type=Path, default=Path("detections"), help="folder of the pictures")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    args = parser.parse_args(argv)
    names = read_names(args.classes)
    content = checkpoint.load(args.checkpoint)
    changes = [*args.set, f"test.score={args.score}", 'data.embeddings=""']
    if args.config:
        config = read_config(args.config, changes)
    else:
        config = config_of_checkpoint(content, args.checkpoint, changes)
    process = join(args.device)
    setup_logging(process.rank)
    vit = load_vit(config)
    vocabulary = free_vocabulary(names, content["base"])
    detector = make_detector(config, vit, vocabulary, device=process.device, progress=True).eval()
    load_detector(args.checkpoint, detector, vit)
    dataset = TestDataset(args.images, root="", image_size=config.data.image_size)
    loader = test_loader(dataset, batch_size=1, workers=0, rank=0, world_size=1, pin=False)
    judge = SkipJudge("the command line")
    args.out.mkdir(parents=True, exist_ok=True)
    found = detect(
        detector, loader, process=process, precision=config.train.precision,
        mask_threshold=config.test.mask_threshold, on_skipped=judge,
    )  # fmt: skip
    for result in found:
        source = Path(args.images[result["index"]])
        masks = None
        if "masks" in result:
            masks = np.array([coco_mask.decode(m) for m in result["masks"]], bool).reshape(-1, *result["original"])
            masks = torch.from_numpy(masks)
        picture = draw_detections(
            read_image(str(source)), torch.from_numpy(result["boxes"]), result["labels"].tolist(),
            result["scores"].tolist(), names, masks,
        )  # fmt: skip
        target = args.out / f"{source.stem}.png"
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(target)
        print(f"{source} -> {target}")
        for box, label, score in zip(result["boxes"], result["labels"], result["scores"], strict=True):
            print(f"  {names[label]:<20} {score:.3f}  {' '.join(f'{v:.0f}' for v in box)}")
    if judge.skipped == len(args.images):
        raise UserError("none of the images could be read: see the reasons above")


if __name__ == "__main__":
    run(main)
