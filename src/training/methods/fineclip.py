"""FineCLIP (NeurIPS 2024): the live student teaches its regions, beside image and region captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_clip import CLIP
from open_clip.packed_blocks import prefer
from open_clip.readouts import Unread, freeze_unread
from training.engine.flags import COUNT, NOT_NEGATIVE, flag
from training.methods.base import DenseFlags, RegionMethod
from training.methods.contrast import contrast, rows_of_processes
from training.methods.registry import Entry, Setting


@dataclass(frozen=True)
class FineCLIPFlags(DenseFlags):
    """Flags of FineCLIP."""

    cosine_weight: float = flag(1.0, "weight of the cosine of region and crop", type=NOT_NEGATIVE)
    caption_weight: float = flag(1.0, "weight of images against captions", type=NOT_NEGATIVE)
    region_caption_weight: float = flag(1.0, "weight of regions against their captions", type=NOT_NEGATIVE)
    max_boxes: int = flag(20, "regions an image", type=COUNT)
    as_released: bool = flag(False, "with the faults of the released code")


class FineCLIP(RegionMethod):
    """Cosine of region and crop, both by the student and with gradient, and contrast of images and regions with texts.

    The whole image tower and the temperature train; the text tower does not, as in the released code. Images and
    regions without a caption take part in the first loss only.

    Args:
        student: the model that trains.
        cosine_weight, caption_weight, region_caption_weight: of the losses; 0 switches one off.
        padded_to: rows that the regions of one image are padded to with zeros, which then take part in the contrast
            of regions, as in the released code; 0 for none.
        rank: this process.
        more: see :class:`~training.methods.base.RegionMethod`.
    """

    groups = {"captions": "captions", "region_captions": "region_captions"}

    def __init__(
        self, *, student: CLIP, cosine_weight: float = 1.0, caption_weight: float = 1.0,
        region_caption_weight: float = 1.0, padded_to: int = 0, rank: int = 0, **more: Any,
    ) -> None:  # fmt: skip
        names = {"distance": cosine_weight, "captions": caption_weight, "region_captions": region_caption_weight}
        super().__init__(student=student, weights={n: w for n, w in names.items() if w}, **more)
        self.padded_to, self.rank = padded_to, rank

    def freeze_unreached(self) -> None:
        """The text tower, and what no loss that counts reads of the image tower."""
        self.student.lock_text_tower()
        freeze_unread(self.unread())
        if self.student.logit_bias is not None:
            self.student.logit_bias.requires_grad_(False)
        self.student.logit_scale.requires_grad_({"captions", "region_captions"} & set(self.weights) != set())

    def unread(self) -> list[Unread]:
        """Nothing where a global reading takes part, of crops or images; else what the dense one leaves out."""
        return [] if {"distance", "captions"} & set(self.weights) else super().unread()

    def counts(self, batch: dict) -> dict[str, float]:
        """Regions, captions and region captions (with the released code's rows of zeros)."""
        counts = dict(super().counts(batch))
        for name in ("captions", "region_captions"):
            if name in self.weights:
                counts[name] = float(len(batch[name]))
        if self.padded_to and "region_captions" in counts:
            counts["region_captions"] = max(counts["region_captions"], self.padded_to * len(batch["boxes"]))
        return counts

    def has_items(self, counts: dict[str, float]) -> bool:
        """Every process gathers, also one without captions."""
        return True

    def losses(self, batch: dict) -> dict[str, Tensor]:
        """The losses, summed over regions, captions and region captions."""
        images = self.images(batch)
        regions = self.pool_regions(self.read(images, sizes=self.sizes(batch))[0], batch)
        out = {}
        if "distance" in self.weights:
            out["distance"] = (1 - (regions * self.embed_images(batch["crops"]).float()).sum(-1)).sum()
        if "captions" in self.weights:
            features = self.embed_images(images[batch["captions_of"]])
            out["captions"] = self._contrast(features, batch["captions"])
        if "region_captions" in self.weights:
            chosen = regions[batch["region_captions_of"]]
            padding = self.padded_to * len(batch["boxes"]) - len(chosen) if self.padded_to else 0
            out["region_captions"] = self._contrast(chosen, batch["region_captions"], padding)
        return out

    def embed_images(self, images: Tensor) -> Tensor:
        """The student's embeddings ``[n, D]`` of crops or images, whose number changes from step to step."""
        with prefer(self.student.visual.changing_kernels):
            return self.embed_rows(self.student.encode_image, images)

    def _contrast(self, features: Tensor, tokens: Tensor, padding: int = 0) -> Tensor:
        with torch.no_grad():
            texts = self.student.encode_text(tokens, normalize=True) if len(tokens) else features.detach()
        if padding > 0:
            zeros = features.new_zeros(padding, features.shape[1])
            features, texts = torch.cat([features, zeros]), torch.cat([texts.to(features.dtype), zeros])
        rows = rows_of_processes(len(features), features.device, self.rank, self.world_size)
        return contrast(features, texts, self.student.logit_scale, rows, self.rank)[0]


def build(options: FineCLIPFlags, setting: Setting) -> FineCLIP:
    """FineCLIP as the flags say."""
    return FineCLIP(
        **setting.common(), cosine_weight=options.cosine_weight, caption_weight=options.caption_weight,
        region_caption_weight=options.region_caption_weight, padded_to=options.max_boxes * options.as_released,
        rank=setting.rank, multiscale=options.multiscale,
    )  # fmt: skip


def fineclip_fields(options: FineCLIPFlags) -> tuple[str, ...]:
    """Fields of the losses that count."""
    wanted = (("crops", options.cosine_weight), ("captions", options.caption_weight),
              ("region_captions", options.region_caption_weight))  # fmt: skip
    return tuple(name for name, weight in wanted if weight)


_B16 = "--model EVA02-CLIP-B-16 --det-image-size 224 --batch-size 32 --epochs 10"
_L14 = "--model EVA02-CLIP-L-14-336 --det-image-size 336 --batch-size 10 --epochs 10"

METHOD = Entry(
    name="fineclip",
    summary="regions follow the student's own crops; images and regions against captions (FineCLIP, NeurIPS 2024)",
    options=FineCLIPFlags,
    build=build,
    sources=("proposals_distill",),
    losses=("distance", "captions", "region_captions"),
    fields=fineclip_fields,
    texts=True,
    learns_from=lambda options: ("captions",),
    recipes={"fineclip-b16": _B16, "fineclip-b16-released": f"{_B16} --as-released", "fineclip-l14": _L14},
)
