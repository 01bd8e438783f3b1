"""A small image-text model on real photographs: a trained trunk and a linear head into a space of real text embeddings.

No weights of a real CLIP are needed: the trunk is :mod:`foundation`'s, the texts are embeddings of class names by a
real CLIP, and the head is learned from labelled crops of the training photographs. What comes out is an ordinary model
of ``open_clip`` (a config file and weights), whose dense behaviour can be measured and distilled like any other's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "src")]
from foundation import TRUNK  # noqa: E402

import open_clip  # noqa: E402
from open_clip.transform import crop_region, normalize  # noqa: E402
from training.engine.data.annotations import load_annotations  # noqa: E402
from training.engine.data.images import read_image, resolve  # noqa: E402

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIDES = (1.0, 1.5, 2.0)  # of a crop, in sides of its object's box
LEAST = 16  # pixels of an object's shorter side
SCALE = 50.0  # of the cosines in the head's loss
DECAYS = (1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 4


@dataclass
class Crops:
    """Labelled crops.

    Attributes:
        pixels: uint8 ``[N, 3, s, s]``.
        labels: int64 ``[N]``, rows of the class embeddings.
        images: int64 ``[N]``, the photograph that each is of.
    """

    pixels: Tensor
    labels: Tensor
    images: Tensor


def labelled_crops(annotations: str, root: str, names: Sequence[str], size: int) -> Crops:
    """Crops of the objects of photographs, each in three sizes around its box and mirrored.

    Args:
        annotations: COCO instances; root: of the photographs.
        names: classes; objects of others are left out.
        size: side of a crop in pixels.
    """
    content = load_annotations(annotations, labelled=True)
    row_of = {name: row for row, name in enumerate(names)}
    pixels, labels, images = [], [], []
    for index in tqdm(range(len(content)), desc="crops", unit="img", mininterval=1, dynamic_ncols=True):
        image = read_image(resolve(root, content.file_name(index)))
        for entry in range(content.offsets[index], content.offsets[index + 1]):
            name, box = content.names[content.labels[entry]], content.boxes[entry]
            side = box[2:] - box[:2]
            if content.crowd[entry] or name not in row_of or side.min() < LEAST:
                continue
            centre, limit = (box[:2] + box[2:]) / 2, np.asarray(image.shape[:0:-1], np.float32)
            for factor in SIDES:
                low, high = (np.clip(centre + sign * factor * side / 2, 0, limit) for sign in (-1, 1))
                crop = crop_region(image, [*low.tolist(), *high.tolist()], size)
                pixels += [crop, crop.flip(-1)]
                labels += [row_of[name]] * 2
                images += [index] * 2
    return Crops(torch.stack(pixels), torch.tensor(labels), torch.tensor(images))


def write_config(file: Path, size: int, width: int) -> None:
    """The model's config: the trunk and a linear projection; its text tower is never asked."""
    vision = {"timm_model_name": TRUNK, "timm_pool": "token", "timm_proj": "linear", "timm_proj_bias": True,
              "image_size": size}  # fmt: skip
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    content = {"model_cfg": {"embed_dim": width, "vision_cfg": vision, "text_cfg": text},
               "preprocess_cfg": {"mean": IMAGENET[0], "std": IMAGENET[1]}}  # fmt: skip
    file.write_text(json.dumps(content, indent=1) + "\n")


@torch.inference_mode()
def class_tokens(trunk: torch.nn.Module, pixels: Tensor) -> Tensor:
    """The trunk's pooled state of each crop, float32 ``[N, W]``."""
    parts = []
    for part in tqdm(pixels.split(64), desc="class tokens", mininterval=1, dynamic_ncols=True):
        parts.append(trunk.forward_head(trunk.forward_features(normalize(part, *IMAGENET)), pre_logits=True))
    return torch.cat(parts)


