"""MixRC: gated values of the last layers, trained on boxes and cells, with a bigger dense teacher and refined names.

It puts together what the published methods found apart: DenseRC's reading and coherence, proposals and grids in one
image, DenseVLM's class probabilities by a bigger dense CLIP, and SynCLIP's refinement with names that the teacher
chooses itself. Each part has a weight, and 0 leaves it out with its teacher. A candidate: no figures are claimed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.engine.errors import UserError
from training.engine.flags import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, flag
from training.methods.correlation import batch_semantics, cells_of, correlation_loss
from training.methods.denserc import DenseRCFlags
from training.methods.densevlm import DenseVLM
from training.methods.names import LIST, NAMES_HELP, choose_classes, read_names
from training.methods.registry import Entry, Setting
from training.teachers.describe import DenseTeacherFlags, TeacherSpec, crop_teacher, dense_teacher, vision_teacher


@dataclass(frozen=True)
class MixRCFlags(DenseRCFlags, DenseTeacherFlags):
    """Flags of MixRC."""

    alignment_weight: float = flag(0.0, "weight of the divergence of class probabilities", type=NOT_NEGATIVE)
    threshold: float = flag(0.3, "least probability of the teacher's class for a region to count", type=SHARE)
    logit_temperature: float = flag(0.02, "cosines are divided by it", type=POSITIVE)
    semantic_weight: float = flag(0.0, "weight of the names against the cells", type=NOT_NEGATIVE)
    semantic_share: float = flag(0.7, "share of the teacher's similarities in their target", type=SHARE)
    spatial_share: float = flag(0.3, "share of the foundation model's correlations in it", type=SHARE)
    neighbours: int = flag(7, "cells that a name's correlations are averaged over", type=COUNT)
    names: str = flag("", NAMES_HELP, metavar="FILE")


class MixRC(DenseVLM):
    """Cosine of region and crop, coherence, class probabilities and refined names, each by its weight.

    Args:
        weights: of ``distance``, ``coherence``, ``alignment`` and ``semantics``; 0 leaves a part out.
        label_texts: text features ``[C, D]`` of the names that the teacher of crops chooses from, for ``semantics``.
        semantic: see :func:`training.methods.correlation.semantic_loss`.
        more: see :class:`DenseVLM`.
    """

    groups = {"coherence": "images", "things": "things", "stuff": "stuff", "semantics": "names"}

    def __init__(
        self, *, weights: Mapping[str, float], label_texts: Tensor | None = None,
        semantic: dict[str, Any] | None = None, **more: Any,
    ) -> None:  # fmt: skip
        super().__init__(weight=weights["alignment"], **more)
        aligned = ("things", "stuff") if weights["alignment"] else ()
        self.weights = {n: w for n, w in self.weights.items() if n in aligned}
        self.weights |= {n: weights[n] for n in ("distance", "coherence", "semantics") if weights[n]}
        if label_texts is not None:
            self.register_buffer("label_texts", label_texts.float(), persistent=False)
        self.semantic = semantic

    def prepare(self, batches: list[dict], *, seed: int) -> None:
        """The dense teacher's classes of regions, and the names of images."""
        if "things" in self.weights:
            super().prepare(batches, seed=seed)
        else:
            super(DenseVLM, self).prepare(batches, seed=seed)
        for batch in batches if "semantics" in self.weights else []:
            choose_classes(self, batch, self.label_texts)

    def counts(self, batch: dict) -> dict[str, float]:
        """Regions, images, and what the parts in use count."""
        counts = {"regions": float(sum(map(len, batch["boxes"]))), "images": self.images_in(batch)}
        if "things" in self.weights:
            counts |= super().counts(batch)
        return counts | ({"names": float(len(batch["classes"]))} if "semantics" in self.weights else {})

    def losses(self, batch: dict) -> dict[str, Tensor]:
        """All parts from one pass of the student."""
        dense, _ = self.read(self.images(batch), sizes=self.sizes(batch))
        regions = self.pool_regions(dense, batch)
        out = self.divergences(regions, batch) if "things" in self.weights else {}
        if "distance" in self.weights:
            out["distance"] = (1 - (regions * self.ask("crops", batch).float()).sum(-1)).sum()
        if "coherence" in self.weights:
            target = self.ask("vfm", batch)
            out["coherence"] = correlation_loss([cells_of(dense, target.shape[-2:])], cells_of(target), "mse")
        if "semantics" in self.weights:
            start, vfm = self.ask("start", batch), self.ask("vfm", batch)
            texts = self.label_texts, self.label_texts
            out["semantics"] = batch_semantics(batch, dense, start, vfm, *texts, **self.semantic)
        return out


def build(options: MixRCFlags, setting: Setting) -> MixRC:
    """MixRC as the flags say."""
    weights = {"distance": options.cosine_weight, "coherence": options.coherence_weight,
               "alignment": options.alignment_weight, "semantics": options.semantic_weight}  # fmt: skip
    named = options.alignment_weight or options.semantic_weight
    if named and not options.names:
        raise UserError("--alignment-weight and --semantic-weight need --names, a json list of class names")
    names, things = read_names(options.names) if named else ([], 0)
    own = setting.embed(names) if named else torch.zeros(0, 1)
    teachers = setting.embed(names, teacher="dense") if options.alignment_weight else torch.zeros(0, 1)
    return MixRC(
        **setting.common(), weights=weights, student_classes=own, teacher_classes=teachers, things=things,
        threshold=options.threshold, temperature=options.logit_temperature, multiscale=options.multiscale,
        label_texts=own if options.semantic_weight else None,
        semantic=dict(share=(options.semantic_share, options.spatial_share), neighbours=options.neighbours, kind="l2"),
    )  # fmt: skip


def mixrc_teachers(options: MixRCFlags) -> tuple[TeacherSpec, ...]:
    """Teachers of the parts in use."""
    crops, names = options.cosine_weight or options.semantic_weight, options.semantic_weight
    wanted = ((crops, crop_teacher(options)), (options.coherence_weight or names, vision_teacher(options)),
              (options.alignment_weight, dense_teacher(options)),
              (names, TeacherSpec("start", readout="multi-v:3")))  # fmt: skip
    return tuple(spec for weight, spec in wanted if weight)


METHOD = Entry(
    name="mixrc",
    summary="gated values on boxes and cells, coherent; a bigger dense teacher and refined names by choice",
    options=MixRCFlags,
    build=build,
    sources=("mixed_distill", "grid_distill", "proposals_distill"),
    losses=("distance", "coherence", "things", "stuff", "semantics"),
    fields=lambda options: ("crops",) if options.cosine_weight or options.semantic_weight else (),
    teachers=mixrc_teachers,
    learns_from=lambda options: (LIST,) if options.alignment_weight or options.semantic_weight else (),
    readout="gated:3",
    recipes={
        "mixrc-b16": "--model EVA02-CLIP-B-16 --lock-image --lock-image-unlocked-groups 12 --alpha 0.7 --batch-size 4",
        "mixrc-l14": "--model EVA02-CLIP-L-14-336 --det-image-size 896 --lock-image --lock-image-unlocked-groups 24 "
        "--alpha 0.95 --batch-size 4 --vfm vit_large_patch14_reg4_dinov2",
    },
)
