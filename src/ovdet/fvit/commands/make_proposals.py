"""Class-agnostic proposals, and region-text pairs, for images of your own with a trained detector.

    python tools/make_proposals.py CONFIG CHECKPOINT --images data/coco/annotations/instances_train2017.json \\
        --image-root data/coco/train2017 --out data/coco --name mine [--nouns nouns.txt]

Writes ``NAME_proposals.json`` (boxes for CLIPSelf's region-proposal training). With ``--nouns`` (one name a line) also
``NAME_pseudo_N.json``, where each box has the noun that CLIP finds most like its crop, and
``NAME_pseudo_N_embeddings.npy``, the N nouns' embeddings: the training data of RegionCLIP. ``--images`` is a folder,
or a COCO or LVIS json whose image ids are kept. Files that are there are replaced with ``--force`` alone:
``coco_proposals.json`` in ``data/coco`` is the published file. torchrun shares the work among processes.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from open_clip.transform import crop_region, normalize
from ovdet.clip import Clip
from ovdet.data.images import read_image
from ovdet.fvit.assemble import load_into, load_vit, read_config
from ovdet.fvit.config import FViTConfig
from ovdet.fvit.detector import build_detector
from ovdet.listing import check_folder, read_names
from ovdet.precision import choose_precision
from ovdet.task import FLAGS
from ovdet.testing import Images
from ovdet.vocabulary import free_vocabulary, noun_embeddings
from training.engine.data.boxes_file import boxes_file
from training.engine.data.folder import list_images
from training.engine.data.images import resolve
from training.engine.data.workers import Loader
from training.engine.distributed import Dist, gather_to_master, init_distributed, together
from training.engine.errors import UserError, as_user_error, run_program
from training.engine.files import write_json
from training.engine.flags import COUNT, PATH, POSITIVE, SHARE, Parser, number, spelling
from training.engine.journal import setup_logging
from training.engine.precision import Precision

log = logging.getLogger(__name__)

PAIR_DEFAULTS = {"pairs": 20, "cosine": -1.0, "crop_scale": 1.5, "clip": ""}  # flags that say something with --nouns


def enlarge(boxes: np.ndarray, scale: float, height: int, width: int) -> np.ndarray:
    """Boxes ``[N, 4]`` grown about their centres and clipped to the image."""
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * scale
    grown = np.concatenate([centre - half, centre + half], axis=1)
    return np.clip(grown, 0, np.array([width, height, width, height]))


class Crops(Dataset):
    """Crops of boxes, cut by worker processes.

    Items: uint8 ``[N, 3, size, size]`` of image i's boxes, each enlarged ``scale`` times.
    """

    def __init__(
        self, files: Sequence[str], boxes: Sequence[np.ndarray], *, size: int, scale: float, exif: bool
    ) -> None:
        self.files, self.boxes, self.size, self.scale, self.exif = files, boxes, size, scale, exif

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        image = read_image(self.files[index], exif=self.exif)
        grown = enlarge(self.boxes[index], self.scale, *image.shape[-2:])
        return torch.stack([crop_region(image, box, self.size) for box in grown])


@torch.inference_mode()
def name_boxes(
    found: list[dict[str, Any]], files: Sequence[str], vit: Clip, nouns: Tensor, *, dist: Dist, precision: Precision,
    scale: float, workers: int, exif: bool,
) -> None:  # fmt: skip
    """Add ``nouns`` and ``cosine`` to images: for each box the noun most like CLIP's global embedding of its crop.

    Args:
        files: path of each image; nouns: ``[M, D]`` of unit length.
        scale: the crop is the box enlarged so many times.
        workers: processes that read images and cut crops.
    """
    visual = vit.model.visual.to(dist.device)
    table = nouns.to(dist.device)
    for image in found:
        image |= {"nouns": np.zeros(0, np.int64), "cosine": np.zeros(0, np.float32)}
    filled = [i for i, image in enumerate(found) if len(image["boxes"])]
    dataset = Crops(
        [files[i] for i in filled], [found[i]["boxes"] for i in filled], size=visual.image_size, scale=scale, exif=exif
    )
    loader = Loader(dataset, workers=workers, batch_size=None)
    bar = tqdm(loader, desc="nouns", unit="img", disable=not dist.is_master, mininterval=1)
    for i, crops in zip(filled, bar, strict=True):
        best = []
        for part in crops.split(64):
            with precision.autocast():
                pixels = normalize(part.to(dist.device, non_blocking=True), visual.image_mean, visual.image_std)
                features = vit.model.encode_image(pixels, normalize=True)
            best.append(torch.stack((features.float() @ table.T).max(dim=1), 1))
        cosine, noun = torch.cat(best).cpu().unbind(1)
        found[i] |= {"nouns": noun.long().numpy(), "cosine": cosine.numpy()}


def find_proposals(
    config: FViTConfig, vit: Clip, checkpoint: str, names: list[str], root: str, *, dist: Dist, args: Any
) -> Iterator[dict[str, Any]]:
    """Proposals of this process's share of the images. UserError where too many of these cannot be read."""
    with as_user_error():
        width = vit.model.visual.embed_dim
        # Proposals need no classes; a detector does.
        detector = build_detector(config, vit.model, torch.ones(2, width), free_vocabulary(["object"]).base_mask)
    load_into(checkpoint, detector, config, vit)
    detector = detector.to(dist.device).eval()
    images = Images(config, names, root, source=f"--images {args.images}", title="proposals", dist=dist)
    for found in images.detections(detector, detector.proposals):
        sides = found["boxes"][:, 2:] - found["boxes"][:, :2]
        keep = np.flatnonzero((sides >= 1).all(1) & (found["scores"] >= args.score))[: args.most]
        yield {**found, "boxes": found["boxes"][keep], "scores": found["scores"][keep]}
    images.policy.judge(at_end=True)


