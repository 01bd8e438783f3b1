"""Class-agnostic mask head, mask targets, and masks put into images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from ovdet.parts import boxes as box_ops
from ovdet.parts.fpn import Norm, conv_norm
from ovdet.parts.losses import mask_loss


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
        layers: list[nn.Module] = []
        for _ in range(convs):
            layers += [conv_norm(channels, channels, 3, norm), nn.ReLU()]
        self.layers = nn.Sequential(
            *layers, nn.ConvTranspose2d(channels, channels, 2, stride=2), nn.ReLU(), nn.Conv2d(channels, 1, 1)
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

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


def mask_targets(masks: Tensor, which: Tensor, boxes: Tensor, side: int, chunk: int = 32) -> Tensor:
    """Masks cut out by boxes and brought to ``side`` x ``side`` cells: bool ``[P, side, side]``.

    A cell is true where at least half of it (sampled by RoIAlign) is.

    Args:
        masks: bool ``[N, S, S]``; which: the mask of each box, int64 ``[P]``; boxes: ``[P, 4]`` in its pixels.
        chunk: boxes cut at once; each takes a float32 copy of its mask, 4 MB at S = 1024.
    """
    cut = [torch.zeros(0, side, side, dtype=torch.bool, device=boxes.device)]
    with torch.autocast(boxes.device.type, enabled=False):
        for index, box in zip(which.split(chunk), boxes.float().split(chunk), strict=True):
            number = torch.arange(len(box), dtype=torch.float32, device=box.device)[:, None]
            share = roi_align(masks[index][:, None].float(), torch.cat([number, box], 1), side, 1.0, -1, True)
            cut.append(share[:, 0] >= 0.5)
    return torch.cat(cut)


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Masks in the frame of their boxes put into an image: bool ``[N, height, width]``.

    Bilinear at pixel centres, true where >= ``threshold``; false outside the box. Works at any scale: scale the boxes
    to the original image and paste there.

    Args:
        masks: probabilities ``[N, m, m]``.
        boxes: ``[N, 4]`` xyxy in pixels of the image.
        size: (height, width) of the image.
    """
    height, width = size
    result = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        left, top = max(int(x1), 0), max(int(y1), 0)
        right, bottom = min(int(-(-x2 // 1)), width), min(int(-(-y2 // 1)), height)
        if left >= right or top >= bottom:
            continue
        # Pixel centres in the box's frame, -1..1; only the pixels that the box touches are computed.
        x = (torch.arange(left, right, device=masks.device) + 0.5 - x1) / (x2 - x1) * 2 - 1
        y = (torch.arange(top, bottom, device=masks.device) + 0.5 - y1) / (y2 - y1) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None].float()
        values = F.grid_sample(masks[i][None, None].float(), grid, padding_mode="border", align_corners=False)[0, 0]
        inside = (y.abs() <= 1)[:, None] & (x.abs() <= 1)[None]
        result[i, top:bottom, left:right] = (values >= threshold) & inside
    return result
