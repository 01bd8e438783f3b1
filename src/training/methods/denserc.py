"""DenseRC (CVPR 2026): gated values of the last layers as the dense reading, kept coherent by a foundation model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from open_clip import CLIP
from training.engine.flags import NOT_NEGATIVE, flag
from training.methods.base import DenseFlags, RegionMethod
from training.methods.correlation import cells_of, correlation_loss
from training.methods.registry import Entry, Setting
from training.teachers.build import Teacher
from training.teachers.describe import CropTeacherFlags, VisionTeacherFlags, crop_teacher, vision_teacher


@dataclass(frozen=True)
class DenseRCFlags(DenseFlags, CropTeacherFlags, VisionTeacherFlags):
    """Flags of DenseRC."""

    cosine_weight: float = flag(1.0, "weight of the cosine of region and crop", type=NOT_NEGATIVE)
    coherence_weight: float = flag(0.025, "weight of the coherence with the foundation model", type=NOT_NEGATIVE)


class DenseRC(RegionMethod):
    """``1 - mean cos(RoI, crop)`` and the mean squared difference of the map's and the foundation model's correlations.

    Written from the published formula; its code is not published. The reading owns the gates, which train with it.

    Args:
        student: the model that trains.
        teachers: ``crops`` and ``vfm``.
        cosine_weight, coherence_weight: of the losses; 0 switches one off.
        more: see :class:`~training.methods.base.RegionMethod`.
    """

    groups = {"coherence": "images"}

    def __init__(
        self, *, student: CLIP, teachers: Mapping[str, Teacher] | None = None, cosine_weight: float = 1.0,
        coherence_weight: float = 0.025, **more: Any,
    ) -> None:  # fmt: skip
        weights = {n: w for n, w in (("distance", cosine_weight), ("coherence", coherence_weight)) if w}
        super().__init__(student=student, teachers=teachers, weights=weights, **more)

    def counts(self, batch: dict) -> dict[str, float]:
        """Regions, and images: correlations are averaged over these."""
        return {**super().counts(batch), "images": self.images_in(batch)}

    def losses(self, batch: dict) -> dict[str, Tensor]:
        """Distance summed over regions, and coherence over images."""
        dense, _ = self.read(self.images(batch), sizes=self.sizes(batch))
        out = {}
        if "distance" in self.weights:
            out["distance"] = self.distance(dense, batch)
        if "coherence" in self.weights:
            target = self.ask("vfm", batch)
            own = cells_of(dense, target.shape[-2:])
            out["coherence"] = correlation_loss([own], cells_of(target), "mse")
        return out


def build(options: DenseRCFlags, setting: Setting) -> DenseRC:
    """DenseRC as the flags say."""
    return DenseRC(
        **setting.common(), cosine_weight=options.cosine_weight, coherence_weight=options.coherence_weight,
        multiscale=options.multiscale,
    )  # fmt: skip


METHOD = Entry(
    name="denserc",
    summary="gated values of the last three layers, coherent with a vision foundation model (DenseRC, CVPR 2026)",
    options=DenseRCFlags,
    build=build,
    sources=("grid_distill", "proposals_distill", "mixed_distill"),
    losses=("distance", "coherence"),
    fields=lambda options: ("crops",) if options.cosine_weight else (),
    teachers=lambda options: (
        *([crop_teacher(options)] if options.cosine_weight else []),
        *([vision_teacher(options)] if options.coherence_weight else []),
    ),
    readout="gated:3",
    recipes={
        "denserc-b16": "--model EVA02-CLIP-B-16 --lock-image --lock-image-unlocked-groups 12 --alpha 0.7 "
        "--batch-size 4",
        "denserc-l14": "--model EVA02-CLIP-L-14-336 --det-image-size 896 --lock-image --lock-image-unlocked-groups 24 "
        "--alpha 0.95 --batch-size 4 --vfm vit_large_patch14_reg4_dinov2",
    },
)
