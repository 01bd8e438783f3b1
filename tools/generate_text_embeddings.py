"""Class embeddings of a model's text tower, by the ensemble of prompts, for --embed-path and --train-embed-path.

Examples:
    python tools/generate_text_embeddings.py --model EVA02-CLIP-B-16 --pretrained eva \\
        --cache-dir checkpoints/EVA02_CLIP_B_psz16_s8B.pt --classes-from data/coco/annotations/panoptic_val2017.json \\
        --out metadata/coco_panoptic_clip_hand_craft_EVACLIP_ViTB16.npy
    python tools/generate_text_embeddings.py --model ViT-B-16 --pretrained openai --classes dog,cat --background \\
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
from training.engine.distributed import init_distributed
from training.engine.errors import UserError, as_user_error, run_program
from training.engine.flags import COUNT, PATH, Parser


def read_names(path: Path) -> list[str]:
    """Class names of a file: an annotation file's categories in the order of their ids, a json list, or lines of text.

    Raises:
        ValueError: no text in UTF-8, no json, or no names in it.
        OSError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
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
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name of the model, or its config json")
    parser.add_argument("--pretrained", default="", help='tag, checkpoint file, or "eva" with --cache-dir')
    parser.add_argument("--cache-dir", default=None, help="download cache; with --pretrained eva the checkpoint file")
    parser.add_argument("--classes", nargs="+", default=[], help="names, divided by spaces or commas")
    # --names is what this flag was called first.
    parser.add_argument(
        "--classes-from", "--names", type=PATH, metavar="FILE", help="annotation json, json list, or text file of names"
    )
    parser.add_argument("--background", action="store_true", help='add a last class "background" (for the detector)')
    parser.add_argument("--out", required=True, type=PATH, help=".npy (array in the order of the names) or .pt (dict)")
    parser.add_argument("--batch-size", type=COUNT, default=256, help="prompts embedded at a time (default 256)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU if there is one, by default")
    args = parser.parse_args(argv)
    if args.out.suffix not in (".npy", ".pt"):
        raise UserError(f"--out {args.out}: use a name that ends in .npy or .pt")
    if bool(args.classes) == bool(args.classes_from):
        raise UserError("give names with --classes, or a file of them with --classes-from")
    return args


def chosen_names(args: argparse.Namespace) -> list[str]:
    """The class names that the flags give.

    Raises:
        UserError: none.
    """
    if args.classes:
        names = [name.strip() for text in args.classes for name in text.split(",") if name.strip()]
        if not names:
            raise UserError(f"--classes {' '.join(args.classes)}: holds no name")
    else:
        if not args.classes_from.is_file():
            hint = "; names themselves go to --classes" if "," in str(args.classes_from) else ": check the path"
            raise UserError(f"--classes-from {args.classes_from}: no such file{hint}")
        names = read_names(args.classes_from)
    return names + (["background"] if args.background else [])


def main(argv: list[str] | None = None) -> int:
    """The program; see :func:`~training.engine.errors.run_program` for its exit status."""
    return run_program(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    args = parse_args(argv)
    device = init_distributed(args.device).device
    with as_user_error():
        if args.model.endswith(".json"):
            open_clip.add_model_config(args.model, Path(args.model).stem)
            args.model = Path(args.model).stem
        names = chosen_names(args)
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated and args.out.suffix == ".pt":
            raise ValueError(
                f'{args.classes_from or "--classes"}: the name "{repeated[0]}" stands there more than once (with '
                '--background, "background" counts too), and a dict keeps one of each: rename it, or write an array '
                "(.npy)"
            )
        model = open_clip.create_model(args.model, args.pretrained, device=device, cache_dir=args.cache_dir).eval()
        tokenizer = open_clip.get_tokenizer(args.model)
        args.out.parent.mkdir(parents=True, exist_ok=True)  # now rather than after minutes of work
        features = class_embeddings(model, tokenizer, names, batch_size=args.batch_size, progress=True)
        save(args.out, names, features)
    if not args.pretrained:
        print("note: random weights (no --pretrained)", file=sys.stderr)
    print(f"{args.out}: {features.shape[0]} classes, {features.shape[1]} dimensions")


if __name__ == "__main__":
    sys.exit(main())
