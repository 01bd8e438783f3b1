"""The student: torchvision's DeepLabV3 with the class embeddings as its fixed classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation import deeplabv3_resnet50, deeplabv3_resnet101

from training.engine.errors import UserError

BACKBONES = {"resnet50": deeplabv3_resnet50, "resnet101": deeplabv3_resnet101}


class Student(nn.Module):
    """Images to logits of classes that are described by embeddings.

    DeepLabV3 (atrous pooling at output stride 8) whose last convolution leads to the embeddings' width; a logit is the
    product of a feature and a class embedding, neither scaled nor shifted, and features are not normalised. The
    embeddings are fixed, so the classes can be exchanged after training.

    Args:
        embeddings: unit-length ``[C, D]``, one per class.
        backbone: ``resnet50`` or ``resnet101``.
        background: label of a class that is learned (one vector, of unit length when used) instead of described; None
            for none. Its row of ``embeddings`` is not used.

    Raises:
        UserError: an unknown backbone.
    """

    def __init__(self, embeddings: Tensor, *, backbone: str = "resnet50", background: int | None = None) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise UserError(f'no backbone is called "{backbone}": use {" or ".join(BACKBONES)}')
        net = BACKBONES[backbone](weights=None, weights_backbone=None, num_classes=embeddings.shape[1])
        self.backbone, self.head = net.backbone, net.classifier
        self.register_buffer("embeddings", embeddings.clone().float())
        self.background = background
        self.background_vector = None if background is None else nn.Parameter(torch.randn(embeddings.shape[1]))

    def classifier(self) -> Tensor:
        """Class vectors ``[C, D]`` of unit length; the background's takes gradients."""
        if self.background_vector is None:
            return self.embeddings
        own = F.normalize(self.background_vector, dim=0)[None]
        return torch.cat([self.embeddings[: self.background], own, self.embeddings[self.background + 1 :]])

    def features(self, image: Tensor) -> Tensor:
        """Features ``[B, D, h, w]`` of normalised images ``[B, 3, H, W]``; h is H / 8, rounded up."""
        return self.head(self.backbone(image)["out"])

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``[B, C, h, w]``."""
        return class_logits(self.features(image), self.classifier())


def class_logits(features: Tensor, classifier: Tensor) -> Tensor:
    """``[B, D, h, w]`` and ``[C, D]`` to ``[B, C, h, w]``."""
    return torch.einsum("bdhw,cd->bchw", features, classifier)
