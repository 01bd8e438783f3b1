"""Labels for pixels without one: the best class by a teacher's scores (guided) or by the student's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ovseg.classes import IGNORE
from ovseg.refine import SCALE

TO_FILL = -1  # label of a pixel that is to be given one


def mark_unlabelled(labels: Tensor, classes: Sequence[int] | None = None) -> Tensor:
    """Annotations as they are to be filled in: int64, :data:`TO_FILL` where a label is withheld.

    Args:
        labels: uint8 or integer ``[..., H, W]``, 0..C-1 and 255.
        classes: labels that are withheld (the unseen classes of the zero-shot setting); None for all of them, which
            leaves only 255: the annotation-free setting, in which the published numbers still know what is ignored.
    """
    labels = labels.long()
    if classes is None:
        return labels.masked_fill(labels != IGNORE, TO_FILL)
    return labels.masked_fill(torch.isin(labels, torch.tensor(list(classes), device=labels.device)), TO_FILL)


def give_labels(labels: Tensor, found: Tensor, classes: Sequence[int], unsure: Tensor | None = None) -> Tensor:
    """Labels for the pixels that wait for one; the others keep theirs.

    Args:
        labels: int64 ``[H, W]``, :data:`TO_FILL` where a label is wanted.
        found: integers ``[N]``, for the N waiting pixels the number of a class in ``classes``.
        classes: labels that may be given.
        unsure: ``[N]``, which of them become 255 instead.

    Returns:
        int64 ``[H, W]``.
    """
    chosen = torch.tensor(list(classes), device=labels.device)[found.long()]
    if unsure is not None:
        chosen = chosen.masked_fill(unsure, IGNORE)
    return labels.masked_scatter(labels == TO_FILL, chosen)


@torch.no_grad()
def fill_labels(
    labels: Tensor,
    scores: Tensor,
    classes: Sequence[int],
    *,
    confidence: float | None = None,
    probability: bool = False,
    scale: float = SCALE,
) -> Tensor:
    """Give each pixel that waits for a label the class with the largest score there.

    Scores are interpolated bilinearly (corners not aligned) to the labels' size, as they are: cosines, logits, or sums
    of probabilities after key smoothing.

    Args:
        labels: int64 ``[B, H, W]``, :data:`TO_FILL` where a label is wanted; the other pixels keep theirs.
        scores: ``[B, U, h, w]``.
        classes: U labels, those that may be given.
        confidence: a pixel whose probability is below becomes 255. Annotated pixels are never touched.
        probability: scores are sums of probabilities, to be divided by their sum; else the probability is the softmax
            of ``scale`` times the score.

    Returns:
        int64 ``[B, H, W]``.

    Raises:
        ValueError: a number of classes other than that of the scores.
    """
    if scores.shape[1] != len(classes):
        raise ValueError(f"scores of {scores.shape[1]} classes for {len(classes)} labels")
    filled = []
    # One image at a time: scores of 171 classes at full size are 180 MB each.
    for label, score in zip(labels, scores, strict=True):
        wanted = label == TO_FILL
        if not wanted.any():
            filled.append(label)
            continue
        full = F.interpolate(score[None].float(), label.shape, mode="bilinear", align_corners=False)[0][:, wanted]
        best, index = full.max(0)
        unsure = None
        if confidence is not None:
            if probability:
                p = best / full.clamp(min=0).sum(0).clamp(min=1e-12)
            else:
                p = (scale * best - (scale * full).logsumexp(0)).exp()
            unsure = p < confidence
        filled.append(give_labels(label, index, classes, unsure))
    return torch.stack(filled)
