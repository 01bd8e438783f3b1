"""What teaches, as a description: which model, what it looks at, and what it says."""

from __future__ import annotations

from dataclasses import dataclass

from training.engine.flags import NATURAL, flag


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher.

    Attributes:
        name: under which a method finds it, and a batch its view.
        kind: ``"clip"`` (a model of :mod:`open_clip`, whose answers lie in its joint space) or ``"timm"`` (an image
            trunk without text).
        source: what it looks at: ``"crops"`` of the regions, or the ``"images"``.
        emits: ``"embedding"`` (one vector for each picture) or ``"map"`` (one for each cell).
        model: its name; "" for the model that training starts from.
        weights: tag or file; "" for a timm trunk's own published weights, ``"random"`` for none.
        size: side of the pictures in pixels; 0 for the native size (crops), or for as many cells as the student has
            (images; a CLIP gets the largest multiple of its patch size that the student's image has).
        readout: dense reading of a map's teacher; None for its own.
        texts: whether its text tower is asked for class embeddings.
    """

    name: str
    kind: str = "clip"
    source: str = "images"
    emits: str = "map"
    model: str = ""
    weights: str = ""
    size: int = 0
    readout: str | None = None
    texts: bool = False


@dataclass(frozen=True)
class CropTeacherFlags:
    """A teacher that embeds the crop of each region."""

    crop_teacher: str = flag("", "model that embeds the crops; by default the start model", metavar="MODEL")
    crop_teacher_weights: str = flag("", "its tag or file", metavar="TAG|FILE")


@dataclass(frozen=True)
class VisionTeacherFlags:
    """A vision foundation model whose cells show what belongs together."""

    vfm: str = flag("vit_base_patch14_reg4_dinov2", "timm trunk that is the foundation model", metavar="TRUNK")
    vfm_weights: str = flag("", 'its file, or "random"; by default timm\'s', metavar="FILE")
    vfm_size: int = flag(0, "side of its input in pixels; 0 for as many cells as the student has", type=NATURAL)


@dataclass(frozen=True)
class DenseTeacherFlags:
    """Another dense CLIP that teaches on the whole image."""

    dense_teacher: str = flag("EVA02-CLIP-L-14-336", "model of the dense teacher", metavar="MODEL")
    dense_teacher_weights: str = flag("", "its tag or file", metavar="TAG|FILE")
    dense_teacher_size: int = flag(0, "side of its input in pixels; 0 for the image's, rounded down", type=NATURAL)


def crop_teacher(flags: CropTeacherFlags) -> TeacherSpec:
    """The teacher of crops, named ``crops``."""
    return TeacherSpec("crops", "clip", "crops", "embedding", flags.crop_teacher, flags.crop_teacher_weights)


def vision_teacher(flags: VisionTeacherFlags) -> TeacherSpec:
    """The foundation model, named ``vfm``."""
    return TeacherSpec("vfm", "timm", "images", "map", flags.vfm, flags.vfm_weights, flags.vfm_size)


def dense_teacher(flags: DenseTeacherFlags) -> TeacherSpec:
    """The dense CLIP, named ``dense``, with its text tower."""
    return TeacherSpec(
        "dense", "clip", "images", "map", flags.dense_teacher, flags.dense_teacher_weights, flags.dense_teacher_size,
        texts=True,
    )  # fmt: skip
