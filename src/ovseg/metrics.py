"""Scores of segmentation from one confusion matrix of whole numbers, which adds up over images and processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ovseg.classes import IGNORE
from training.engine.distributed import all_reduce_sum


class Confusion:
    """Counts of (label, prediction) over pixels whose label is not 255.

    Args:
        num_classes: C.
        device: where the counts are kept.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, labels: Tensor) -> None:
        """Add an image or a batch: two integer tensors of the same shape; predictions 0..C-1, labels also 255.

        Raises:
            ValueError: other shapes, or a value outside the range.
        """
        if prediction.shape != labels.shape:
            raise ValueError(f"prediction {tuple(prediction.shape)} and labels {tuple(labels.shape)} differ in shape")
        num_classes = len(self.counts)
        # One row and column more, for what is ignored: a table of all bytes is cheaper than a mask of the pixels.
        place = torch.full((256,), -1, dtype=torch.int64, device=labels.device)
        place[:num_classes] = torch.arange(num_classes, device=labels.device)
        place[IGNORE] = num_classes
        # Indices are taken as int32, and widened by the table.
        rows, columns = place[labels.flatten().int()], prediction.flatten().long()
        size = num_classes + 1
        bins = rows * size + columns
        if len(bins):
            low, high = torch.stack([rows.min(), columns.min()]).min(), columns.max()
            if low < 0 or high >= num_classes:
                raise ValueError(f"a label or prediction is outside 0..{num_classes - 1}")
        table = torch.bincount(bins, minlength=size * size).view(size, size)
        self.counts += table[:num_classes, :num_classes].to(self.counts.device)

    def reduce(self) -> None:
        """Sum over processes. Every process must call it, also one without an image."""
        self.counts = all_reduce_sum(self.counts)

    def per_class(self) -> dict[str, Tensor]:
        """Per class, each ``[C]``: int64 ``intersection``, ``union``, ``predicted``, ``labelled``; float64 ``IoU`` and
        ``Acc`` in 0..1, NaN for 0/0.
        """
        counts = self.counts.cpu()
        intersection, predicted, labelled = counts.diagonal(), counts.sum(0), counts.sum(1)
        union = predicted + labelled - intersection
        return {
            "intersection": intersection,
            "union": union,
            "predicted": predicted,
            "labelled": labelled,
            "IoU": intersection.double() / union,
            "Acc": intersection.double() / labelled,
        }

    def compute(self, unseen: Sequence[int] = ()) -> dict[str, float]:
        """``mIoU``, ``mAcc``, ``aAcc`` in 0..1: means over classes that are not 0/0; NaN where there is none.

        A class that is predicted but never labelled counts as IoU 0, and is left out of mAcc.

        Args:
            unseen: labels of unseen classes; with them also ``mIoU_seen``, ``mIoU_unseen`` and ``hIoU``, their harmonic
                mean.
        """
        values = self.per_class()
        labelled = int(values["labelled"].sum())
        scores = {
            "mIoU": values["IoU"].nanmean().item(),
            "mAcc": values["Acc"].nanmean().item(),
            "aAcc": int(values["intersection"].sum()) / labelled if labelled else float("nan"),
        }
        if unseen:
            is_unseen = torch.zeros(len(self.counts), dtype=torch.bool)
            is_unseen[list(unseen)] = True
            new, old = values["IoU"][is_unseen].nanmean().item(), values["IoU"][~is_unseen].nanmean().item()
            scores |= {"mIoU_seen": old, "mIoU_unseen": new, "hIoU": 2 * old * new / (old + new) if old + new else 0.0}
        return scores
