"""Show what a model sees where: an image beside its dense class map, for class names of your choice.

Each cell of the dense embedding takes the class whose text embedding is nearest by cosine. Several checkpoints stand
side by side, so that a start model and a distilled one can be compared.

Examples:
    python tools/show_dense_map.py --model EVA02-CLIP-B-16 --pretrained eva.pt clipself.pt --image street.jpg \\
        --classes person car road sky tree --output map.png
    python tools/show_dense_map.py --model ViT-B-16 --pretrained openai --image a.jpg b.jpg \\
        --classes-from panoptic_val2017.json --size 768 --output map.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from open_clip.factory import add_model_config, create_model, get_tokenizer
from open_clip.model import CLIP
from open_clip.transform import normalize, pad_to, resize_longest
from training.class_embeddings import load_or_compute
from training.engine.data.images import ImageError, read_image
from training.engine.errors import UserError

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend without a screen)

LEGEND = 12  # classes named beside a map, those with the largest areas


@torch.inference_mode()
def dense_class_map(model: CLIP, image: Tensor, embeddings: Tensor, size: int) -> Tensor:
    """Class of every pixel.

    Args:
        model: image tower and preparation constants are used.
        image: uint8 ``[3, H, W]``.
        embeddings: unit-length class embeddings ``[C, D]``.
        size: longest side of the model's input, a multiple of the patch size.

    Returns:
        int64 ``[H, W]``, labels 0..C-1; similarities are interpolated bilinearly between cells.
    """
    device = next(model.parameters()).device
    resized = resize_longest(image, size)
    pixels = normalize(pad_to(resized, size)[None].to(device), model.visual.image_mean, model.visual.image_std)
    dense = model.encode_dense(pixels, keep_shape=True)[0].float()
    similarity = torch.einsum("dhw,cd->chw", dense, embeddings.to(device))
    # From cells to input pixels (only the image's own), then to the pixels of the file.
    scaled = F.interpolate(similarity[None], (size, size), mode="bilinear", align_corners=False)
    scaled = scaled[..., : resized.shape[1], : resized.shape[2]]
    return F.interpolate(scaled, tuple(image.shape[1:]), mode="bilinear", align_corners=False)[0].argmax(0).cpu()


def class_colours(count: int) -> np.ndarray:
    """Colours in 0..1, ``[count, 3]``, well apart for neighbouring labels (golden-ratio hues)."""
    index = np.arange(count)
    hsv = np.stack([index * 0.618034 % 1, 0.55 + 0.4 * (index % 2), 0.95 - 0.3 * (index // 2 % 2)], -1)
    return matplotlib.colors.hsv_to_rgb(hsv)


def draw(images: list[Tensor], maps: list[list[Tensor]], titles: list[str], names: list[str], opacity: float):
    """Figure with a row per image: the photograph, then one map per model with the names of its largest classes."""
    colours = class_colours(len(names))
    columns = 1 + len(titles)
    heights = [0.4 + 4.5 * image.shape[1] / image.shape[2] for image in images]  # inches
    figure, axes = plt.subplots(
        len(images),
        columns,
        figsize=(5.5 * columns, sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for row, image, row_maps in zip(axes, images, maps, strict=True):
        picture = image.permute(1, 2, 0).numpy() / 255
        row[0].imshow(picture)
        for axis, title, classes in zip(row[1:], titles, row_maps, strict=True):
            axis.imshow((1 - opacity) * picture + opacity * colours[classes.numpy()])
            area = np.bincount(classes.flatten().numpy(), minlength=len(names)) / classes.numel()
            largest = [label for label in area.argsort()[::-1][:LEGEND] if area[label] > 0.002]
            handles = [matplotlib.patches.Patch(color=colours[i], label=f"{names[i]} {area[i]:.0%}") for i in largest]
            axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
            axis.set_title(title, fontsize=9)
        for axis in row:
            axis.axis("off")
    return figure


def read_names(path: str) -> list[str]:
    """Class names: the categories of a COCO-style json in the order of their ids, or the lines of a text file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".json"):
            content = json.loads(text)
            names = content["categories"] if isinstance(content, dict) else content
            if names and isinstance(names[0], dict):
                names = [category["name"] for category in sorted(names, key=lambda category: category["id"])]
        else:
            names = [line.strip() for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--classes-from {path}: no class names could be read ({error})") from None
    return names


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name of the model, or the path of its config json")
    parser.add_argument("--pretrained", nargs="+", default=[""], help="tags or checkpoint files, one map each")
    parser.add_argument("--cache-dir", default=None, help="folder of downloads; the checkpoint for --pretrained eva")
    parser.add_argument("--image", nargs="+", required=True, help="image files, one row each")
    parser.add_argument("--classes", nargs="+", default=None, help="class names")
    parser.add_argument("--classes-from", default=None, help="COCO-style json, or a text file with a name per line")
    parser.add_argument("--embed-path", default="", help="class embeddings (.npy, .pt) instead of the text tower's")
    parser.add_argument("--size", type=int, default=512, help="longest side of the model's input")
    parser.add_argument("--opacity", type=float, default=0.65, help="of the map over the image, 0 to 1")
    parser.add_argument("--output", required=True, help="picture to write (.png, .jpg, .pdf)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Make the picture; UserError, ValueError or OSError with one line when something is wrong."""
    if not (args.classes or args.classes_from):
        raise UserError("give class names with --classes, or a file of them with --classes-from")
    names = [*(args.classes or []), *(read_names(args.classes_from) if args.classes_from else [])]
    images = [read_image(path) for path in args.image]
    name = args.model
    if name.endswith(".json"):
        name = Path(name).stem
        add_model_config(args.model, name)
    maps: list[list[Tensor]] = [[] for _ in images]
    for pretrained in args.pretrained:
        model = create_model(name, pretrained, device=args.device, cache_dir=args.cache_dir).eval()
        if args.size < 1 or args.size % model.visual.patch_size:
            raise UserError(f"--size {args.size}: not a multiple of the model's patch size {model.visual.patch_size}")
        tokenizer = None if args.embed_path else get_tokenizer(name)
        embeddings = load_or_compute(args, model, tokenizer, names, names_file=args.classes_from or "--classes")
        for row, image in zip(maps, images, strict=True):
            row.append(dense_class_map(model, image, embeddings, args.size))
    titles = [Path(pretrained).name or "random weights" for pretrained in args.pretrained]
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    draw(images, maps, titles, names, args.opacity).savefig(args.output, dpi=110)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except (UserError, ImageError, ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
