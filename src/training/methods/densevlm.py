"""DenseVLM (ICCV 2025): a bigger dense CLIP names the regions; things are told from things, stuff from everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_clip import CLIP
from open_clip.regions import roi_features
from training.engine.errors import UserError
from training.engine.flags import NOT_NEGATIVE, POSITIVE, SHARE, flag
from training.methods.base import RegionFlags, RegionMethod
from training.methods.names import LIST, NAMES_HELP, read_names
from training.methods.registry import Entry, Setting
from training.teachers.build import Teacher
from training.teachers.describe import DenseTeacherFlags, dense_teacher


@dataclass(frozen=True)
class DenseVLMFlags(RegionFlags, DenseTeacherFlags):
    """Flags of DenseVLM."""

    alignment_weight: float = flag(1.0, "weight of the divergence of class probabilities", type=NOT_NEGATIVE)
    threshold: float = flag(0.3, "least probability of the teacher's class for a region to count", type=SHARE)
    logit_temperature: float = flag(0.01, "cosines are divided by it", type=POSITIVE)
    names: str = flag("", NAMES_HELP, metavar="FILE")
    as_released: bool = flag(False, "with the faults of the released code")


class DenseVLM(RegionMethod):
    """Divergence of the student's class probabilities of a region from the dense teacher's.

    The teacher reads the same boxes from its own map, with its own class embeddings, so the models may differ in width
    and patch. Regions count that it is sure of. Where its class is a thing, both are restricted to things. The mean
    over thing regions and the mean over stuff regions, over the whole step, are added.

    Args:
        student: the model that trains.
        teachers: ``dense``.
        student_classes, teacher_classes: class embeddings ``[C, D]`` of each, things first.
        things: their number.
        weight: of the loss.
        threshold, temperature: see the flags.
        as_released: the last thing counts as stuff, and is missing among the things.
        more: see :class:`~training.methods.base.RegionMethod`.
    """

    groups = {"things": "things", "stuff": "stuff"}

    def __init__(
        self, *, student: CLIP, teachers: Mapping[str, Teacher] | None, student_classes: Tensor,
        teacher_classes: Tensor, things: int, weight: float = 1.0, threshold: float = 0.3, temperature: float = 0.01,
        as_released: bool = False, **more: Any,
    ) -> None:  # fmt: skip
        weights = {"things": weight, "stuff": weight}
        super().__init__(student=student, teachers=teachers, weights=weights, **more)
        for name, classes in (("student_classes", student_classes), ("teacher_classes", teacher_classes)):
            self.register_buffer(name, F.normalize(classes.float(), dim=-1), persistent=False)
        self.things = things - as_released
        self.threshold, self.temperature = threshold, temperature

    def prepare(self, batches: list[dict], *, seed: int) -> None:
        """The teacher's logits ``[K, C]``, and which regions count as things and as stuff: the counts hinge on it."""
        super().prepare(batches, seed=seed)
        for batch in batches:
            regions = F.normalize(roi_features(self.ask("dense", batch), batch["boxes"]), dim=-1)
            batch["teacher_logits"] = self.logits(regions, self.teacher_classes)
            best, label = batch["teacher_logits"].softmax(-1).max(-1)
            sure = best > self.threshold
            batch["of_kind"] = {"things": sure & (label < self.things), "stuff": sure & (label >= self.things)}

    def logits(self, regions: Tensor, classes: Tensor) -> Tensor:
        """Cosines ``[K, C]`` over the temperature, float32."""
        with torch.autocast(regions.device.type, enabled=False):
            return regions.float() @ classes.T / self.temperature

    def counts(self, batch: dict) -> dict[str, float]:
        """Regions that the teacher is sure of, by kind."""
        return {kind: float(chosen.sum()) for kind, chosen in batch["of_kind"].items()}

    def losses(self, batch: dict) -> dict[str, Tensor]:
        """The divergence by kind, summed over regions."""
        return self.divergences(self.embed_regions(batch), batch)

    def divergences(self, regions: Tensor, batch: dict) -> dict[str, Tensor]:
        """:meth:`losses` of the student's regions ``[K, D]``."""
        own = self.logits(regions, self.student_classes)
        out = {}
        for kind, chosen in batch["of_kind"].items():
            columns = slice(self.things) if kind == "things" else slice(None)
            log_own = own[chosen][:, columns].log_softmax(-1)
            log_target = batch["teacher_logits"][chosen][:, columns].log_softmax(-1)
            out[kind] = (log_target.exp() * (log_target - log_own)).sum()
        return out


def build(options: DenseVLMFlags, setting: Setting) -> DenseVLM:
    """DenseVLM as the flags say."""
    if not options.names:
        raise UserError(f"--method densevlm needs --names, the classes to tell apart: a {NAMES_HELP}")
    names, things = read_names(options.names)
    return DenseVLM(
        **setting.common(), student_classes=setting.embed(names), teacher_classes=setting.embed(names, teacher="dense"),
        things=things, weight=options.alignment_weight, threshold=options.threshold,
        temperature=options.logit_temperature, as_released=options.as_released, extract_type=options.extract_type,
        multiscale=options.multiscale,
    )  # fmt: skip


_B16 = (
    "--model EVA02-CLIP-B-16 --lock-image --lock-image-unlocked-groups 12 --alpha 0.9 --det-image-size 512 "
    "--batch-size 16 --grid dense --max-boxes 36 --dense-teacher EVA02-CLIP-L-14-336 --names coco-stuff-ade20k"
)

METHOD = Entry(
    name="densevlm",
    summary="class probabilities of regions by a bigger dense CLIP, things and stuff apart (DenseVLM, ICCV 2025)",
    options=DenseVLMFlags,
    build=build,
    sources=("grid_distill", "proposals_distill", "mixed_distill"),
    losses=("things", "stuff"),
    teachers=lambda options: (dense_teacher(options),),
    learns_from=lambda options: (LIST,),
    recipes={"densevlm-b16": _B16, "densevlm-b16-released": f"{_B16} --as-released"},
)
