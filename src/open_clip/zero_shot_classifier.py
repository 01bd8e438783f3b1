"""Zero-shot classifiers, with OpenCLIP's calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .checks import check_names
from .prompts import average_prompts, embed_texts


def build_zero_shot_classifier(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    templates: Sequence[Callable[[str], str] | str],
    num_classes_per_batch: int | None = 10,
    device: str | torch.device = "cpu",
    use_tqdm: bool = False,
) -> Tensor:
    """Class embeddings as the columns of a matrix: ``images @ classifier`` are cosines.

    For the prompts of the published dense evaluations see :func:`open_clip.prompts.class_embeddings`.

    Args:
        model: anything with ``encode_text``; its text tower is used where it is.
        classnames: C names, put into the templates as they are.
        templates: functions of a name, or texts with ``{}``.
        num_classes_per_batch: classes embedded at a time; all when None.
        device: where the result is put.
        use_tqdm: show a bar.

    Returns:
        ``[D, C]`` of the model's dtype, columns of unit length: the mean of each class's unit-length prompt embeddings,
        normalised in float32.

    Raises:
        TypeError, ValueError: no list of names, an empty one, or no templates.
    """
    check_names(classnames)
    if not len(classnames) or not len(templates):
        raise ValueError(f"a classifier of {len(classnames)} names and {len(templates)} templates: give at least one")
    fill = [t.format if isinstance(t, str) else t for t in templates]
    prompts = [one(name) for name in classnames for one in fill]
    batch = len(prompts) if num_classes_per_batch is None else num_classes_per_batch * len(fill)
    features = embed_texts(model, tokenizer, prompts, batch_size=batch, progress=use_tqdm)
    averaged = average_prompts(features.unflatten(0, (len(classnames), len(fill))))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return averaged.T.contiguous().to(device, dtype)


def build_zero_shot_classifier_legacy(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    templates: Sequence[Callable[[str], str] | str],
    device: str | torch.device = "cpu",
    use_tqdm: bool = False,
) -> Tensor:
    """As :func:`build_zero_shot_classifier`, one class at a time."""
    return build_zero_shot_classifier(model, tokenizer, classnames, templates, 1, device, use_tqdm)
