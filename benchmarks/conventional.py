"""The conventional path, written plainly: what a CLIP training script usually does, and what the ratios compare with.

Pillow decodes and resizes; every image and crop is normalised to float32 on the CPU; crops are zero-padded to a fixed
number; attention is eager; boxes and masks each take a dense pass of their own.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.functional import normalize, to_tensor

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def to_float(image: Image.Image) -> Tensor:
    """Pillow image to normalised float32 ``[3, H, W]``, by torchvision's usual pair of transforms."""
    return normalize(to_tensor(image), MEAN, STD)


def resize_and_pad(image: Image.Image, size: int, centre: bool) -> Tensor:
    """Longest side to ``size``, black padding (right and bottom, or around), normalised ``[3, size, size]``."""
    scale = size / max(image.size)
    width, height = (max(round(s * scale), 1) for s in image.size)
    canvas = Image.new("RGB", (size, size))
    left, top = ((size - width) // 2, (size - height) // 2) if centre else (0, 0)
    canvas.paste(image.resize((width, height), Image.BICUBIC), (left, top))
    return to_float(canvas)


def crop(image: Image.Image, box: list[float], size: int) -> Tensor:
    """A region at the native size, normalised ``[3, size, size]``."""
    x1, y1, x2, y2 = (round(v) for v in box)
    return resize_and_pad(image.crop((x1, y1, max(x2, x1 + 1), max(y2, y1 + 1))), size, centre=True)


class GridPatches(Dataset):
    """Image and grid crops as padded float32: image ``[3, S, S]``, boxes ``[20, 5]``, crops ``[20, 3, n, n]``."""

    def __init__(self, root: str, annotations: str, size: int, crop_size: int, max_boxes: int = 20, max_split: int = 6):
        self.files = [Path(root) / i["file_name"] for i in json.loads(Path(annotations).read_text())["images"]]
        self.size, self.crop_size, self.max_boxes = size, crop_size, max_boxes
        self.choices = [
            (m, n)
            for m in range(1, max_split + 1)
            for n in range(-(-m // 2), min(2 * m, max_split) + 1)
        ]  # fmt: skip

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image = Image.open(self.files[index]).convert("RGB")
        width, height = image.size
        rows, columns = random.choice(self.choices)
        cells = [(r, c) for r in range(rows) for c in range(columns)]
        random.shuffle(cells)
        boxes, crops = torch.zeros(self.max_boxes, 5), torch.zeros(self.max_boxes, 3, self.crop_size, self.crop_size)
        scale = self.size / max(image.size)
        for i, (r, c) in enumerate(cells[: self.max_boxes]):
            box = [c * width / columns, r * height / rows, (c + 1) * width / columns, (r + 1) * height / rows]
            boxes[i] = torch.tensor([v * scale / self.size for v in box] + [1.0])
            crops[i] = crop(image, box, self.crop_size)
        return resize_and_pad(image, self.size, centre=False), boxes, crops


class Panoptic(Dataset):
    """Image, boxes ``[100, 4]``, labels ``[100]`` (-1: none), masks ``[100, g, g]``, crops ``[100, 3, n, n]``."""

    def __init__(self, root: str, annotations: str, segments: str, size: int, patch: int, crop_size: int):
        data = json.loads(Path(annotations).read_text())
        names = {i["id"]: i["file_name"] for i in data["images"]}
        self.records = [
            (Path(root) / names[a["image_id"]], Path(segments) / a["file_name"], a["segments_info"])
            for a in data["annotations"]
        ]
        categories = sorted(data["categories"], key=lambda c: c["id"])
        self.label = {c["id"]: i for i, c in enumerate(categories)}
        self.thing = {c["id"]: bool(c["isthing"]) for c in categories}
        self.size, self.patch, self.crop_size, self.most = size, patch, crop_size, 100

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        file, png, infos = self.records[index]
        image = Image.open(file).convert("RGB")
        colours = np.array(Image.open(png).convert("RGB")).astype(np.int64)
        ids = colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2]
        cells, scale = self.size // self.patch, self.size / max(image.size)
        boxes, labels = torch.zeros(self.most, 4), torch.full((self.most,), -1)
        masks = torch.zeros(self.most, cells, cells)
        crops = torch.zeros(self.most, 3, self.crop_size, self.crop_size)
        used = 0
        for info in infos:
            if not 64 <= info["area"] <= 1024**2 or used == self.most:
                continue
            mask = ids == info["id"]
            box, area = self._boxes(info, mask, image.size)
            boxes[used] = torch.tensor([v * scale / self.size for v in box])
            labels[used] = self.label[info["category_id"]]
            masks[used] = self._mask(mask, cells)
            crops[used] = crop(image, area, self.crop_size)
            used += 1
        return resize_and_pad(image, self.size, centre=False), boxes, labels, masks, crops

    def _boxes(self, info: dict, mask: np.ndarray, size: tuple[int, int]) -> tuple[list[float], list[float]]:
        """(RoI box, crop box) in pixels."""
        if not self.thing[info["category_id"]]:
            rows, columns = np.nonzero(mask)
            box = [columns.min(), rows.min(), columns.max(), rows.max()]
            return [float(v) for v in box], [float(v) for v in box]
        x, y, w, h = info["bbox"]
        centre_x, centre_y = x + w / 2, y + h / 2
        area = [
            max(centre_x - 0.75 * w, 0), max(centre_y - 0.75 * h, 0),
            min(centre_x + 0.75 * w, size[0]), min(centre_y + 0.75 * h, size[1]),
        ]  # fmt: skip
        return [x, y, x + w, y + h], area

    @staticmethod
    def _mask(mask: np.ndarray, cells: int) -> Tensor:
        scale = cells / max(mask.shape)
        height, width = (max(round(s * scale), 1) for s in mask.shape)
        small = F.interpolate(torch.from_numpy(mask)[None, None].float(), (height, width), mode="bicubic")[0, 0]
        small = F.pad((small > 0).float(), (0, cells - width, 0, cells - height))
        if not small.any():  # it vanished: the cell of its pixel that is nearest to its centre
            pixels = np.argwhere(mask)
            y, x = pixels[((pixels - pixels.mean(0)) ** 2).sum(1).argmin()]
            small[min(int((y + 0.5) * scale), height - 1), min(int((x + 0.5) * scale), width - 1)] = 1
        return small


def use_eager_attention(model: nn.Module) -> None:
    """Attention as two matrix products and a softmax that stores the whole matrix, in every block of a timm trunk."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
