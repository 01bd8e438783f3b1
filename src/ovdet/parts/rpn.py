"""Region proposal network: objectness and class-agnostic boxes at anchors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from ovdet.parts import boxes as box_ops
from ovdet.parts.anchors import level_anchors
from ovdet.parts.fpn import Norm, conv_norm
from ovdet.parts.losses import box_loss, objectness_loss

CODE_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


class RPNOutput(NamedTuple):
    """Predictions at all anchors of a batch, levels one after the other."""

    logits: Tensor  # objectness [B, N]
    offsets: Tensor  # [B, N, 4]
    anchors: Tensor  # [N, 4], float32
    level_sizes: list[int]  # anchors of each level; their sum is N


class RPN(nn.Module):
    """Convolutions shared by all levels, then 1x1 convolutions for objectness and box offsets (Faster R-CNN).

    Args:
        channels: of the pyramid.
        strides: input pixels per cell of each level.
        convs: 3x3 convolutions before the outputs, each followed by ReLU.
        norm: between convolution and ReLU; None: convolutions with bias and no norm.
        anchor_scale: side of a square anchor in strides; anchor_ratios: height / width; anchor_offset: of their
            centres, in cells.
        samples: anchors per image in the loss, of which at most ``positive_share`` are positive.
        positive_iou, negative_iou: bounds of the assignment; from ``negative_iou`` on the best anchor of a true box is
            positive too.
        pre_nms: proposals per level before NMS at IoU ``nms``; post_nms: per image after it.
        padding: whether anchors centred in the padding are trained (as background) and proposed.
        empty_counts_one: whether an image without positives counts one sample more in the losses' divisor, as in
            MMDetection 2.
        limit_below: see :func:`ovdet.parts.boxes.decode_boxes`.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[float],
        *,
        convs: int = 2,
        norm: Norm | None = None,
        anchor_scale: float = 8.0,
        anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        anchor_offset: float = 0.0,
        samples: int = 256,
        positive_share: float = 0.5,
        positive_iou: float = 0.7,
        negative_iou: float = 0.3,
        pre_nms: int = 2000,
        post_nms: int = 1000,
        nms: float = 0.7,
        padding: bool = True,
        empty_counts_one: bool = True,
        limit_below: bool = True,
    ) -> None:
        super().__init__()
        self.strides, self.anchor_scale = tuple(strides), anchor_scale
        self.anchor_ratios, self.anchor_offset = tuple(anchor_ratios), anchor_offset
        self.samples, self.positive_share = samples, positive_share
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.pre_nms, self.post_nms, self.nms = pre_nms, post_nms, nms
        self.padding, self.empty_counts_one, self.limit_below = padding, empty_counts_one, limit_below
        layers: list[nn.Module] = []
        for _ in range(convs):
            layers += [conv_norm(channels, channels, 3, norm), nn.ReLU()]
        self.convs = nn.Sequential(*layers)
        self.objectness = nn.Conv2d(channels, len(self.anchor_ratios), 1)
        self.offsets = nn.Conv2d(channels, 4 * len(self.anchor_ratios), 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> RPNOutput:
        """Predictions for pyramid levels ``[B, C, h_l, w_l]``."""
        logits, offsets, anchors = [], [], []
        for features, stride in zip(maps, self.strides, strict=True):
            x = self.convs(features)
            batch, grid = len(x), x.shape[-2:]
            logits.append(self.objectness(x).permute(0, 2, 3, 1).reshape(batch, -1))
            # Channels are ordered ratio by ratio, four offsets each, as the anchors are.
            offsets.append(self.offsets(x).permute(0, 2, 3, 1).reshape(batch, -1, 4))
            anchors.append(
                level_anchors(
                    grid, stride, self.anchor_scale, self.anchor_ratios, x.device, offset=self.anchor_offset
                )
            )
        return RPNOutput(torch.cat(logits, 1), torch.cat(offsets, 1), torch.cat(anchors), [len(a) for a in anchors])

    def losses(
        self, out: RPNOutput, image_sizes: Sequence[tuple[int, int]], truth: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(objectness loss, box loss), each over the anchors sampled in the whole batch.

        Args:
            image_sizes: (height, width) of the valid area of each image.
            truth: one ``[M_i, 4]`` per image; M_i may be 0 (all its anchors are background).
        """
        logits, positives, predicted, targets, extra = [], [], [], [], 0
        for i, (size, boxes) in enumerate(zip(image_sizes, truth, strict=True)):
            matches = box_ops.match(
                out.anchors,
                boxes,
                positive=self.positive_iou,
                negative=self.negative_iou,
                at_least=self.negative_iou,
            )
            if not self.padding:
                matches[~_centred_inside(out.anchors, size)] = box_ops.IGNORED
            positive, background = box_ops.sample(matches, self.samples, self.positive_share)
            logits += [out.logits[i, positive], out.logits[i, background]]
            positives += [torch.ones_like(positive, dtype=torch.bool), torch.zeros_like(background, dtype=torch.bool)]
            predicted.append(out.offsets[i, positive])
            targets.append(box_ops.encode_boxes(boxes[matches[positive]], out.anchors[positive], CODE_WEIGHTS))
            extra += self.empty_counts_one and not len(positive)
        sampled = torch.cat(positives)
        divisor = len(sampled) + extra
        return (
            objectness_loss(torch.cat(logits), sampled, divisor),
            box_loss(torch.cat(predicted), torch.cat(targets), divisor),
        )

    @torch.no_grad()
    def proposals(self, out: RPNOutput, image_sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Per image ``boxes`` ``[K, 4]`` and ``scores`` ``[K]`` (objectness), by falling score.

        The best ``pre_nms`` of each level, NMS per level, then the best ``post_nms`` of the image.
        """
        levels = torch.cat([torch.full((n,), i, device=out.anchors.device) for i, n in enumerate(out.level_sizes)])
        results = []
        for i, size in enumerate(image_sizes):
            logits = out.logits[i].float()
            if not self.padding:  # what is never trained means nothing
                logits = logits.masked_fill(~_centred_inside(out.anchors, size), -torch.inf)
            chosen, start = [], 0
            for count in out.level_sizes:
                chosen.append(logits[start : start + count].topk(min(self.pre_nms, count)).indices + start)
                start += count
            keep = torch.cat(chosen)
            boxes = box_ops.decode_boxes(
                out.offsets[i, keep], out.anchors[keep], CODE_WEIGHTS, limit_below=self.limit_below
            )
            boxes = box_ops.clip_to(boxes, size)
            usable = logits[keep].isfinite() & (boxes[:, 2:] - boxes[:, :2] > 0).all(dim=1) & boxes.isfinite().all(1)
            keep, boxes = keep[usable], boxes[usable]
            best = batched_nms(boxes, logits[keep], levels[keep], self.nms)[: self.post_nms]
            results.append({"boxes": boxes[best], "scores": logits[keep][best].sigmoid()})
        return results


def _centred_inside(anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Bool ``[N]``: the anchor's centre is in the valid (height, width), which begins at the top left."""
    height, width = size
    x, y = (anchors[:, 0] + anchors[:, 2]) / 2, (anchors[:, 1] + anchors[:, 3]) / 2
    return (x < width) & (y < height)
