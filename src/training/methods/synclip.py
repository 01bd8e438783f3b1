"""SynCLIP (CVPR 2026): DeCLIP, and the image's class names against its cells, refined by a foundation model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from training.engine.errors import UserError
from training.engine.flags import COUNT, NOT_NEGATIVE, SHARE, flag
from training.methods.correlation import batch_semantics
from training.methods.declip import DeCLIP, DeCLIPFlags
from training.methods.names import LIST, NAMES_HELP, choose_classes, read_names, read_texts
from training.methods.registry import Entry, Setting
from training.teachers.describe import TeacherSpec, crop_teacher, vision_teacher


@dataclass(frozen=True)
class SynCLIPFlags(DeCLIPFlags):
    """Flags of SynCLIP."""

    semantic_weight: float = flag(0.05, "weight of the names against the cells", type=NOT_NEGATIVE)
    semantic_share: float = flag(0.5, "share of the teacher's similarities in their target", type=SHARE)
    spatial_share: float = flag(0.5, "share of the foundation model's correlations in it", type=SHARE)
    semantic_loss: str = flag("l2", "distance of similarities", choices=("l2", "huber_kl"))
    neighbours: int = flag(7, "cells that a name's correlations are averaged over", type=COUNT)
    classes_from: str = flag(
        "annotations", "the names of an image: its annotations', or the teacher's choice for each crop among --names",
        choices=("annotations", "teacher"),
    )  # fmt: skip
    names: str = flag("", NAMES_HELP, metavar="FILE")
    rich_texts: str = flag("", "json from a name to definition and synonyms, to follow it in texts", metavar="FILE")


class SynCLIP(DeCLIP):
    """DeCLIP's losses and :func:`~training.methods.correlation.semantic_loss`, a mean over all names of a step.

    Args:
        teachers: also ``start``, the frozen start model's dense map; ``vfm`` even without context.
        labels, rich: text features ``[C, D]`` of all names.
        semantic: weight, shares, neighbours and kind, see :func:`~training.methods.correlation.semantic_loss`.
        choose: names of an image are the teacher's nearest for each of its crops, instead of ``batch["classes"]``.
        more: see :class:`DeCLIP`.
    """

    groups = {"context": "images", "semantics": "names"}

    def __init__(self, *, labels: Tensor, rich: Tensor, semantic: dict[str, Any], choose: bool, **more: Any) -> None:
        super().__init__(**more)
        self.register_buffer("label_texts", labels.float(), persistent=False)
        self.register_buffer("rich_texts", rich.float(), persistent=False)
        settings = dict(semantic)
        self.weights["semantics"] = settings.pop("weight")
        self.semantic, self.choose = settings, choose

    def prepare(self, batches: list[dict], *, seed: int) -> None:
        """The names of each image, which the counts hinge on: ids ``classes [M]`` and their images ``classes_of``."""
        super().prepare(batches, seed=seed)
        for batch in batches if self.choose else []:
            choose_classes(self, batch, self.label_texts)

    def counts(self, batch: dict) -> dict[str, float]:
        """Regions, images and names."""
        return {**super().counts(batch), "names": float(len(batch["classes"]))}

    def losses(self, batch: dict) -> dict[str, Tensor]:
        """DeCLIP's, and the semantics summed over names."""
        dense, tokens = self.read(self.images(batch), self.projections, self.sizes(batch))
        out = self.content_and_context(batch, dense, tokens)
        start, vfm = self.ask("start", batch), self.ask("vfm", batch)
        texts = self.label_texts, self.rich_texts
        return {**out, "semantics": batch_semantics(batch, dense, start, vfm, *texts, **self.semantic)}


def build(options: SynCLIPFlags, setting: Setting) -> SynCLIP:
    """SynCLIP as the flags say."""
    choose = options.classes_from == "teacher"
    if choose and not options.names:
        raise UserError("--classes-from teacher chooses among --names: give a file of class names")
    names = read_names(options.names)[0] if choose else list(setting.class_names or ())
    if not names:
        raise UserError("--method synclip: --train-data has no categories; use --classes-from teacher with --names")
    labels = setting.embed(names)
    rich = setting.embed(read_texts(options.rich_texts, names), plain=True) if options.rich_texts else labels
    semantic = dict(weight=options.semantic_weight, share=(options.semantic_share, options.spatial_share),
                    neighbours=options.neighbours, kind=options.semantic_loss)  # fmt: skip
    return SynCLIP(
        **setting.common(), labels=labels, rich=rich, semantic=semantic, choose=choose,
        cosine_weight=options.cosine_weight, context_weight=options.context_weight, as_released=options.as_released,
        multiscale=options.multiscale,
    )  # fmt: skip


def synclip_teachers(options: SynCLIPFlags) -> tuple[TeacherSpec, ...]:
    """DeCLIP's, and the start model's dense map."""
    crops = options.cosine_weight or options.classes_from == "teacher"
    return (*([crop_teacher(options)] if crops else []), vision_teacher(options),
            TeacherSpec("start", "clip", "images", "map", readout="csa"))  # fmt: skip


def synclip_fields(options: SynCLIPFlags) -> tuple[str, ...]:
    """Crops for the teacher, and the image's classes where annotations name them."""
    return ("crops", "classes") if options.classes_from == "annotations" else ("crops",)


_DATA = "--det-image-size 560 --vfm vit_large_patch14_reg4_dinov2 --dataset-type proposals_distill"
_B16 = f"--model EVA02-CLIP-B-16 --lock-image --lock-image-unlocked-groups 12 --alpha 0.7 {_DATA}"
_L14 = f"--model EVA02-CLIP-L-14-336 --lock-image --lock-image-unlocked-groups 24 --alpha 0.95 {_DATA}"
_SCRIPT = "--semantic-loss huber_kl --semantic-weight 0.1 --semantic-share 0.7 --spatial-share 0.3"

METHOD = Entry(
    name="synclip",
    summary="DeCLIP, and class names against cells (SynCLIP, CVPR 2026); learns from annotated classes unless told not",
    options=SynCLIPFlags,
    build=build,
    sources=("proposals_distill", "grid_distill", "mixed_distill"),
    losses=("distance", "context", "semantics"),
    fields=synclip_fields,
    teachers=synclip_teachers,
    readout="csa",
    learns_from=lambda options: ("class names",) if options.classes_from == "annotations" else (LIST,),
    recipes={
        "synclip-b16": f"{_B16} --lr 2e-5 --batch-size 8",  # 4 processes
        "synclip-b16-script": f"{_B16} {_SCRIPT}",
        "synclip-b16-free": f"{_B16} {_SCRIPT} --classes-from teacher --dataset-type grid_distill "
        "--names coco-stuff-ade20k",
        "synclip-l14-script": f"{_L14} {_SCRIPT} --cosine-weight 2 --context-weight 0.05",
    },
)
