"""Class-agnostic proposals, and region-text pairs, for images of your own with a trained detector.

    python tools/make_proposals.py CONFIG CHECKPOINT --images data/coco/annotations/instances_train2017.json \\
        --image-root data/coco/train2017 --out data/coco --name coco [--nouns nouns.txt]

Writes ``NAME_proposals.json`` (boxes for CLIPSelf's region-proposal training). With ``--nouns`` (one name a line) also
``NAME_pseudo_N.json``, where each box has the noun that CLIP finds most like its crop, and
``NAME_pseudo_N_embeddings.npy``, the N nouns' embeddings: the training data of RegionCLIP. ``--images`` is a folder,
or a COCO or LVIS json whose image ids are kept. torchrun shares the work among processes.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "F-ViT"))
try:
    import open_clip  # noqa: F401
except ImportError:  # run from a clone that is not installed
    sys.path.insert(0, str(ROOT / "src"))

from open_clip.transform import crop_region, normalize  # noqa: E402
from ovdet.data.annotations import load_annotations  # noqa: E402
from ovdet.data.dataset import TestDataset  # noqa: E402
from ovdet.data.images import read_image, resolve  # noqa: E402
from ovdet.data.loader import test_loader  # noqa: E402
from ovdet.distributed import Process, broadcast, gather_to_master, join, leave, together  # noqa: E402
from ovdet.errors import UserError, as_user_error, run  # noqa: E402
from ovdet.evaluation.coco import write_json  # noqa: E402
from ovdet.fvit.assemble import Vit, free_vocabulary, load_detector, load_vit, read_config  # noqa: E402
from ovdet.fvit.config import FViTConfig  # noqa: E402
from ovdet.fvit.detector import build_detector  # noqa: E402
from ovdet.journal import setup_logging  # noqa: E402
from ovdet.testing import SkipJudge, autocast, detect  # noqa: E402
from ovdet.vocabulary import compute_embeddings  # noqa: E402

log = logging.getLogger(__name__)

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def list_images(images: Path, root: str) -> tuple[list[int], list[str], str]:
    """(ids, file names, image root) of a folder or an annotation file. UserError when there is no image."""
    if images.is_dir():
        names = sorted(
            str(path.relative_to(images)) for path in images.rglob("*") if path.suffix.lower() in SUFFIXES
        )  # fmt: skip
        if not names:
            raise UserError(f"--images {images}: the folder holds no image ({', '.join(sorted(SUFFIXES))})")
        return list(range(1, len(names) + 1)), names, str(images)
    annotations = load_annotations(str(images), key="--images")
    if not os.path.isdir(root) and "://" not in root:
        raise UserError(f"--image-root {root or '(not given)'}: no such folder; give that of the images of {images}")
    return annotations.image_ids.tolist(), annotations.file_names, root


def enlarge(boxes: np.ndarray, scale: float, height: int, width: int) -> np.ndarray:
    """Boxes ``[N, 4]`` grown about their centres and clipped to the image."""
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * scale
    grown = np.concatenate([centre - half, centre + half], axis=1)
    return np.clip(grown, 0, np.array([width, height, width, height]))


@torch.inference_mode()
def name_boxes(
    image: Tensor, boxes: np.ndarray, vit: Vit, nouns: Tensor, *, process: Process, precision: str, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """(noun, cosine) of each box: the noun whose embedding is most like CLIP's global embedding of the crop.

    Args:
        image: uint8 ``[3, H, W]``; boxes: ``[N, 4]`` in its pixels; nouns: ``[M, D]`` of unit length.
        scale: the crop is the box enlarged so many times.
    """
    visual = vit.model.visual
    grown = enlarge(boxes, scale, *image.shape[-2:])
    best, cosine = [], []
    for start in range(0, len(grown), 64):
        crops = torch.stack([crop_region(image, box, visual.image_size) for box in grown[start : start + 64]])
        with autocast(precision, process.device):
            pixels = normalize(crops.to(process.device), visual.image_mean, visual.image_std)
            features = vit.model.encode_image(pixels, normalize=True)
        value, index = (features.float() @ nouns.T).max(dim=1)
        best.append(index.cpu().numpy())
        cosine.append(value.cpu().numpy())
    return np.concatenate(best), np.concatenate(cosine)


def images_with_boxes(
    config: FViTConfig, vit: Vit, checkpoint: str, names: list[str], root: str, *, process: Process, args: Any
) -> Iterator[dict[str, Any]]:
    """Proposals of this process's share of the images, named where nouns are asked for."""
    with as_user_error():
        width = vit.model.visual.embed_dim
        # Proposals need no classes; a detector does.
        detector = build_detector(config, vit.model, torch.ones(2, width), free_vocabulary(["object"]).base_mask)
    load_detector(checkpoint, detector, vit)
    detector = detector.to(process.device).eval()
    loader = test_loader(
        TestDataset(names, root=root, image_size=config.data.image_size),
        batch_size=config.test.batch_size, workers=config.data.workers, rank=process.rank,
        world_size=process.world_size, pin=process.device.type == "cuda",
    )  # fmt: skip
    judge = SkipJudge(str(args.images))
    bar = tqdm(loader, desc="proposals", unit="batch", disable=not process.is_master, mininterval=1)
    for found in detect(
        detector, bar, process=process, precision=config.train.precision, forward=detector.proposals, on_skipped=judge
    ):
        sides = found["boxes"][:, 2:] - found["boxes"][:, :2]
        keep = np.flatnonzero((sides >= 1).all(1) & (found["scores"] >= args.score))[: args.most]
        found = {**found, "boxes": found["boxes"][keep], "scores": found["scores"][keep]}
        yield found
    judge.check(judge.skipped, judge.seen)


