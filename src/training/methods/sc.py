"""SC: spatial correlation distillation beside CLIPSelf's cosine (R-SC, ICLR 2025, without its unpublished refiner)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchvision.ops import roi_align

from open_clip import CLIP
from training.engine.flags import NOT_NEGATIVE, POSITIVE, flag
from training.methods.base import DenseFlags, RegionMethod
from training.methods.correlation import cells_of, correlation_loss
from training.methods.registry import Entry, Setting
from training.teachers.build import Teacher
from training.teachers.describe import CropTeacherFlags, TeacherSpec, crop_teacher


@dataclass(frozen=True)
class SCFlags(DenseFlags, CropTeacherFlags):
    """Flags of spatial correlation distillation."""

    cosine_weight: float = flag(1.0, "weight of the cosine of region and crop", type=NOT_NEGATIVE)
    correlation_weight: float = flag(0.1, "weight of the correlations of a region's cells", type=NOT_NEGATIVE)
    correlation_temperature: float = flag(0.2, "of the softmax over a cell's correlations", type=POSITIVE)
    both_sides: bool = flag(False, "gradient through both factors of a correlation, not one as released")


class SC(RegionMethod):
    """CLIPSelf's cosine, and the correlations of a region's cells as the frozen model has them within its crop.

    The student's map is RoI-aligned to as many cells as the crop has patches; the cross-entropy between both softmaxed
    correlations is averaged over cells and regions.

    Args:
        student: the model that trains.
        teachers: ``crops``, and ``cells``, the dense map of the crops.
        cosine_weight, correlation_weight: of the losses.
        temperature: of the correlations.
        one_sided: gradient through one factor of a correlation.
        more: see :class:`~training.methods.base.RegionMethod`.
    """

    def __init__(
        self, *, student: CLIP, teachers: Mapping[str, Teacher] | None = None, cosine_weight: float = 1.0,
        correlation_weight: float = 0.1, temperature: float = 0.2, one_sided: bool = True, **more: Any,
    ) -> None:  # fmt: skip
        weights = {n: w for n, w in (("distance", cosine_weight), ("correlation", correlation_weight)) if w}
        super().__init__(student=student, teachers=teachers, weights=weights, **more)
        self.temperature, self.one_sided = temperature, one_sided

    def losses(self, batch: dict) -> dict[str, Tensor]:
        """Both, summed over regions."""
        dense, _ = self.read(self.images(batch), sizes=self.sizes(batch))
        out = {}
        if "distance" in self.weights:
            out["distance"] = self.distance(dense, batch)
        if "correlation" in self.weights:
            target = self.ask("cells", batch)  # [K, D, g, g]
            own = cells_of(region_grids(dense, batch["boxes"], target.shape[-1]))
            loss = correlation_loss(
                [own], cells_of(target), "ce", temperature=self.temperature, one_sided=self.one_sided
            )
            out["correlation"] = loss
        return out


def region_grids(dense: Tensor, boxes: list[Tensor], side: int) -> Tensor:
    """Each box of a map ``[B, D, h, w]`` as a map of its own: ``[K, D, side, side]``, float32."""
    scale = boxes[0].new_tensor([dense.shape[-1], dense.shape[-2]] * 2)
    return roi_align(dense.float(), [b * scale for b in boxes], (side, side), 1.0, -1, True)


def build(options: SCFlags, setting: Setting) -> SC:
    """SC as the flags say."""
    return SC(
        **setting.common(), cosine_weight=options.cosine_weight, correlation_weight=options.correlation_weight,
        temperature=options.correlation_temperature, one_sided=not options.both_sides, multiscale=options.multiscale,
    )  # fmt: skip


def sc_teachers(options: SCFlags) -> tuple[TeacherSpec, ...]:
    """The start model twice: embedding of a crop, and its cells."""
    whole = crop_teacher(options)
    cells = TeacherSpec("cells", "clip", "crops", "map", whole.model, whole.weights)
    return (*([whole] if options.cosine_weight else []), *([cells] if options.correlation_weight else []))


METHOD = Entry(
    name="sc",
    summary="crops, and the correlations of cells within them (the loss of R-SC, ICLR 2025)",
    options=SCFlags,
    build=build,
    sources=("grid_distill", "proposals_distill", "mixed_distill"),
    losses=("distance", "correlation"),
    fields=lambda options: ("crops",),
    teachers=sc_teachers,
    recipes={
        "sc-b16": "--model EVA02-CLIP-B-16 --lock-image --lock-image-unlocked-groups 12 --alpha 0.7",
        "sc-l14": "--model EVA02-CLIP-L-14-336 --det-image-size 896 --lock-image --lock-image-unlocked-groups 24 "
        "--alpha 0.95",
    },
)
