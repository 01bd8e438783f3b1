"""Box head: pooled regions to an embedding in the VLM's joint space and one refined box for all classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovdet.config import ModelConfig
from ovdet.parts import boxes as box_ops
from ovdet.parts.fpn import conv_norm
from ovdet.parts.losses import box_loss, classification_loss

CODE_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


class Samples(NamedTuple):
    """RoIs of a batch chosen for the loss, image by image."""

    boxes: list[Tensor]  # [K_i, 4], positives first
    labels: Tensor  # [sum K_i] int64, C = background
    positives: list[Tensor]  # indices of true boxes that the first of each K_i answer for, int64 [P_i]


class BoxHead(nn.Module):
    """Convolutions with batch norm, fully connected layers, then embedding and box offsets.

    The class score is ``temperature * cosine(embedding, class embedding)``; the temperature is learned as its
    logarithm, so that its step is relative.

    Args:
        config: the ``box_*``, ``roi_*``, ``temperature`` and ``background_weight`` values.
        channels: of the pyramid.
        embed_dim: D of the class embeddings.
        strides: of the pyramid levels that boxes are pooled from.
    """

    def __init__(self, config: ModelConfig, channels: int, embed_dim: int, strides: Sequence[float]) -> None:
        super().__init__()
        self.config, self.strides = config, tuple(strides)
        layers: list[nn.Module] = []
        for _ in range(config.box_convs):
            layers += [conv_norm(channels, channels, 3), nn.ReLU()]
        self.convs = nn.Sequential(*layers)
        layers, inputs = [], channels * config.box_size**2
        for _ in range(config.box_fcs):
            layers += [nn.Linear(inputs, config.box_width), nn.ReLU()]
            inputs = config.box_width
        self.fcs = nn.Sequential(*layers)
        self.embedding = nn.Linear(inputs, embed_dim)
        self.offsets = nn.Linear(inputs, 4)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.offsets.weight, std=0.001)  # first boxes are the proposals

    def forward(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(embeddings ``[K, D]``, offsets ``[K, 4]``) of one ``[K_i, 4]`` per image, K = sum K_i."""
        x = box_ops.pool_levels(maps, self.strides, boxes, size=self.config.box_size, sampling=self.config.roi_sampling)
        x = self.fcs(self.convs(x).flatten(1))
        return self.embedding(x), self.offsets(x)

    def logits(self, embeddings: Tensor, class_embeddings: Tensor, temperature: float = 0.0) -> Tensor:
        """``temperature * cosine``: ``[K, C+1]``, float32.

        Args:
            class_embeddings: ``[C+1, D]``, unit length.
            temperature: fixed value; 0 = the learned one.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            cosine = F.normalize(embeddings.float(), dim=-1) @ class_embeddings.float().T
            return cosine * (temperature if temperature else self.log_temperature.exp())

    @torch.no_grad()
    def sample(
        self,
        proposals: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        targets: Sequence[dict[str, Tensor]],
        background: int,
    ) -> Samples:
        """RoIs for the loss from proposals and the true boxes themselves.

        An image without any gets its whole valid area, as background: every image (and so every process) always
        contributes a RoI, whose label is right because there is no true box.

        Args:
            background: label C of background.
        """
        config = self.config
        boxes, labels, positives = [], [], []
        for proposed, (height, width), target in zip(proposals, image_sizes, targets, strict=True):
            truth = target["boxes"].float()
            candidates = torch.cat([truth, proposed])
            if not len(candidates):
                candidates = truth.new_tensor([[0, 0, width, height]])
            matches = box_ops.match(candidates, truth, positive=config.roi_iou, negative=config.roi_iou)
            positive, negative = box_ops.sample(matches, config.roi_samples, config.roi_positive_share)
            positives.append(matches[positive])
            boxes.append(candidates[torch.cat([positive, negative])])
            labels += [target["labels"][matches[positive]], torch.full_like(negative, background)]
        return Samples(boxes, torch.cat(labels), positives)

    def losses(
        self,
        maps: Sequence[Tensor],
        samples: Samples,
        targets: Sequence[dict[str, Tensor]],
        class_embeddings: Tensor,
        base_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(classification loss, box loss) over the sampled RoIs."""
        embeddings, offsets = self(maps, samples.boxes)
        logits = self.logits(embeddings, class_embeddings)
        predicted, wanted = [], []
        for out, boxes, which, target in zip(
            offsets.split([len(b) for b in samples.boxes]), samples.boxes, samples.positives, targets, strict=True
        ):
            predicted.append(out[: len(which)])
            wanted.append(box_ops.encode_boxes(target["boxes"][which], boxes[: len(which)], CODE_WEIGHTS))
        return (
            classification_loss(logits, samples.labels, base_mask, self.config.background_weight),
            box_loss(torch.cat(predicted), torch.cat(wanted), len(samples.labels)),
        )

    def refine(self, offsets: Tensor, boxes: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Boxes moved by their offsets and clipped to the valid area, one ``[K_i, 4]`` per image."""
        parts = offsets.split([len(b) for b in boxes])
        return [
            box_ops.clip_to(box_ops.decode_boxes(part, box, CODE_WEIGHTS), size)
            for part, box, size in zip(parts, boxes, image_sizes, strict=True)
        ]
