"""Region proposal network: objectness and class-agnostic boxes at anchors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovdet.parts import boxes as box_ops
from ovdet.parts.anchors import level_anchors
from ovdet.parts.boxes import Padded
from ovdet.parts.fpn import Norm, conv_layers, init_weights
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
        pre_nms_test: in place of ``pre_nms`` outside of training; 0: the same.
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
        pre_nms_test: int = 0,
    ) -> None:
        super().__init__()
        self.strides, self.anchor_scale = tuple(strides), anchor_scale
        self.anchor_ratios, self.anchor_offset = tuple(anchor_ratios), anchor_offset
        self.samples, self.positive_share = samples, positive_share
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.pre_nms, self.post_nms, self.nms = pre_nms, post_nms, nms
        self.pre_nms_test = pre_nms_test or pre_nms
        self.padding, self.empty_counts_one, self.limit_below = padding, empty_counts_one, limit_below
        self.convs = nn.Sequential(*conv_layers(channels, convs, norm))
        self.objectness = nn.Conv2d(channels, len(self.anchor_ratios), 1)
        self.offsets = nn.Conv2d(channels, 4 * len(self.anchor_ratios), 1)
        init_weights(self, nn.Conv2d, partial(nn.init.normal_, std=0.01))

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

    @torch.no_grad()
    def sample(
        self, out: RPNOutput, image_sizes: Sequence[tuple[int, int]] | Tensor, truth: Padded
    ) -> tuple[box_ops.Draw, Tensor]:
        """Anchors for the loss, and the true box that each anchor answers for, int64 ``[B, N]``."""
        matches = box_ops.match_batch(
            out.anchors[None], truth, positive=self.positive_iou, negative=self.negative_iou,
            at_least=self.negative_iou,
        )  # fmt: skip
        if not self.padding:
            sizes = box_ops.sizes_tensor(image_sizes, out.anchors.device)
            matches = matches.masked_fill(~_centred_inside(out.anchors, sizes), box_ops.IGNORED)
        return box_ops.draw(matches, self.samples, self.positive_share), matches

    def losses(
        self, out: RPNOutput, image_sizes: Sequence[tuple[int, int]] | Tensor, truth: Sequence[Tensor] | Padded
    ) -> tuple[Tensor, Tensor]:
        """(objectness loss, box loss), each over the anchors sampled in the whole batch. No host synchronisation.

        Args:
            image_sizes: (height, width) of the valid area of each image.
            truth: one ``[M_i, 4]`` per image; M_i may be 0 (all its anchors are background).
        """
        truth = truth if isinstance(truth, Padded) else Padded.of(truth)
        return self.losses_of(out, *self.sample(out, image_sizes, truth), truth)

    def losses_of(self, out: RPNOutput, draw: box_ops.Draw, matches: Tensor, truth: Padded) -> tuple[Tensor, Tensor]:
        """:meth:`losses` of what :meth:`sample` gave."""
        positive = draw.valid[:, : draw.positives]
        samples = draw.valid.sum()
        if self.empty_counts_one:
            samples = samples + (~positive.any(dim=1)).sum()
        samples = samples.clamp(min=1)
        target = torch.zeros_like(draw.valid)
        target[:, : draw.positives] = positive
        objectness = objectness_loss(out.logits.gather(1, draw.index), target, samples, draw.valid)
        if not truth.boxes.shape[1]:  # no true box in the batch: the graph stays whole
            return objectness, 0 * out.offsets.float().sum()
        index = draw.index[:, : draw.positives]
        boxes = _rows(truth.boxes, matches.gather(1, index).clamp(min=0))
        wanted = box_ops.encode_boxes(boxes, out.anchors[index], CODE_WEIGHTS)
        return objectness, box_loss(_rows(out.offsets, index), wanted, samples, positive)

    @torch.no_grad()
    def propose(self, out: RPNOutput, image_sizes: Sequence[tuple[int, int]] | Tensor) -> tuple[Padded, Tensor]:
        """(boxes ``[B, K, 4]``, scores ``[B, K]``): objectness by falling score, K at most ``post_nms``.

        The best ``pre_nms`` (``pre_nms_test``) of each level, NMS per level, then the best ``post_nms`` of the image.
        One host synchronisation on a GPU.
        """
        sizes = box_ops.sizes_tensor(image_sizes, out.anchors.device)
        # Ranked by the logit: it tells apart what rounds to the same objectness.
        scores = out.logits.float()
        if not self.padding:  # what is never trained means nothing
            scores = scores.masked_fill(~_centred_inside(out.anchors, sizes), -torch.inf)
        most = min(self.pre_nms if self.training else self.pre_nms_test, max(out.level_sizes))
        chosen, best, start = [], [], 0
        for count in out.level_sizes:
            value, index = scores[:, start : start + count].topk(min(most, count))
            best.append(F.pad(value, (0, most - value.shape[1]), value=-torch.inf))
            chosen.append(F.pad(index + start, (0, most - index.shape[1])))
            start += count
        score, index = torch.stack(best, 1), torch.stack(chosen, 1)  # [B, L, most]
        flat = index.flatten(1)
        boxes = box_ops.decode_boxes(
            _rows(out.offsets, flat), out.anchors[flat], CODE_WEIGHTS, limit_below=self.limit_below
        )
        boxes = box_ops.clip_to(boxes, sizes)
        usable = score.flatten(1).isfinite() & (boxes[..., 2:] > boxes[..., :2]).all(-1) & boxes.isfinite().all(-1)
        keep = box_ops.suppress(
            boxes.unflatten(1, score.shape[1:]).flatten(0, 1), usable.unflatten(1, score.shape[1:]).flatten(0, 1),
            self.nms,
        ).reshape(usable.shape)  # fmt: skip
        value, order = score.flatten(1).masked_fill(~keep, -torch.inf).sort(descending=True, stable=True)
        value, order = value[:, : self.post_nms], order[:, : self.post_nms]
        return Padded(_rows(boxes, order), value.isfinite()), value.sigmoid()

    @torch.no_grad()
    def proposals(
        self, out: RPNOutput, image_sizes: Sequence[tuple[int, int]] | Tensor
    ) -> list[dict[str, Tensor]]:
        """Per image ``boxes`` ``[K, 4]`` and ``scores`` ``[K]`` (objectness), by falling score; see :meth:`propose`."""
        padded, scores = self.propose(out, image_sizes)
        return [{"boxes": b, "scores": s[: len(b)]} for b, s in zip(padded.unpad(), scores, strict=True)]


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """``[B, N, 4]`` at ``[B, K]``: ``[B, K, 4]``."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def _centred_inside(anchors: Tensor, sizes: Tensor) -> Tensor:
    """Bool ``[B, N]``: the anchor's centre is in the valid (height, width), which begins at the top left."""
    x, y = (anchors[:, 0] + anchors[:, 2]) / 2, (anchors[:, 1] + anchors[:, 3]) / 2
    return (x < sizes[:, 1:]) & (y < sizes[:, :1])
