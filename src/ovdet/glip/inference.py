"""Finding classes or phrases in images: texts are encoded once, and the image side once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ovdet.glip.decode import Selection
from ovdet.glip.head import Text
from ovdet.glip.model import GLIP, Prompt
from ovdet.glip.prompts import knowledge_prompt
from ovdet.glip.views import Views, detect_views
from training.engine.errors import UserError

TEXTS_AT_ONCE = 16  # prompts that are encoded together


@dataclass
class Query:
    """Prompts with their encoded texts, for any number of images."""

    prompts: list[Prompt]
    texts: list[Text]  # one of batch 1 for each prompt

    def for_mirrored(self) -> Query:
        """Those that can be asked of a mirrored image."""
        kept = [pair for pair in zip(self.prompts, self.texts, strict=True) if not pair[0].sided]
        return Query([prompt for prompt, _ in kept], [text for _, text in kept])


@torch.no_grad()
def encode_prompts(model: GLIP, prompts: Sequence[Prompt]) -> Query:
    """Encode prompts, ``TEXTS_AT_ONCE`` together."""
    texts = []
    for start in range(0, len(prompts), TEXTS_AT_ONCE):
        part = prompts[start : start + TEXTS_AT_ONCE]
        text = model.encode_text([p.encoded for p in part])
        for row, prompt in enumerate(part):
            length = len(prompt.encoded.ids)
            texts.append(Text(text.hidden[row : row + 1, :length], text.mask[row : row + 1, :length]))
    return Query(list(prompts), texts)


@torch.no_grad()
def encode_knowledge(
    model: GLIP, texts: Sequence[str], pooling: str = "first", labels: Sequence[int] | None = None
) -> Query:
    """One state per class instead of one per token: each class is a text of its own.

    Needs weights that were trained so. What is too long is cut, as in training.

    Args:
        pooling: ``"first"`` (the start token) or ``"mean"`` of the text's states.
        labels: what each class is called in results; its row by default.

    Raises:
        UserError: another pooling.
    """
    if pooling not in ("first", "mean"):
        raise UserError(f'knowledge pooling is "{pooling}": use first or mean')
    limit = model.tokenizer.limit
    states = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        encoded = [model.tokenizer.encode(text) for text in texts[start : start + TEXTS_AT_ONCE]]
        encoded = [type(e)([*e.ids[: limit - 1], e.ids[-1]], e.offsets) if len(e.ids) > limit else e for e in encoded]
        text = model.encode_text(encoded)
        if pooling == "first":
            states.append(text.hidden[:, 0])
        else:
            states.append(text.embedded.sum(1) / text.mask.sum(1, keepdim=True))
    hidden = torch.cat(states)[None]
    # The empty text that stands for "nothing" is masked, so it is left out.
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    return Query([knowledge_prompt(texts, labels)], [Text(hidden, mask)])


@torch.no_grad()
def find(
    model: GLIP,
    images: Tensor,
    sizes: Sequence[tuple[int, int]],
    originals: Sequence[tuple[int, int]],
    query: Query,
    options: Selection,
    views: Views | None = None,
) -> list[dict[str, Tensor]]:
    """Detections of each image for all prompts of a query, by falling score; no NMS between prompts.

    Args:
        images: uint8 RGB ``[B, 3, H, W]``, padded right and bottom.
        sizes: (height, width) of each in the input; originals: of the file.
        views: look at these instead; the images are then those of the files, and the sizes their own.

    Returns:
        See :meth:`ovdet.glip.model.GLIP.detect`.
    """
    if views is not None:

        def detect(batch: Tensor, inner: list[tuple[int, int]], mirrored: bool) -> Sequence[dict[str, Tensor] | None]:
            asked = query.for_mirrored() if mirrored else query
            return find(model, batch, inner, originals, asked, options) if asked.prompts else [None] * len(inner)

        groups = [[prompt.labels for prompt in query.prompts]] * len(sizes)
        return detect_views(detect, images, sizes, views, groups, options, model.image.divisor)
    levels = model.encode_image(images, sizes)
    parts = [
        model.detect(levels, text, [prompt], sizes, originals, options)
        for prompt, text in zip(query.prompts, query.texts, strict=True)
    ]
    return [_merge([part[i] for part in parts]) for i in range(len(sizes))]


@torch.no_grad()
def find_own(
    model: GLIP,
    images: Tensor,
    sizes: Sequence[tuple[int, int]],
    originals: Sequence[tuple[int, int]],
    prompts: Sequence[Prompt],
    options: Selection,
    views: Views | None = None,
) -> list[dict[str, Tensor]]:
    """Detections of each image for a prompt of its own (captions); otherwise as :func:`find`."""
    if views is not None:

        def detect(batch: Tensor, inner: list[tuple[int, int]], mirrored: bool) -> Sequence[dict[str, Tensor] | None]:
            found = find_own(model, batch, inner, originals, prompts, options)
            return [None if mirrored and p.sided else one for p, one in zip(prompts, found, strict=True)]

        groups = [[prompt.labels] for prompt in prompts]
        return detect_views(detect, images, sizes, views, groups, options, model.image.divisor)
    levels = model.encode_image(images, sizes)
    text = model.encode_text([p.encoded for p in prompts])
    return model.detect(levels, text, prompts, sizes, originals, options)


def _merge(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    merged = {key: torch.cat([part[key] for part in parts]) for key in ("boxes", "scores", "labels")}
    order = merged["scores"].argsort(descending=True, stable=True)
    return {key: value[order] for key, value in merged.items()}
