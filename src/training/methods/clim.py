"""CLIM (AAAI 2024): mosaics of captioned images, whose cells are regions with known texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_clip import CLIP
from open_clip.readouts import Unread
from training.engine.flags import COUNT, flag
from training.engine.sharding import is_divided
from training.methods.base import RegionMethod
from training.methods.contrast import contrast, rows_of_processes
from training.methods.registry import Entry, Setting


@dataclass(frozen=True)
class CLIMFlags:
    """Flags of CLIM."""

    mosaic_size: int = flag(1024, "side of a mosaic in pixels", type=COUNT)
    mosaics: tuple[int, ...] = flag((2, 3, 4), "rows (and columns) of the mosaics of a batch", type=COUNT, nargs="+")


def mosaic(images: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """(``[3, side * s, side * s]``, boxes ``[side**2, 4]`` in 0..1) of images ``[side**2, 3, s, s]``, rows first."""
    rows = images.unflatten(0, (side, side)).permute(2, 0, 3, 1, 4)  # [3, row, y, column, x]
    edges = torch.linspace(0, 1, side + 1, device=images.device)
    y1, x1 = torch.meshgrid(edges[:-1], edges[:-1], indexing="ij")
    y2, x2 = torch.meshgrid(edges[1:], edges[1:], indexing="ij")
    boxes = torch.stack([x1, y1, x2, y2], -1).flatten(0, 1)
    return rows.flatten(3, 4).flatten(1, 2), boxes


class CLIM(RegionMethod):
    """Contrast of mosaic cells, and of the images left over, with their captions, over all processes.

    The first images of a batch fill one mosaic of each kind, as far as they reach. Each is brought to ``mosaic_size``
    bicubically, without antialias as in the released code; its cells are read from its dense map. Images left over are
    read as a whole. The temperature trains; the text tower does not.

    Args:
        student: the model that trains.
        mosaic_size, mosaics: see the flags.
        rank: this process.
        more: see :class:`~training.methods.base.RegionMethod`.
    """

    groups = {"contrast": "pairs", "correct": "pairs"}
    logs = ("correct",)

    def __init__(
        self, *, student: CLIP, mosaic_size: int = 1024, mosaics: tuple[int, ...] = (2, 3, 4), rank: int = 0,
        **more: Any,
    ) -> None:  # fmt: skip
        super().__init__(student=student, weights={"contrast": 1.0}, **more)
        self.mosaic_size, self.mosaics, self.rank = mosaic_size, mosaics, rank

    def freeze_unreached(self) -> None:
        """The text tower: single images reach every parameter of the image tower."""
        self.student.lock_text_tower()
        if self.student.logit_bias is not None:
            self.student.logit_bias.requires_grad_(False)

    def unread(self) -> list[Unread]:
        """Nothing."""
        return []

    def counts(self, batch: dict) -> dict[str, float]:
        """Pairs of a batch."""
        return {"pairs": float(len(batch["texts"]))}

    def has_items(self, counts: dict[str, float]) -> bool:
        """Every process gathers, also one without pairs."""
        return True

    def losses(self, batch: dict) -> dict[str, Tensor]:
        """The loss, and how many cells and images find their text, summed over pairs."""
        images = batch["images"]
        features = self.embed_pairs(images)
        with torch.no_grad():
            texts = self.student.encode_text(batch["texts"], normalize=True) if len(images) else features.detach()
        rows = rows_of_processes(len(features), images.device, self.rank, self.world_size)
        loss, correct = contrast(features, texts, self.student.logit_scale, rows, self.rank)
        return {"contrast": loss, "correct": correct}

    def embed_pairs(self, images: Tensor) -> Tensor:
        """Embeddings ``[n, D]`` of images ``[n, 3, s, s]`` in their order, as cells of mosaics or by themselves."""
        start, pictures, boxes = 0, [], []
        for side in self.mosaics:
            if start + side**2 <= len(images):
                picture, cells = mosaic(images[start : start + side**2], side)
                size = (self.mosaic_size, self.mosaic_size)
                pictures.append(F.interpolate(picture[None].float(), size, mode="bicubic").to(images.dtype))
                boxes.append(cells)
                start += side**2
        parts = []
        if not pictures and is_divided(self.student):  # other processes may have mosaics: see embed_rows
            pictures = [images.new_zeros(1, 3, self.mosaic_size, self.mosaic_size)]
            boxes = [images.new_zeros(0, 4, dtype=torch.float32)]
        if pictures:
            dense, _ = self.read(torch.cat(pictures))
            parts.append(self.pool_regions(dense, {"boxes": boxes}))
        # Without a single image what the global reading alone reaches gets its zero gradient.
        parts.append(self.embed_rows(self.student.encode_image, images[start:]).float())
        return torch.cat(parts)


def build(options: CLIMFlags, setting: Setting) -> CLIM:
    """CLIM as the flags say."""
    return CLIM(
        **setting.common(), mosaic_size=options.mosaic_size, mosaics=options.mosaics, rank=setting.rank
    )


_B16 = "--model ViT-B-16-quickgelu --lock-image --lock-image-unlocked-groups 6 --alpha 0.7 --batch-size 32"

METHOD = Entry(
    name="clim",
    summary="cells of mosaics of captioned images against their captions (CLIM, AAAI 2024)",
    options=CLIMFlags,
    build=build,
    sources=("contrastive",),
    losses=("contrast",),
    texts=True,
    learns_from=lambda options: ("captions",),
    recipes={"clim-b16": f"{_B16} --epochs 100", "clim-b16-cc3m": f"{_B16} --epochs 3"},
)