def best_pairs(image: dict[str, Any], most: int, least: float) -> dict[str, Any]:
    """The ``most`` boxes of an image whose noun fits best (training takes the first of each image), best first."""
    order = np.argsort(-image["cosine"], kind="stable")
    order = order[image["cosine"][order] >= least][:most]
    return {**image, "boxes": image["boxes"][order], "nouns": image["nouns"][order], "scores": image["cosine"][order]}


def read_nouns(path: Path | None) -> list[str]:
    """Names, one a line; repeated ones once. UserError when there is none."""
    if path is None:
        return []
    if not path.is_file():
        raise UserError(f"--nouns {path}: no such file; give a text with one noun a line")
    return read_names(str(path), "--nouns", once=False)


def check_flags(args: argparse.Namespace) -> None:
    """Fill in the flags of region-text pairs. UserError where they would do nothing, or files would have no name."""
    if not args.name.strip():
        raise UserError('--name "": give what the files\' names begin with, such as coco')
    given = [spelling(name) for name in PAIR_DEFAULTS if getattr(args, name) is not None]
    if given and args.nouns is None:
        raise UserError(f"{', '.join(given)} without --nouns: no region-text pairs are written; give --nouns FILE too")
    for name, default in PAIR_DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def targets_of(args: argparse.Namespace, nouns: Sequence[str]) -> list[Path]:
    """Files that are to be written: proposals and, with nouns, region-text pairs and the nouns' embeddings.

    Raises:
        UserError: one of them is there and ``--force`` is not given, or the folder is a file.
    """
    check_folder(args.out, "--out")
    stem = f"{args.name}_pseudo_{len(nouns)}"
    names = [f"{args.name}_proposals.json", *([f"{stem}.json", f"{stem}_embeddings.npy"] if nouns else [])]
    targets = [args.out / name for name in names]
    there = [target for target in targets if target.exists()]
    if there and not args.force:
        raise UserError(f"{there[0]} exists: choose another --name or --out, or add --force")
    return targets


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write the files. UserError for faulty input."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="the detector's config")
    parser.add_argument("checkpoint", help="a detector file")
    parser.add_argument("overrides", nargs="*", help="config values: section.key=value")
    parser.add_argument("--images", type=PATH, required=True, help="a folder, or a COCO or LVIS json")
    parser.add_argument("--image-root", default="", help="folder of the json's images")
    parser.add_argument("--out", type=PATH, required=True, help="folder to write to")
    parser.add_argument("--name", default="coco", help="the files' names begin with it")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    parser.add_argument("--most", type=COUNT, default=100, help="proposals per image")
    parser.add_argument("--score", type=SHARE, default=0.0, help="smallest objectness of a proposal")
    parser.add_argument("--nouns", type=PATH, help="text with one noun a line: write region-text pairs as well")
    parser.add_argument("--pairs", type=COUNT, help="region-text pairs per image (20)")
    parser.add_argument("--cosine", type=number(float, -1, 1), help="smallest likeness of crop and noun (-1)")
    parser.add_argument("--crop-scale", type=POSITIVE, help="crops are boxes enlarged so many times (1.5)")
    parser.add_argument("--clip", help="weights that name the boxes; default: those of the detector")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    args = parser.parse_intermixed_args(argv)
    check_flags(args)
    config = read_config(args.config, args.overrides)
    dist = init_distributed(args.device)
    setup_logging(dist.rank)
    with together():
        nouns = read_nouns(args.nouns)
        targets = targets_of(args, nouns)
        ids, names, root = list_images(args.images, args.image_root)
        vit = judge = load_vit(config)
        if args.clip:
            judge = load_vit(replace(config, model=replace(config.model, pretrained=args.clip, cache_dir="")))
    embeddings = None
    if nouns:
        embeddings = noun_embeddings(judge.model, judge.tokenizer, nouns, device=dist.device, progress=dist.is_master)
    found = list(find_proposals(config, vit, args.checkpoint, names, root, dist=dist, args=args))
    if embeddings is not None:
        files = [resolve(root, names[image["index"]]) for image in found]
        name_boxes(
            found, files, judge, embeddings, dist=dist, scale=args.crop_scale, workers=config.data.workers,
            precision=choose_precision(config.train, dist.device, training=False), exif=config.data.exif,
        )  # fmt: skip
    parts = gather_to_master(found)
    if parts is not None:
        everything = sorted((image for part in parts for image in part), key=lambda image: image["index"])
        _write(everything, ids, names, nouns, embeddings, args, targets)


def _write(
    found: list[dict[str, Any]],
    ids: list[int],
    names: list[str],
    nouns: list[str],
    embeddings: Tensor | None,
    args: Any,
    targets: Sequence[Path],
) -> None:
    plain = [{k: v for k, v in image.items() if k not in ("nouns", "cosine")} for image in found]
    outputs = {targets[0]: boxes_file(plain, ids, names, ["object"])}
    if embeddings is not None:
        pairs = [best_pairs(image, args.pairs, args.cosine) for image in found]
        outputs[targets[1]] = boxes_file(pairs, ids, names, nouns)
    for path, content in outputs.items():
        write_json(path, content)
        print(f"{path}: {len(content['images'])} images, {len(content['annotations'])} boxes")
    if embeddings is not None:
        np.save(targets[2], embeddings.numpy().astype(np.float32))
        print(f"{targets[2]}: {tuple(embeddings.shape)}")


def run() -> int:
    """The command line of this process; gives its exit status."""
    return run_program(main, FLAGS)
