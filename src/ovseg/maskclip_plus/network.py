"""The student: a segmentation network of torchvision with the class embeddings as its fixed classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation import (
    deeplabv3_mobilenet_v3_large,
    deeplabv3_resnet50,
    deeplabv3_resnet101,
    lraspp_mobilenet_v3_large,
)

from open_clip.weights import load_torch_file
from ovseg.classes import ClassList
from ovseg.protocols import Protocol
from ovseg.segment import ImageSegmenter
from training.engine.checkpoint import read_file
from training.engine.errors import UserError


class Architecture(NamedTuple):
    """A network of torchvision.

    Attributes:
        build: makes it.
        stride: pixels of its cells.
        levels: whether the head reads several maps of the backbone, or only the last.
    """

    build: Callable[..., nn.Module]
    stride: int
    levels: bool = False


#: Names of students. The last two are for machines without a GPU; LR-ASPP has cells of half the side and takes 0.7 of
#: the other's time.
BACKBONES = {
    "resnet50": Architecture(deeplabv3_resnet50, 8),
    "resnet101": Architecture(deeplabv3_resnet101, 8),
    "mobilenet_v3_large": Architecture(deeplabv3_mobilenet_v3_large, 16),
    "lraspp_mobilenet_v3_large": Architecture(lraspp_mobilenet_v3_large, 8, levels=True),
}


class Student(nn.Module):
    """Images to logits of classes that are described by embeddings.

    DeepLabV3 (atrous pooling at output stride 8, with MobileNet 16), or LR-ASPP (the sum of two levels, at 8), whose
    last convolution leads to the embeddings' width; a logit is the product of a feature and a class embedding, neither
    scaled nor shifted, and features are not normalised. The embeddings are fixed, so the classes can be exchanged after
    training.

    Args:
        embeddings: unit-length ``[C, D]``, one per class.
        backbone: one of :data:`BACKBONES`.
        background: label of a class that is learned (one vector, of unit length when used) instead of described; None
            for none. Its row of ``embeddings`` is not used.

    Raises:
        UserError: an unknown backbone.
    """

    def __init__(self, embeddings: Tensor, *, backbone: str = "resnet50", background: int | None = None) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise UserError(f'no backbone is called "{backbone}": use {", ".join(BACKBONES)}')
        build, self.stride, self.levels = BACKBONES[backbone]
        net = build(weights=None, weights_backbone=None, num_classes=embeddings.shape[1])
        self.name, self.backbone, self.head = backbone, net.backbone, net.classifier
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                # torchvision's MobileNet averages over 100 steps, its ResNet over 10; after a few hundred steps from
                # random weights the former's statistics would still be those of a network that is long gone.
                module.momentum = 0.1
        self.register_buffer("embeddings", embeddings.clone().float())
        self.background = background
        self.background_vector = None if background is None else nn.Parameter(torch.randn(embeddings.shape[1]))
        self.to(memory_format=torch.channels_last)  # faster convolutions on CPUs and in half precision

    def classifier(self) -> Tensor:
        """Class vectors ``[C, D]`` of unit length; the background's takes gradients."""
        if self.background_vector is None:
            return self.embeddings
        own = F.normalize(self.background_vector, dim=0)[None]
        return torch.cat([self.embeddings[: self.background], own, self.embeddings[self.background + 1 :]])

    def features(self, image: Tensor) -> Tensor:
        """Features ``[B, D, h, w]`` of normalised images ``[B, 3, H, W]``; h is H / stride, rounded up."""
        maps = self.backbone(image.contiguous(memory_format=torch.channels_last))
        return self.head(maps if self.levels else maps["out"])

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``[B, C, h, w]``."""
        return class_logits(self.features(image), self.classifier())

    def load_backbone(self, path: str | Path) -> None:
        """Start from the weights of torchvision's ResNet or MobileNet (a state dict; its classifier is left out).

        Raises:
            UserError: the file cannot be read or does not fit.
        """
        try:
            state = load_torch_file(path)
            kept = {k: v for k, v in state.items() if not k.startswith(("fc.", "classifier."))}
            state = {k.removeprefix("features."): v for k, v in kept.items()}  # as MobileNet calls its layers
            self.backbone.load_state_dict(state)
        except Exception as error:  # torch raises many kinds for files that are no weights
            raise UserError(
                f"{path}: no weights of torchvision's {self.name} ({str(error).strip().splitlines()[0][:150]})"
            ) from None


def class_logits(features: Tensor, classifier: Tensor) -> Tensor:
    """``[B, D, h, w]`` and ``[C, D]`` to ``[B, C, h, w]``."""
    return torch.einsum("bdhw,cd->bchw", features, classifier)


# -- the student after training ---------------------------------------------------------------------------------------


class StudentSegmenter(ImageSegmenter):
    """Labels of images by a student, with the calls of :class:`ovseg.segment.Segmenter`.

    Args:
        student: in eval mode while it is used.
        classes: those that it was trained for.
        protocol: settings; the image's size, windows and PAMR count, readings and refinements do not.
        mean, std: pixel normalisation.
        dtype: autocast dtype; float32 for none.
    """

    def __init__(
        self,
        student: Student,
        classes: ClassList,
        protocol: Protocol,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        # One score per class: the student knows classes, not words.
        classes = ClassList(
            classes.names, tuple((name,) for name in classes.names), classes.background, classes.unseen, classes.palette
        )
        super().__init__(
            classes,
            protocol,
            patch_size=student.stride,
            mean=mean,
            std=std,
            device=student.embeddings.device,
            dtype=dtype,
        )
        self.student = student

    def read(self, windows: Tensor) -> tuple[dict[str | None, Tensor], Tensor | None]:
        """Logits of the classes, under the name of the protocol's reading."""
        with self._autocast():
            features = self.student.features(windows)
        return {self.shared.readout: class_logits(features.float(), self.student.classifier())}, None


def release_of(student: Student, classes: ClassList | Sequence[str], *, mean: Sequence[float], std: Sequence[float]):
    """A student as a file holds it: weights and plain values."""
    return {
        "state_dict": student.state_dict(),
        "backbone": student.name,
        "background": student.background,
        "classes": list(classes.names if isinstance(classes, ClassList) else classes),
        "mean": list(mean),
        "std": list(std),
    }


def load_student(path: str | Path) -> tuple[Student, Mapping[str, Any]]:
    """A student from its file, on the CPU in eval mode, and what the file says of it (``classes``, ``mean``, ``std``).

    Raises:
        UserError: missing, damaged, or no such file.
    """
    content = read_file(Path(path))
    try:
        state = content["state_dict"]
        student = Student(state["embeddings"], backbone=content["backbone"], background=content["background"])
        student.load_state_dict(state)
        return student.eval(), {key: content[key] for key in ("classes", "mean", "std")}
    except (KeyError, TypeError, RuntimeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(f"{path}: holds no student of MaskCLIP+ ({reason})") from None
