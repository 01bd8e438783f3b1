"""Losses on the correlations of an image's cells: which cells belong together, by one model and by another.

Correlations of N cells are an ``[N, N]`` matrix of cosines, 64 MB for 4096 cells. It is never held: rows are made in
chunks, compared, and made again in the backward pass. Small matrices, of regions, go through a chunk together: one by
one, a GPU would spend its time on starting kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

HELD = 512 * 4096  # entries of correlation matrices held at a time


def cells_of(dense: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """A map ``[B, D, h, w]`` as cells ``[B, N, D]``, brought to another grid (bilinear) where that differs."""
    if grid is not None and tuple(dense.shape[-2:]) != tuple(grid):
        dense = F.interpolate(dense.float(), size=grid, mode="bilinear", align_corners=False)
    return dense.flatten(2).transpose(1, 2)


def _norms(own: Tensor, target: Tensor) -> Tensor:
    """Lengths of the differences of rows, summed over rows (DeCLIP, CVPR 2025, equation 5)."""
    return (target - own).norm(dim=-1).sum()


def _squares(own: Tensor, target: Tensor) -> Tensor:
    """Mean squared differences, summed over rows (DenseRC, CVPR 2026)."""
    return (own - target).square().mean(-1).sum()


def _cross_entropy(own: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of softmaxed rows, each brought to 0..1 first (R-SC, ICLR 2025, as restated in UniRefiner)."""

    def stretched(rows: Tensor) -> Tensor:
        low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
        return (rows - low) / (high - low + 1e-10)

    own = (stretched(own) / temperature).softmax(-1)
    target = (stretched(target) / temperature).softmax(-1)
    return -(target * (own + 1e-10).log()).sum()


def _rows(
    start: int, stop: int, compare: Callable[[Tensor, Tensor], Tensor], one_sided: bool, target: Tensor, *own: Tensor
) -> Tensor:
    others = [t.detach() if one_sided else t for t in own]
    rows = sum(t[:, start:stop] @ o.mT for t, o in zip(own, others, strict=True))
    return compare(rows / len(own) if len(own) > 1 else rows, target[:, start:stop] @ target.mT)


def correlation_loss(
    own: Sequence[Tensor],
    target: Tensor,
    kind: str = "l2",
    *,
    temperature: float = 0.2,
    one_sided: bool = False,
    held: int = HELD,
) -> Tensor:
    """Distance of correlations, a mean over the N cells, summed over images.

    Args:
        own: tokens ``[B, N, W]`` that get the gradient; of several their correlations are averaged.
        target: ``[B, N, V]``, the same cells by the model that teaches; no gradient.
        kind: ``"l2"`` (length of the difference of each row), ``"mse"`` (its mean square), ``"ce"`` (cross-entropy).
        temperature: of ``"ce"``.
        one_sided: the gradient flows through one factor of a correlation only.
        held: entries of correlation matrices held at a time, of all images; at least a row.

    Returns:
        A float32 scalar (float64 for float64 tokens).
    """
    compare = {"l2": _norms, "mse": _squares, "ce": partial(_cross_entropy, temperature=temperature)}[kind]
    total = own[0].new_zeros((), dtype=torch.promote_types(own[0].dtype, torch.float32))
    with torch.autocast(own[0].device.type, enabled=False):
        wide = total.dtype
        units = [F.normalize(t.to(wide), dim=-1) for t in own]
        target = F.normalize(target.to(wide), dim=-1).detach()
        cells = target.shape[1]
        images, rows = max(held // cells**2, 1), max(held // cells, 1)
        for first in range(0, len(target), images):
            some = [t[first : first + images] for t in (target, *units)]
            for start in range(0, cells, rows):
                arguments = (start, start + rows, compare, one_sided, *some)
                if torch.is_grad_enabled():
                    part = checkpoint(_rows, *arguments, use_reentrant=False, preserve_rng_state=False)
                else:
                    part = _rows(*arguments)
                total = total + part / cells
    return total


def semantic_loss(
    own: Tensor, teacher: Tensor, cells: Tensor, labels: Tensor, rich: Tensor, *, share: tuple[float, float],
    neighbours: int, kind: str,
) -> Tensor:  # fmt: skip
    """Distance of one image's similarities of names and cells from the refined ones, summed over its M names.

    SynCLIP (CVPR 2026), equations 5 to 8.

    Args:
        own, teacher: dense features ``[N, D]`` of student and frozen model.
        cells: ``[N, V]`` of the foundation model.
        labels, rich: text features ``[M, D]`` of the names, and of the richer texts.
        share: of the teacher's similarities, and of the correlations, in the target.
        neighbours: the cells most similar to a name, whose correlations are averaged.
        kind: ``"l2"``, or ``"huber_kl"`` (Huber of 0.1 summed over cells, and 0.1 times the divergence of softmaxes).
    """
    own, teacher, cells, labels, rich = (F.normalize(t.float(), dim=-1) for t in (own, teacher, cells, labels, rich))
    similar, target = labels @ own.T, rich @ teacher.T  # [M, N]
    if share[1]:
        nearest = target.topk(min(neighbours, target.shape[1]), dim=1).indices  # [M, k]
        target = share[0] * target + share[1] * (cells[nearest].mean(1) @ cells.T)
    else:
        target = share[0] * target
    if kind == "l2":
        return (similar - target).norm(dim=1).sum()
    log_own, log_target = similar.log_softmax(1), target.log_softmax(1)
    divergence = (log_own.exp() * (log_own - log_target)).sum()
    return F.huber_loss(similar, target, delta=0.1, reduction="sum") + 0.1 * divergence


def batch_semantics(
    batch: dict, dense: Tensor, start: Tensor, vfm: Tensor, labels: Tensor, rich: Tensor, **settings: Any
) -> Tensor:
    """:func:`semantic_loss` of a batch, summed over the names of all its images.

    Args:
        batch: with ``classes [M]`` and the images that they belong to, ``classes_of [M]``.
        dense, start: maps ``[B, D, h, w]`` of student and frozen model.
        vfm: map of the foundation model, of any grid.
        labels, rich: text features ``[C, D]``.
    """
    grid = tuple(dense.shape[-2:])
    vfm = cells_of(vfm, grid)
    total = dense.new_zeros((), dtype=torch.float32)
    with torch.autocast(dense.device.type, enabled=False):
        for image, (own, theirs) in enumerate(zip(cells_of(dense), cells_of(start, grid), strict=True)):
            ids = batch["classes"][batch["classes_of"] == image]
            total = total + semantic_loss(own, theirs, vfm[image], labels[ids], rich[ids], **settings)
    return total
