"""DeCLIP (CVPR 2025): content from crops, context from a vision foundation model, read from one attention apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from open_clip import CLIP
from training.engine.errors import UserError
from training.engine.flags import NOT_NEGATIVE, flag
from training.methods.base import DenseFlags, RegionMethod
from training.methods.correlation import cells_of, correlation_loss
from training.methods.registry import Entry, Setting
from training.teachers.build import Teacher
from training.teachers.describe import CropTeacherFlags, VisionTeacherFlags, crop_teacher, vision_teacher

# Tokens of the last attention whose correlations are the context, by reading.
CONTEXT = {"qq": ("q",), "kk": ("k",), "vv": ("v",), "csa": ("q", "k")}


@dataclass(frozen=True)
class DeCLIPFlags(DenseFlags, CropTeacherFlags, VisionTeacherFlags):
    """Flags of DeCLIP."""

    cosine_weight: float = flag(1.0, "weight of the cosine of region and crop", type=NOT_NEGATIVE)
    context_weight: float = flag(0.25, "weight of the correlations with the foundation model", type=NOT_NEGATIVE)
    as_released: bool = flag(False, "with the fault of the released code: of grids that differ (--vfm-size)")


def declip_teachers(options: DeCLIPFlags) -> tuple:
    """Teachers of the losses that count."""
    return (
        *([crop_teacher(options)] if options.cosine_weight else []),
        *([vision_teacher(options)] if options.context_weight else []),
    )


class DeCLIP(RegionMethod):
    """``1 - mean cos(RoI of the content map, crop)`` and the distance of correlations of queries and foundation model.

    The content map mixes cells by the correlations of their queries (or keys, or both); those correlations follow the
    foundation model's (equations 3 to 6). Grids may differ: the student's tokens are brought to the other one.

    Args:
        student: the model that trains.
        teachers: ``crops`` and ``vfm``.
        cosine_weight, context_weight: of the losses; 0 switches one off.
        as_released: tokens of another grid are resized and then read with axes exchanged, as the released code does.
        more: see :class:`~training.methods.base.RegionMethod`; ``readout`` is one of ``CONTEXT``.
    """

    groups = {"context": "images"}

    def __init__(
        self, *, student: CLIP, teachers: Mapping[str, Teacher] | None = None, cosine_weight: float = 1.0,
        context_weight: float = 0.25, as_released: bool = False, readout: str | None = "qq", **more: Any,
    ) -> None:  # fmt: skip
        if readout not in CONTEXT:
            raise UserError(f"--readout {readout} has no context to distil: use {', '.join(CONTEXT)}")
        weights = {n: w for n, w in (("distance", cosine_weight), ("context", context_weight)) if w}
        super().__init__(student=student, teachers=teachers, weights=weights, readout=readout, **more)
        self.projections, self.as_released = CONTEXT[readout], as_released

    @property
    def reaches_all(self) -> bool:
        """Not the context alone: it ends at the queries or keys of the last block."""
        return set(self.weights) != {"context"}

    def counts(self, batch: dict) -> dict[str, float]:
        """Regions, and images: correlations are averaged over these."""
        regions = super().counts(batch)["regions"]
        return {"regions": regions, "images": self.images_in(batch)}

    def losses(self, batch: dict) -> dict[str, Tensor]:
        """Distance summed over regions, and context over images."""
        dense, tokens = self.read(self.images(batch), self.projections, self.sizes(batch))
        return self.content_and_context(batch, dense, tokens)

    def content_and_context(self, batch: dict, dense: Tensor, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The two losses of a map ``[B, D, h, w]`` and the tokens ``[B, N, W]`` of its attention."""
        out = {}
        if "distance" in self.weights:
            out["distance"] = self.distance(dense, batch)
        if "context" in self.weights:
            target = self.ask("vfm", batch)
            own = [self._on_grid(t, dense.shape[-2:], target.shape[-2:]) for t in tokens.values()]
            out["context"] = correlation_loss(own, cells_of(target))
        return out

    def _on_grid(self, tokens: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
        """Tokens ``[B, N, W]`` of one grid as those of another."""
        if tuple(grid) == tuple(target):
            return tokens
        cells = cells_of(tokens.transpose(1, 2).unflatten(2, tuple(grid)), target)  # [B, M, W]
        if not self.as_released:
            return cells
        exchanged = cells.transpose(1, 2).unflatten(2, tuple(target)).transpose(2, 3)
        return exchanged.reshape(len(cells), -1, cells.shape[-1])


def build(options: DeCLIPFlags, setting: Setting) -> DeCLIP:
    """DeCLIP as the flags say."""
    return DeCLIP(
        **setting.common(), cosine_weight=options.cosine_weight, context_weight=options.context_weight,
        as_released=options.as_released, multiscale=options.multiscale,
    )  # fmt: skip


_B16 = "--model EVA02-CLIP-B-16 --lock-image --lock-image-unlocked-groups 12 --alpha 0.7"
_L14 = "--model EVA02-CLIP-L-14-336 --lock-image --lock-image-unlocked-groups 24 --alpha 0.95"
_SCRIPT = "--det-image-size 560 --context-weight 0.1"

METHOD = Entry(
    name="declip",
    summary="content from crops and context from a vision foundation model, apart (DeCLIP, CVPR 2025)",
    options=DeCLIPFlags,
    build=build,
    sources=("grid_distill", "proposals_distill", "mixed_distill"),
    losses=("distance", "context"),
    fields=lambda options: ("crops",) if options.cosine_weight else (),
    teachers=declip_teachers,
    readout="qq",
    recipes={
        "declip-b16": f"{_B16} {_SCRIPT} --batch-size 4",
        "declip-b16-1024": f"{_B16} --det-image-size 1024 --context-weight 0.25 --batch-size 2",
        "declip-l14": f"{_L14} {_SCRIPT} --vfm vit_large_patch14_reg4_dinov2 --batch-size 2",
    },
)
