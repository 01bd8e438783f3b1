"""Class-agnostic mask head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ovdet.parts import boxes as box_ops
from ovdet.parts.fpn import Norm, conv_layers, draw_for_relu, init_weights
from ovdet.parts.losses import mask_loss
from ovdet.parts.masks import mask_targets


class MaskHead(nn.Module):
    """Convolutions with norm, a transposed convolution x2 and one logit per cell (Mask R-CNN, one mask for all).

    Args:
        channels: of the pyramid.
        strides: of the pyramid levels that boxes are pooled from.
        size: RoIAlign side, masks have twice that; sampling, finest: see :func:`ovdet.parts.boxes.pool_levels`.
        convs: 3x3 convolutions, each with ``norm`` (None: with bias) and ReLU.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[float],
        *,
        size: int = 14,
        sampling: int = 0,
        finest: float = 56.0,
        convs: int = 4,
        norm: Norm | None = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.strides, self.size, self.sampling, self.finest = tuple(strides), size, sampling, finest
        self.layers = nn.Sequential(
            *conv_layers(channels, convs, norm),
            nn.ConvTranspose2d(channels, channels, 2, stride=2), nn.ReLU(), nn.Conv2d(channels, 1, 1),
        )  # fmt: skip
        init_weights(self, (nn.Conv2d, nn.ConvTranspose2d), draw_for_relu)

    def forward(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Mask logits ``[sum K_i, m, m]`` in the frame of each box, m = 2 * ``size``."""
        x = box_ops.pool_levels(
            maps, self.strides, boxes, size=self.size, sampling=self.sampling, finest=self.finest
        )
        return self.layers(x)[:, 0]

    def losses(
        self,
        maps: Sequence[Tensor],
        boxes: Sequence[Tensor],
        which: Sequence[Tensor],
        masks: Sequence[Tensor],
        fallback: Tensor,
    ) -> Tensor:
        """Loss over positive RoIs.

        Args:
            boxes: one ``[P_i, 4]`` per image; which: int64 ``[P_i]``, the true object of each box.
            masks: bool ``[N_i, S, S]`` of the true objects of each image.
            fallback: a box ``[4]`` in the first image that is run with weight 0 when no image has a positive: the
                parameters get their (zero) gradients and the batch norm its batch in every step and process.
        """
        if any(len(b) for b in boxes):
            side = 2 * self.size
            targets = torch.cat([mask_targets(m, w, b, side) for m, w, b in zip(masks, which, boxes, strict=True)])
            return mask_loss(self(maps, boxes), targets)
        return 0 * self(maps, [fallback[None], *boxes[1:]]).float().sum()
