"""Box head: pooled regions to an embedding in the VLM's joint space and one refined box for all classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ovdet.parts import boxes as box_ops
from ovdet.parts.fpn import Norm, conv_layers, draw_for_relu, init_weights
from ovdet.parts.losses import box_loss
from ovdet.parts.rois import Samples

CODE_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


class BoxHead(nn.Module):
    """RoIAlign, convolutions with norm, fully connected layers with ReLU, then embedding and box offsets.

    Args:
        channels: of the pyramid.
        embed_dim: D of the class embeddings.
        strides: of the pyramid levels that boxes are pooled from.
        size: RoIAlign side; sampling, finest: see :func:`ovdet.parts.boxes.pool_levels`.
        convs: 3x3 convolutions, each with ``norm`` (None: with bias) and ReLU.
        fcs: fully connected layers shared by embedding and offsets, each ``width`` wide.
        own_fcs: further ones, of the offsets alone.
        embedding_relu: whether the embedding ends with a ReLU (its elements are then not negative).
        limit_below: see :func:`ovdet.parts.boxes.decode_boxes`.
        refines: whether it gives box offsets; a second judge of the same boxes does not.
    """

    def __init__(
        self,
        channels: int,
        embed_dim: int,
        strides: Sequence[float],
        *,
        size: int = 7,
        sampling: int = 0,
        finest: float = 56.0,
        convs: int = 4,
        norm: Norm | None = nn.BatchNorm2d,
        fcs: int = 2,
        width: int = 1024,
        own_fcs: int = 0,
        embedding_relu: bool = False,
        limit_below: bool = True,
        refines: bool = True,
    ) -> None:
        super().__init__()
        self.strides, self.size, self.sampling, self.finest = tuple(strides), size, sampling, finest
        self.limit_below = limit_below
        self.convs = nn.Sequential(*conv_layers(channels, convs, norm))
        self.fcs = _fully_connected(channels * size**2, width, fcs)
        inputs = width if fcs else channels * size**2
        self.embedding = nn.Linear(inputs, embed_dim)
        self.embedding_relu = nn.ReLU() if embedding_relu else nn.Identity()
        self.own_fcs = _fully_connected(inputs, width, own_fcs if refines else 0)
        self.offsets = nn.Linear(width if own_fcs else inputs, 4) if refines else None
        init_weights(self, nn.Conv2d, draw_for_relu)
        init_weights(self, nn.Linear, nn.init.xavier_uniform_)
        if self.offsets is not None:
            nn.init.normal_(self.offsets.weight, std=0.001)  # first boxes are the proposals

    def forward(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """(embeddings ``[K, D]``, offsets ``[K, 4]`` or None) of one ``[K_i, 4]`` per image, K = sum K_i."""
        x = box_ops.pool_levels(
            maps, self.strides, boxes, size=self.size, sampling=self.sampling, finest=self.finest
        )
        x = self.fcs(self.convs(x).flatten(1))
        offsets = None if self.offsets is None else self.offsets(self.own_fcs(x))
        return self.embedding_relu(self.embedding(x)), offsets

    def box_loss(self, offsets: Tensor, samples: Samples, truth: Sequence[Tensor]) -> Tensor:
        """L1 of the positives' offsets, divided by the number of all RoIs.

        Args:
            offsets: ``[K, 4]``, of all sampled RoIs.
            truth: true boxes, one ``[M_i, 4]`` per image.
        """
        predicted, wanted = [], []
        for out, boxes, which, own in zip(
            offsets.split([len(b) for b in samples.boxes]), samples.boxes, samples.positives, truth, strict=True
        ):
            predicted.append(out[: len(which)])
            wanted.append(box_ops.encode_boxes(own[which], boxes[: len(which)], CODE_WEIGHTS))
        return box_loss(torch.cat(predicted), torch.cat(wanted), len(samples.labels))

    def refine(self, offsets: Tensor, boxes: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Boxes moved by their offsets and clipped to the valid area, one ``[K_i, 4]`` per image."""
        parts = offsets.split([len(b) for b in boxes])
        return [
            box_ops.clip_to(box_ops.decode_boxes(part, box, CODE_WEIGHTS, limit_below=self.limit_below), size)
            for part, box, size in zip(parts, boxes, image_sizes, strict=True)
        ]


def _fully_connected(inputs: int, width: int, number: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(number):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers)
