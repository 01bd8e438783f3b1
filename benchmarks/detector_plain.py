"""The detector as it is commonly written, for comparison: one image and one mask after another.

Anchors and RoIs are matched and drawn image by image, with boolean indices; masks come from the loader as whole
pictures and leave as whole pictures, pasted and encoded one by one. Networks and numbers are this package's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import batched_nms, box_iou, roi_align
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from ovdet.data.dataset import TrainDataset
from ovdet.data.images import read_image
from ovdet.data.masks import decode_segmentation
from ovdet.data.transforms import draw_view
from ovdet.fvit.detector import Detector
from ovdet.parts import boxes as box_ops
from ovdet.parts.losses import classification_loss
from training.engine.data.images import resolve


def paste_and_encode(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Each mask painted into a picture of the image, which is then encoded."""
    height, width = size
    found = []
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist(), strict=True):
        x = (torch.arange(width, device=masks.device) + 0.5 - x1) / max(x2 - x1, 1e-6) * 2 - 1
        y = (torch.arange(height, device=masks.device) + 0.5 - y1) / max(y2 - y1, 1e-6) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
        picture = F.grid_sample(mask[None, None].float(), grid, align_corners=False)[0, 0] >= 0.5
        rle = coco_mask.encode(np.asfortranarray(picture.cpu().numpy().astype(np.uint8)))
        found.append({"size": rle["size"], "counts": rle["counts"].decode("ascii")})
    return found


class WholeMasks(TrainDataset):
    """Samples whose masks are bool ``[N, S, S]``, scaled and cut as pictures."""

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        row, options = int(self.images[index]), self.options
        image = read_image(resolve(self.root, self.annotations.file_name(row)))
        original = tuple(image.shape[-2:])
        rng = np.random.default_rng([self.seed, epoch, row])
        view = draw_view(rng, *original, size=options.image_size, jitter=options.jitter, flip=options.flip)
        mine = self.annotations.of(row)
        chosen = np.arange(mine.start, mine.stop)[self.wanted[mine]]
        masks = [decode_segmentation(self.annotations.segmentation(i), *original) for i in chosen]
        masks = tv_tensors.Mask(torch.from_numpy(np.stack(masks)).to(torch.uint8))
        pixels = TF.resize(tv_tensors.Image(image), list(view.scaled), antialias=False)
        masks = TF.resize(masks, list(view.scaled), interpolation=InterpolationMode.NEAREST)
        values = [TF.crop(v, view.top, view.left, *view.size) for v in (pixels, masks)]
        values = [TF.horizontal_flip(v) for v in values] if view.flip else values
        size = options.image_size
        values = [F.pad(v.as_subclass(Tensor), (0, size - view.size[1], 0, size - view.size[0])) for v in values]
        return {"image": values[0], "size": view.size, "masks": values[1].bool(), "labels": self.labels[chosen]}


def plain_losses(
    detector: Detector, images: Tensor, sizes: Sequence[tuple[int, int]], targets: Sequence[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Losses of a batch (without masks), image by image wherever that is possible."""
    maps = detector.neck(detector.backbone(images, dense=False).levels)
    out = detector.rpn(maps)
    anchor_logits, anchor_labels, offsets, wanted, rois, labels, positives = [], [], [], [], [], [], []
    for i, target in enumerate(targets):
        matches = _match(out.anchors, target["boxes"], 0.7, 0.3, forced=True)
        positive, background = _sample(matches, detector.rpn.samples, detector.rpn.positive_share)
        anchor_logits.append(out.logits[i, torch.cat([positive, background])])
        anchor_labels += [torch.ones(len(positive)), torch.zeros(len(background))]
        offsets.append(out.offsets[i, positive])
        wanted.append(box_ops.encode_boxes(target["boxes"][matches[positive]], out.anchors[positive], (1, 1, 1, 1)))
        with torch.no_grad():
            candidates = torch.cat([target["boxes"], _proposals(detector, out, i, sizes[i])])
        matches = _match(candidates, target["boxes"], 0.5, 0.5, forced=False)
        positive, background = _sample(matches, detector.config.roi_samples, detector.config.roi_positive_share)
        rois.append(candidates[torch.cat([positive, background])])
        positives.append((target["boxes"][matches[positive]], len(positive)))
        labels += [target["labels"][matches[positive]], torch.full_like(background, len(detector.base_mask))]
    anchors = torch.cat(anchor_labels).to(out.logits.device)
    embeddings, predicted = detector.box_head(maps[:4], rois)
    logits, labels = detector.classifier(embeddings, detector.class_embeddings), torch.cat(labels)
    moved = [
        (part[:n] - box_ops.encode_boxes(truth, own[:n], (10, 10, 5, 5))).abs().sum()
        for part, own, (truth, n) in zip(predicted.split([len(r) for r in rois]), rois, positives, strict=True)
    ]
    return {
        "loss_rpn_class": F.binary_cross_entropy_with_logits(torch.cat(anchor_logits), anchors),
        "loss_rpn_box": (torch.cat(offsets) - torch.cat(wanted)).abs().sum() / len(anchors),
        "loss_class": classification_loss(logits, labels, detector.base_mask, detector.config.background_weight),
        "loss_box": sum(moved) / len(labels),
    }


def _match(boxes: Tensor, truth: Tensor, positive: float, negative: float, *, forced: bool) -> Tensor:
    result = torch.full((len(boxes),), -2, device=boxes.device)
    if not len(truth):
        return result + 1
    iou = box_iou(boxes, truth)
    value, index = iou.max(1)
    result[value < negative] = -1
    result[value >= positive] = index[value >= positive]
    if forced:
        for i, most in enumerate(iou.max(0).values):
            if most >= negative:
                result[iou[:, i] == most] = i
    return result


def _sample(matches: Tensor, number: int, share: float) -> tuple[Tensor, Tensor]:
    positive, background = (matches >= 0).nonzero()[:, 0], (matches == -1).nonzero()[:, 0]
    positive = positive[torch.randperm(len(positive), device=matches.device)[: int(number * share)]]
    return positive, background[torch.randperm(len(background), device=matches.device)[: number - len(positive)]]


def _proposals(detector: Detector, out: Any, image: int, size: tuple[int, int]) -> Tensor:
    rpn, logits, start, chosen, levels = detector.rpn, out.logits[image].float(), 0, [], []
    for level, count in enumerate(out.level_sizes):
        best = logits[start : start + count].topk(min(rpn.pre_nms, count)).indices + start
        chosen.append(best)
        levels.append(torch.full_like(best, level))
        start += count
    keep, levels = torch.cat(chosen), torch.cat(levels)
    boxes = box_ops.clip_to(box_ops.decode_boxes(out.offsets[image, keep], out.anchors[keep], (1, 1, 1, 1)), size)
    large = (boxes[:, 2:] > boxes[:, :2]).all(1)
    keep, levels, boxes = keep[large], levels[large], boxes[large]
    return boxes[batched_nms(boxes, logits[keep], levels, rpn.nms)[: rpn.post_nms]]


def plain_targets(masks: Tensor, which: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Targets of the mask head, one box after another."""
    cut = [roi_align(masks[w][None, None].float(), [b[None]], side, aligned=True)[0, 0] >= 0.5
           for w, b in zip(which, boxes, strict=True)]  # fmt: skip
    return torch.stack(cut) if cut else torch.zeros(0, side, side, dtype=torch.bool)
