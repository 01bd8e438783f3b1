"""MaskCLIP's two refinements of dense scores (ECCV 2022, section 3.3): prompt denoising and key smoothing.

Both stand on P, the softmax over names of 100 times the cosine, at every cell. They are for prediction and for pseudo
labels; denoising comes first. MaskCLIP has one name per class; where a class has synonyms, denoising asks for P of the
class, the sum of its names' P.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 100.0  # of cosines before the softmax of both refinements
DROPPED = -100.0  # cosine of a class that denoising leaves out
#: How keys are normalised before their products are taken. ``paper``: each key to unit length, a cosine. ``released``:
#: each channel to unit length over the cells, as the published code does; that is no cosine, and not bounded.
KEY_FORMS = ("paper", "released")


def prompt_denoising(cosine: Tensor, threshold: float = 0.5, word_classes: Tensor | None = None) -> Tensor:
    """Leave out the classes that are nowhere in an image the clear choice.

    All words of a class whose largest P over the cells of the image is below the threshold get the score
    :data:`DROPPED` everywhere. P of a class is the sum over its words: synonyms divide it among them, and the best of
    seven words rarely reaches what one word alone would. Where that would hit all classes of an image, the one with the
    largest P stays.

    Args:
        cosine: ``[B, W, h, w]`` (or any number of axes after the second).
        threshold: of P, 0 to 1.
        word_classes: int64 ``[W]``, the class of each word; None where each is a class.

    Returns:
        ``[B, W, h, w]``, cosines and :data:`DROPPED`.
    """
    p = (SCALE * cosine.float()).softmax(1)
    if word_classes is not None:
        count, word_classes = int(word_classes.max()) + 1, word_classes.to(p.device)
        p = p.new_zeros(len(p), count, *p.shape[2:]).index_add_(1, word_classes, p)
    confidence = p.flatten(2).amax(2)  # [B, C]
    dropped = confidence < threshold
    dropped = dropped & (confidence < confidence.amax(1, keepdim=True))
    if word_classes is not None:
        dropped = dropped[:, word_classes]
    return cosine.masked_fill(dropped.view(*dropped.shape, *[1] * (cosine.dim() - 2)), DROPPED)


def key_smoothing(cosine: Tensor, keys: Tensor, threshold: float = 1.0, form: str = "paper") -> Tensor:
    """Let cells with similar keys share their probabilities.

    A cell whose largest P is below the threshold takes the sum of all cells' P, weighted by the similarity of their
    keys; the others keep P. The sum is not divided by the weights (the paper's equation), so rows do not add up to 1.

    Args:
        cosine: ``[B, C, h, w]``; with names that denoising left out, if it was applied.
        keys: of the last block's attention, ``[B, h * w, K]``.
        threshold: of P. The comparison is made in float32: where P is 1 to that precision, a cell is kept at 1.0 too.
        form: one of :data:`KEY_FORMS`.

    Returns:
        float32 ``[B, C, h, w]``, probabilities that need not add up to 1.

    Raises:
        ValueError: an unknown form, or keys of another number of cells.
    """
    if form not in KEY_FORMS:
        raise ValueError(f'form is "{form}": use {" or ".join(KEY_FORMS)}')
    p = (SCALE * cosine.float()).softmax(1).flatten(2)  # [B, C, N]
    if keys.shape[1] != p.shape[2]:
        raise ValueError(f"keys of {keys.shape[1]} cells for scores of {p.shape[2]}")
    unit = F.normalize(keys.float(), dim=-1 if form == "paper" else 1)
    # (W P)^T = P^T K^ K^^T, taken from the left: the N x N weights are never made.
    smooth = torch.einsum("bck,bnk->bcn", torch.einsum("bcn,bnk->bck", p, unit), unit)
    unsure = p.amax(1, keepdim=True) < threshold
    return torch.where(unsure, smooth, p).unflatten(2, cosine.shape[2:])
