"""Class embeddings of a model's text tower, by the ensemble of prompts, for --embed-path and --train-embed-path.

Examples:
    python tools/generate_text_embeddings.py --model EVA02-CLIP-B-16 --pretrained eva \\
        --cache-dir checkpoints/EVA02_CLIP_B_psz16_s8B.pt --names data/coco/annotations/panoptic_val2017.json \\
        --out metadata/coco_panoptic_clip_hand_craft_EVACLIP_ViTB16.npy
    python tools/generate_text_embeddings.py --model ViT-B-16 --pretrained openai --names my_classes.txt --background \\
        --out my_classes.pt
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

import open_clip
from open_clip.prompts import class_embeddings


def read_names(path: Path) -> list[str]:
    """Class names of a file: an annotation file's categories in the order of their ids, a json list, or lines of text.

    Raises:
        ValueError: no text in UTF-8, no json, or no names in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error
    if path.suffix != ".json":
        names = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not json: {error}") from error
        entries = content.get("categories") if isinstance(content, dict) else content
        entries = entries if isinstance(entries, list) else []
        if all(isinstance(e, dict) and isinstance(e.get("id"), int) for e in entries):
            entries = [e.get("name") for e in sorted(entries, key=lambda e: e["id"])]
        names = entries if all(isinstance(e, str) and e.strip() for e in entries) else []
    if not names:
        raise ValueError(
            f"{path} holds no class names: give a COCO-style json, a json list of names, or one name a line"
        )
    return names


def save(path: Path, names: list[str], features: torch.Tensor) -> None:
    """``.npy``: float32 ``[C, D]``; ``.pt``: a dict from name to ``[D]``. Complete or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            if path.suffix == ".pt":
                torch.save({name: row.clone() for name, row in zip(names, features, strict=True)}, file)
            else:
                np.save(file, features.numpy())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name of the model, or its config json")
    parser.add_argument("--pretrained", default="", help='tag, checkpoint file, or "eva" with --cache-dir')
    parser.add_argument("--cache-dir", default=None, help="download cache; with --pretrained eva the checkpoint file")
    parser.add_argument("--names", required=True, type=Path, help="annotation json, json list, or text file of names")
    parser.add_argument("--background", action="store_true", help='add a last class "background" (for the detector)')
    parser.add_argument("--out", required=True, type=Path, help=".npy (array in the order of the names) or .pt (dict)")
    parser.add_argument("--batch-size", type=int, default=256, help="prompts embedded at a time (default 256)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    args = parser.parse_args(argv)
    if args.out.suffix not in (".npy", ".pt"):
        parser.error(f"--out {args.out}: use a name that ends in .npy or .pt")
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: use at least 1")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: no CUDA device here; use cpu")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.model.endswith(".json"):
            open_clip.add_model_config(args.model, Path(args.model).stem)
            args.model = Path(args.model).stem
        names = read_names(args.names) + (["background"] if args.background else [])
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated and args.out.suffix == ".pt":
            raise ValueError(
                f'{args.names}: the name "{repeated[0]}" stands there more than once (with --background, "background" '
                "counts too), and a dict keeps one of each: rename it, or write an array (.npy)"
            )
        args.out.parent.mkdir(parents=True, exist_ok=True)  # now rather than after minutes of work
        model = open_clip.create_model(args.model, args.pretrained, device=args.device, cache_dir=args.cache_dir).eval()
        tokenizer = open_clip.get_tokenizer(args.model)
        features = class_embeddings(model, tokenizer, names, batch_size=args.batch_size, progress=True)
        save(args.out, names, features)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"generate_text_embeddings: {error}", file=sys.stderr)
        return 2
    if not args.pretrained:
        print("note: random weights (no --pretrained)", file=sys.stderr)
    print(f"{args.out}: {features.shape[0]} classes, {features.shape[1]} dimensions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
