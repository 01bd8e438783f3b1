"""Region proposal network: objectness and class-agnostic boxes at anchors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from ovdet.config import ModelConfig
from ovdet.parts import boxes as box_ops
from ovdet.parts.anchors import level_anchors
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
        config: the ``rpn_*`` and ``anchor_*`` values.
        channels: of the pyramid.
        strides: input pixels per cell of each level.
    """

    def __init__(self, config: ModelConfig, channels: int, strides: Sequence[float]) -> None:
        super().__init__()
        self.config, self.strides = config, tuple(strides)
        layers: list[nn.Module] = []
        for _ in range(config.rpn_convs):
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
        self.convs = nn.Sequential(*layers)
        self.objectness = nn.Conv2d(channels, len(config.anchor_ratios), 1)
        self.offsets = nn.Conv2d(channels, 4 * len(config.anchor_ratios), 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
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
                level_anchors(grid, stride, self.config.anchor_scale, self.config.anchor_ratios, device=x.device)
            )
        return RPNOutput(torch.cat(logits, 1), torch.cat(offsets, 1), torch.cat(anchors), [len(a) for a in anchors])

    def losses(
        self, out: RPNOutput, image_sizes: Sequence[tuple[int, int]], truth: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(objectness loss, box loss), each over the anchors sampled in the whole batch.

        Args:
            truth: one ``[M_i, 4]`` per image; M_i may be 0 (all its anchors are background).
        """
        config = self.config
        logits, positives, predicted, targets = [], [], [], []
        for i, (size, boxes) in enumerate(zip(image_sizes, truth, strict=True)):
            matches = box_ops.match(
                out.anchors,
                boxes,
                positive=config.rpn_positive_iou,
                negative=config.rpn_negative_iou,
                at_least=config.rpn_negative_iou,
            )
            matches[~_centred_inside(out.anchors, size)] = box_ops.IGNORED
            positive, background = box_ops.sample(matches, config.rpn_samples, config.rpn_positive_share)
            logits += [out.logits[i, positive], out.logits[i, background]]
            positives += [torch.ones_like(positive, dtype=torch.bool), torch.zeros_like(background, dtype=torch.bool)]
            predicted.append(out.offsets[i, positive])
            targets.append(box_ops.encode_boxes(boxes[matches[positive]], out.anchors[positive], CODE_WEIGHTS))
        sampled = torch.cat(positives)
        return (
            objectness_loss(torch.cat(logits), sampled),
            box_loss(torch.cat(predicted), torch.cat(targets), len(sampled)),
        )

    @torch.no_grad()
    def proposals(self, out: RPNOutput, image_sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Per image ``boxes`` ``[K, 4]`` and ``scores`` ``[K]`` (objectness), by falling score.

        The best ``rpn_pre_nms`` of each level, NMS per level, then the best ``rpn_post_nms`` of the image.
        """
        config = self.config
        levels = torch.cat([torch.full((n,), i, device=out.anchors.device) for i, n in enumerate(out.level_sizes)])
        results = []
        for i, size in enumerate(image_sizes):
            logits = out.logits[i].float()
            # Anchors in the padding are never trained: what they say means nothing.
            logits = logits.masked_fill(~_centred_inside(out.anchors, size), -torch.inf)
            chosen, start = [], 0
            for count in out.level_sizes:
                chosen.append(logits[start : start + count].topk(min(config.rpn_pre_nms, count)).indices + start)
                start += count
            keep = torch.cat(chosen)
            boxes = box_ops.decode_boxes(out.offsets[i, keep], out.anchors[keep], CODE_WEIGHTS)
            boxes = box_ops.clip_to(boxes, size)
            usable = logits[keep].isfinite() & (boxes[:, 2:] - boxes[:, :2] > 0).all(dim=1) & boxes.isfinite().all(1)
            keep, boxes = keep[usable], boxes[usable]
            best = batched_nms(boxes, logits[keep], levels[keep], config.rpn_nms)[: config.rpn_post_nms]
            results.append({"boxes": boxes[best], "scores": logits[keep][best].sigmoid()})
        return results


def _centred_inside(anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Bool ``[N]``: the anchor's centre is in the valid (height, width), which begins at the top left."""
    height, width = size
    x, y = (anchors[:, 0] + anchors[:, 2]) / 2, (anchors[:, 1] + anchors[:, 3]) / 2
    return (x < width) & (y < height)
