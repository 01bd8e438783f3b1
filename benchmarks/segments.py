"""How well features tell whether two patches of an image lie in one segment: the AUC of their similarity.

    python benchmarks/segments.py --data data/scenes [--trunk checkpoints/vit_s_focus.safetensors] [--size 224]

On data where plain colour separates segments, a correlation loss has nothing to teach. ``training.scenes
--exchange-colors`` draws scenes for which colour is below 0.6 and a trained trunk above 0.75.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "src")]
from foundation import TRUNK  # noqa: E402

from open_clip import CLIP, ImageTower  # noqa: E402
from open_clip.transform import normalize, resize  # noqa: E402
from training.engine.data.images import read_image  # noqa: E402
from training.engine.data.masks import read_segment_ids  # noqa: E402
from training.teachers.build import foundation_map  # noqa: E402

PURE = 0.9  # share of a patch that must belong to one segment for the patch to count
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Features = Callable[[Tensor], Tensor]  # uint8 image [3, S, S] -> similarities [N, N] of its cells


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a random positive scores above a random negative; ties count half."""
    values, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2)[inverse]
    p = int(positive.sum())
    n = len(positive) - p
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * n)) if p and n else float("nan")


def pure_cells(ids: np.ndarray, grid: int) -> np.ndarray:
    """Segment of each cell ``[grid * grid]`` that lies in one, -1 of the others; ``ids`` is ``[H, W]``, square."""
    rows, columns = (np.arange(n) * grid // n for n in ids.shape)
    cell = rows[:, None] * grid + columns[None]
    labels, number = np.unique(ids, return_inverse=True)
    table = np.zeros((grid * grid, len(labels)))
    np.add.at(table, (cell.ravel(), number.ravel()), 1)
    share = table / table.sum(1, keepdims=True)
    share[:, labels == 0] = 0  # pixels of no segment
    return np.where(share.max(1) >= PURE, share.argmax(1), -1)


def by_colour(grid: int) -> Features:
    """Similarity by mean colour: minus the distance of the cells' means."""

    def similar(image: Tensor) -> Tensor:
        means = F.adaptive_avg_pool2d(image.float()[None], grid)[0].flatten(1).T
        return -torch.cdist(means, means)

    return similar


def by_trunk(file: str | Path | None, grid: int) -> Features:
    """Cosine of the patch tokens of a DINOv2-S-shaped trunk; random weights without a file."""
    trunk = timm.create_model(TRUNK, num_classes=0, dynamic_img_size=True)
    if file is not None:
        trunk.load_state_dict(load_file(str(file)))
    tower = ImageTower(trunk.eval(), image_size=518, image_mean=IMAGENET[0], image_std=IMAGENET[1])
    side = grid * tower.patch_size

    def similar(image: Tensor) -> Tensor:
        with torch.inference_mode():
            cells = foundation_map(tower, normalize(resize(image[None], side, side), *IMAGENET))
        cells = F.normalize(cells[0].flatten(1).T, dim=-1)
        return cells @ cells.T

    return similar


def by_model(model: CLIP, grid: int, readout: str | None = None) -> Features:
    """Cosine of a model's dense embeddings, by its own reading or another."""

    def similar(image: Tensor) -> Tensor:
        side, visual = grid * model.visual.patch_size, model.visual
        with torch.inference_mode():
            pixels = normalize(resize(image[None], side, side), visual.image_mean, visual.image_std)
            cells = model.encode_dense(pixels, normalize=True, readout=readout)[0]
        return cells @ cells.T

    return similar


def same_segment(data: str | Path, features: dict[str, Features], grid: int, most: int = 24) -> dict[str, float]:
    """Mean AUC over the validation images of a data set in COCO's panoptic layout, by name of the features."""
    data = Path(data)
    found = image_aucs(data / "annotations/panoptic_val2017.json", data / "val2017", features, grid, most)
    return {name: float(np.nanmean(values)) for name, values in found.items()}


def image_aucs(
    annotations: str | Path, root: str | Path, features: dict[str, Features], grid: int, most: int | None = None
) -> dict[str, list[float]]:
    """AUC of each image by name of the features; NaN for an image without pairs of both kinds.

    Args:
        annotations: COCO's panoptic json, its PNGs in the folder of its name; pixels of no segment (id 0) do not count.
        root: of the images.
        most: images at most.
    """
    annotations, root = Path(annotations), Path(root)
    content = json.loads(annotations.read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    found: dict[str, list[float]] = {name: [] for name in features}
    for annotation in content["annotations"][:most]:
        image = read_image(str(root / names[annotation["image_id"]]))
        ids = read_segment_ids(str(annotations.with_suffix("") / annotation["file_name"]))
        side = min(ids.shape) // grid * grid  # cells are squares of whole pixels
        cells = pure_cells(ids[:side, :side], grid)
        first, second = np.triu_indices(len(cells), 1)
        both = (cells[first] >= 0) & (cells[second] >= 0)
        first, second = first[both], second[both]
        for name, function in features.items():
            similar = function(image[:, :side, :side]).numpy()
            found[name].append(auc(similar[first, second], cells[first] == cells[second]))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder in COCO's panoptic layout, as training.scenes writes it")
    parser.add_argument("--trunk", help="weights of a DINOv2-S-shaped trunk; see foundation.py")
    parser.add_argument("--grid", type=int, default=16, help="cells of a side (16)")
    parser.add_argument("--images", type=int, default=24, help="images at most (24)")
    args = parser.parse_args(argv)
    features = {"colour": by_colour(args.grid)}
    if args.trunk:
        features |= {"trunk": by_trunk(args.trunk, args.grid), "random trunk": by_trunk(None, args.grid)}
    for name, value in same_segment(args.data, features, args.grid, args.images).items():
        print(f"{name:<14} AUC {value:.3f}")


if __name__ == "__main__":
    main()
