"""CLIPSelf: dense region embeddings of the student match the teacher's embeddings of the region's crop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from open_clip import CLIP
from training.engine.flags import NOT_NEGATIVE, flag
from training.methods.base import RegionFlags, RegionMethod
from training.methods.registry import Entry, Setting
from training.teachers.build import Teacher
from training.teachers.describe import CropTeacherFlags, crop_teacher


@dataclass(frozen=True)
class CLIPSelfFlags(RegionFlags, CropTeacherFlags):
    """Flags of CLIPSelf."""

    cosine_weight: float = flag(1.0, "weight of the cosine of region and crop", type=NOT_NEGATIVE)


class CLIPSelf(RegionMethod):
    """Loss ``1 - mean cos(student RoI embedding, teacher embedding of the crop)`` (CLIPSelf, ICLR 2024, equation 2).

    Args:
        student: the model that trains.
        teachers: ``crops``, the frozen start model; not needed when every batch carries its answers.
        cosine_weight: factor of the loss.
        more: see :class:`~training.methods.base.RegionMethod`.
    """

    logs = ("cosine",)

    def __init__(
        self, *, student: CLIP, teachers: Mapping[str, Teacher] | None, cosine_weight: float = 1.0, **more: Any
    ) -> None:
        super().__init__(student=student, teachers=teachers, weights={"distance": cosine_weight}, **more)

    def losses(self, batch: dict) -> dict[str, Tensor]:
        """Distance and cosine, summed over regions."""
        target = self.ask("crops", batch)
        cosine = (self.embed_regions(batch) * target.float()).sum(-1)
        return {"distance": (1 - cosine).sum(), "cosine": cosine.sum()}


def build(options: CLIPSelfFlags, setting: Setting) -> CLIPSelf:
    """CLIPSelf as the flags say."""
    return CLIPSelf(
        **setting.common(), cosine_weight=options.cosine_weight, extract_type=options.extract_type,
        multiscale=options.multiscale,
    )  # fmt: skip


_B16 = "--model EVA02-CLIP-B-16 --lock-image --lock-image-unlocked-groups 12 --alpha 0.7"
_L14 = "--model EVA02-CLIP-L-14-336 --det-image-size 896 --lock-image --lock-image-unlocked-groups 24 --alpha 0.95"

METHOD = Entry(
    name="clipself",
    summary="region embeddings match those of the regions' crops by the frozen start model (CLIPSelf, ICLR 2024)",
    options=CLIPSelfFlags,
    build=build,
    sources=("grid_distill", "proposals_distill", "mixed_distill"),
    losses=("distance",),
    fields=lambda options: ("crops",),
    teachers=lambda options: (crop_teacher(options),),
    recipes={
        "clipself-b16": _B16,
        "clipself-l14": _L14,
        "clipself-b16-proposals": f"{_B16} --dataset-type proposals_distill",
        "clipself-l14-proposals": f"{_L14} --dataset-type proposals_distill",
        "clipself-b16-window": f"{_B16} --readout window",
        "clipself-l14-window": f"{_L14} --readout window",
    },
)