def coco_file(found: list[dict[str, Any]], ids: list[int], names: list[str], categories: list[str]) -> dict[str, Any]:
    """COCO json of boxes: ``scores`` and, where there are any, ``nouns`` (rows of ``categories``)."""
    images, annotations = [], []
    for image in found:
        height, width = image["original"]
        images.append({"id": ids[image["index"]], "file_name": names[image["index"]], "height": height, "width": width})
        for i, (x1, y1, x2, y2) in enumerate(image["boxes"].astype(np.float64).round(2).tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": ids[image["index"]],
                    "category_id": int(image["nouns"][i]) + 1 if "nouns" in image else 1,
                    "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                    "area": round((x2 - x1) * (y2 - y1), 2),
                    "iscrowd": 0,
                    "score": round(float(image["scores"][i]), 5),
                }
            )
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories, 1)],
    }


def best_pairs(image: dict[str, Any], most: int, least: float) -> dict[str, Any]:
    """The ``most`` boxes of an image whose noun fits best (training takes the first of each image), best first."""
    order = np.argsort(-image["cosine"], kind="stable")
    order = order[image["cosine"][order] >= least][:most]
    return {**image, "boxes": image["boxes"][order], "nouns": image["nouns"][order], "scores": image["cosine"][order]}


def read_nouns(path: Path | None) -> list[str]:
    """Names, one a line; repeated ones once. UserError when there is none."""
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--nouns {path}: cannot be read ({type(error).__name__}); give a text with one noun a line"
        ) from None
    nouns = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not nouns:
        raise UserError(f"--nouns {path}: it is empty; give a text with one noun a line")
    return nouns


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write the files. UserError for faulty input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="the detector's config")
    parser.add_argument("checkpoint", help="a detector file")
    parser.add_argument("overrides", nargs="*", help="config values: section.key=value")
    parser.add_argument("--images", type=Path, required=True, help="a folder, or a COCO or LVIS json")
    parser.add_argument("--image-root", default="", help="folder of the json's images")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--name", default="coco", help="the files' names begin with it")
    parser.add_argument("--most", type=int, default=100, help="proposals per image")
    parser.add_argument("--score", type=float, default=0.0, help="smallest objectness of a proposal")
    parser.add_argument("--nouns", type=Path, help="text with one noun a line: write region-text pairs as well")
    parser.add_argument("--pairs", type=int, default=20, help="region-text pairs per image")
    parser.add_argument("--cosine", type=float, default=-1.0, help="smallest likeness of crop and noun")
    parser.add_argument("--crop-scale", type=float, default=1.5, help="crops are boxes enlarged so many times")
    parser.add_argument("--clip", default="", help="weights that name the boxes; default: those of the detector")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    args = parser.parse_intermixed_args(argv)
    config = read_config(args.config, args.overrides)
    process = join(args.device)
    setup_logging(process.rank)
    with together():
        nouns = read_nouns(args.nouns)
        ids, names, root = list_images(args.images, args.image_root)
        vit = judge = load_vit(config)
        if args.clip:
            judge = load_vit(replace(config, model=replace(config.model, pretrained=args.clip, cache_dir="")))
    embeddings = None
    if nouns:
        embeddings = broadcast(
            lambda: compute_embeddings(judge.model, judge.tokenizer, nouns, device=process.device, progress=True),
            shape=(len(nouns), judge.model.visual.embed_dim),
        )
        judge.model.visual.to(process.device)
    found = []
    for image in images_with_boxes(config, vit, args.checkpoint, names, root, process=process, args=args):
        if embeddings is not None:
            pixels = read_image(resolve(root, names[image["index"]]))
            image["nouns"], image["cosine"] = (
                name_boxes(
                    pixels, image["boxes"], judge, embeddings.to(process.device), process=process,
                    precision=config.train.precision, scale=args.crop_scale,
                )
                if len(image["boxes"])
                else (np.zeros(0, np.int64), np.zeros(0, np.float32))
            )  # fmt: skip
        found.append(image)
    parts = gather_to_master(found)
    if parts is not None:
        everything = sorted((image for part in parts for image in part), key=lambda image: image["index"])
        _write(everything, ids, names, nouns, embeddings, args)
    leave()


def _write(
    found: list[dict[str, Any]],
    ids: list[int],
    names: list[str],
    nouns: list[str],
    embeddings: Tensor | None,
    args: Any,
) -> None:
    plain = [{k: v for k, v in image.items() if k not in ("nouns", "cosine")} for image in found]
    outputs = {args.out / f"{args.name}_proposals.json": coco_file(plain, ids, names, ["object"])}
    if embeddings is not None:
        pairs = [best_pairs(image, args.pairs, args.cosine) for image in found]
        stem = f"{args.name}_pseudo_{len(nouns)}"
        outputs[args.out / f"{stem}.json"] = coco_file(pairs, ids, names, nouns)
    for path, content in outputs.items():
        write_json(path, content)
        print(f"{path}: {len(content['images'])} images, {len(content['annotations'])} boxes")
    if embeddings is not None:
        path = args.out / f"{stem}_embeddings.npy"
        np.save(path, embeddings.numpy().astype(np.float32))
        print(f"{path}: {tuple(embeddings.shape)}")


if __name__ == "__main__":
    run(main)