def fit(features: Tensor, labels: Tensor, embeddings: Tensor, decay: float, steps: int = 300) -> tuple[Tensor, Tensor]:
    """(weight ``[D, W]``, bias ``[D]``) by cross-entropy of scaled cosines with all class embeddings.

    Features are standardised for the optimizer's sake; the result reads them as they are.
    """
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    inputs = (features - mean) / std
    weight = torch.zeros(embeddings.shape[1], features.shape[1])
    torch.nn.init.normal_(weight, std=features.shape[1] ** -0.5, generator=torch.Generator().manual_seed(0))
    weight.requires_grad_()
    bias = torch.zeros(embeddings.shape[1], requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=1e-2, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        cosines = F.normalize(inputs @ weight.T + bias, dim=1) @ embeddings.T
        F.cross_entropy(SCALE * cosines, labels).backward()
        optimizer.step()
        schedule.step()
    weight, bias = weight.detach() / std, bias.detach()
    return weight, bias - weight @ mean


def choose_decay(features: Tensor, crops: Crops, embeddings: Tensor) -> tuple[float, dict[float, float]]:
    """The weight decay that is best on photographs left out in turn, and the accuracy of each (a share)."""
    folds = torch.randperm(int(crops.images.max()) + 1, generator=torch.Generator().manual_seed(0)) % FOLDS
    fold = folds[crops.images]
    accuracy = {}
    for decay in DECAYS:
        right = 0
        for left_out in range(FOLDS):
            own = fold != left_out
            weight, bias = fit(features[own], crops.labels[own], embeddings, decay)
            found = ((features[~own] @ weight.T + bias) @ embeddings.T).argmax(1)
            right += int((found == crops.labels[~own]).sum())
        accuracy[decay] = right / len(crops.labels)
    return max(accuracy, key=accuracy.get), accuracy


def make_model(
    out: Path, trunk: Path, annotations: str, root: str, names: Sequence[str], embeddings: Tensor, size: int
) -> dict:
    """Write ``photographs.json`` and ``photographs.safetensors`` into a folder; what the head's data and accuracy are.

    Args:
        trunk: weights, see :func:`foundation.weights_file`.
        annotations, root: of the training photographs, see :func:`labelled_crops`.
        names, embeddings: C classes and their text embeddings ``[C, D]``, of unit length.
        size: pixels of a crop.
    """
    config = out / "photographs.json"
    write_config(config, size, embeddings.shape[1])
    open_clip.add_model_config(config, "photographs")
    torch.manual_seed(0)
    model = open_clip.create_model("photographs", pretrained=None).eval()
    inner = model.visual.trunk
    missing = inner.load_state_dict(fitting(load_file(str(trunk)), inner), strict=False)
    assert not missing.unexpected_keys and all(key.startswith("head") for key in missing.missing_keys), missing
    crops = labelled_crops(annotations, root, names, size)
    features = class_tokens(inner, crops.pixels)
    decay, accuracy = choose_decay(features, crops, embeddings)
    weight, bias = fit(features, crops.labels, embeddings, decay)
    head = projection(model)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    temporary = out / "photographs.part"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, str(temporary))
    temporary.replace(out / "photographs.safetensors")
    return {"crops": len(crops.labels), "objects": len(crops.labels) // (2 * len(SIDES)),
            "classes": len(crops.labels.unique()), "decay": decay, "accuracy_left_out": accuracy[decay]}  # fmt: skip


def projection(model: torch.nn.Module) -> torch.nn.Linear:
    """The linear layer from the trunk to the joint space."""
    layers = [m for name, m in model.visual.named_modules()
              if isinstance(m, torch.nn.Linear) and ".blocks." not in f".{name}."]  # fmt: skip
    (head,) = layers
    return head


def fitting(state: dict[str, Tensor], trunk: torch.nn.Module) -> dict[str, Tensor]:
    """A state whose position grid has the trunk's size."""
    own = trunk.state_dict()["pos_embed"]
    grid, target = state["pos_embed"], own.shape[1]
    if grid.shape[1] != target:
        old, new = (round((n - 1) ** 0.5) for n in (grid.shape[1], target))
        cells = grid[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
        cells = F.interpolate(cells, size=(new, new), mode="bicubic", align_corners=False)
        state = {**state, "pos_embed": torch.cat([grid[:, :1], cells.flatten(2).transpose(1, 2)], 1)}
    return state
