"""Mean accuracy over classes (mAcc), things and stuff apart, as integer counts that add up over processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training.engine.distributed import all_reduce_sum, gather_to_master

KINDS = ("thing", "stuff")
TOP_K = (1, 5)


def topk_correct(similarity: Tensor, labels: Tensor, ks: Sequence[int] = TOP_K) -> Tensor:
    """Whether the true class is among the k most similar ones.

    Args:
        similarity: ``[K, C]``.
        labels: int64 ``[K]`` in 0..C-1.
        ks: ranks to test; one above C counts as C (always right).

    Returns:
        bool ``[K, len(ks)]``.
    """
    found = similarity.topk(min(max(ks), similarity.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack([found[:, :k].any(1) for k in ks], 1)


class MeanAccuracy:
    """Accuracy per class over segments, then the mean over the classes present; separately for things and stuff.

    Only integers are kept, so the result depends neither on the order of the segments nor on how they are spread over
    processes. Counting is done on ``device`` and needs no synchronisation per batch.

    Args:
        num_classes: C.
        ks: ranks to report.
        device: where the counts are kept.
    """

    def __init__(self, num_classes: int, *, ks: Sequence[int] = TOP_K, device: torch.device | str = "cpu") -> None:
        self.num_classes, self.ks = num_classes, tuple(ks)
        # Row 0 of each: segments; row i+1: right ones at ks[i]. A class may have thing and stuff segments alike.
        self.counts = torch.zeros(1 + len(self.ks), len(KINDS), num_classes, dtype=torch.int64, device=device)

    def update(self, correct: Tensor, labels: Tensor, is_thing: Tensor) -> None:
        """Add K segments: ``correct`` bool ``[K, len(ks)]``, ``labels`` int64 ``[K]``, ``is_thing`` bool ``[K]``."""
        bins = labels + self.num_classes * (~is_thing).long()
        ones = torch.ones_like(correct[:, :1])
        values = torch.cat([ones, correct], 1).T.long()  # [1 + len(ks), K]
        self.counts.flatten(1).index_add_(1, bins, values)

    def reduce(self) -> None:
        """Sum the counts over all processes. Every process must call it, also one that had no segment."""
        self.counts = all_reduce_sum(self.counts)

    def compute(self) -> dict[str, float]:
        """``{"thing.macc1": ..., "thing.macc5": ..., "stuff.macc1": ...}`` in 0..1.

        A kind without a segment has no accuracy: its keys are left out.
        """
        counts = self.counts.cpu().double()
        means = {}
        for kind, (total, *right) in zip(KINDS, counts.unbind(1), strict=True):
            present = total > 0
            if present.any():
                for k, hits in zip(self.ks, right, strict=True):
                    means[f"{kind}.macc{k}"] = (hits[present] / total[present]).mean().item()
        return means

    def num_segments(self) -> dict[str, int]:
        """Segments counted so far: ``{"thing": ..., "stuff": ...}``."""
        return dict(zip(KINDS, self.counts[0].sum(1).tolist(), strict=True))

    def per_class(self, class_names: Sequence[str]) -> list[dict[str, str | int | float]]:
        """One record per class present: name, kind, segments and accuracy at each k."""
        counts = self.counts.tolist()
        records = []
        for label, name in enumerate(class_names):
            for kind, index in zip(KINDS, range(len(KINDS)), strict=True):
                total, *right = (row[index][label] for row in counts)
                if total:
                    accuracy = {f"top{k}": hits / total for k, hits in zip(self.ks, right, strict=True)}
                    records.append({"class": name, "kind": kind, "segments": total, **accuracy})
        return records


class SegmentRows:
    """What each prediction said of each segment, for resampling over images (bootstrap) and for looking at failures."""

    def __init__(self) -> None:
        self._segments: list[tuple[Tensor, Tensor, Tensor]] = []
        self._correct: dict[str, list[Tensor]] = {}

    def add_segments(self, image_ids: Tensor, labels: Tensor, is_thing: Tensor) -> None:
        """Segments of a batch, each ``[K]``, in the order in which every prediction is told."""
        self._segments.append((image_ids, labels, is_thing))

    def add(self, name: str, correct: Tensor) -> None:
        """Of the next segments, whether the prediction ``name`` is right: bool ``[K, len(TOP_K)]``."""
        self._correct.setdefault(name, []).append(correct)

    def gather(self) -> dict[str, list] | None:
        """Columns on process 0, None elsewhere; every process must call it.

        ``image_id``, ``label``, ``kind`` (thing or stuff), and ``NAME.top1``, ``NAME.top5`` (0 or 1) of each
        prediction. Rows are sorted by image and label, so that they do not depend on the number of processes.
        """
        columns: dict[str, list] = {"image_id": [], "label": [], "kind": []}
        if self._segments:
            ids, labels, things = (torch.cat(part).tolist() for part in zip(*self._segments, strict=True))
            columns |= {"image_id": ids, "label": labels, "kind": [KINDS[not thing] for thing in things]}
        for name, parts in self._correct.items():
            for k, right in zip(TOP_K, torch.cat(parts).T.long().tolist(), strict=True):
                columns[f"{name}.top{k}"] = right
        parts = gather_to_master(columns)
        if parts is None:
            return None
        names = list(dict.fromkeys(name for part in parts for name in part))
        whole = {name: [v for part in parts for v in part.get(name, [])] for name in names}
        order = sorted(range(len(whole["label"])), key=lambda i: (whole["image_id"][i], whole["label"][i]))
        return {name: [values[i] for i in order] for name, values in whole.items()}
