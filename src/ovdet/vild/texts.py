"""Embeddings of class names and of attributes by the teacher's text tower."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from open_clip.prompts import class_prompts, process_name
from ovdet.clip import Clip
from training.class_embeddings import load_class_embeddings, load_or_compute
from training.engine.errors import UserError


def class_table(
    clip: Clip,
    names: Sequence[str],
    *,
    prompts: str = "ensemble",
    synonyms: Mapping[str, Sequence[str]] | None = None,
    file: str = "",
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Tensor:
    """Embeddings of classes, float32 ``[C, D]`` of unit length; computed ones are kept. Every process must call it.

    Args:
        prompts: ``"ensemble"``: the mean over the 63 templates; ``"synonyms"``: over templates and synonyms;
            ``"single"``: "a photo of a NAME" alone.
        synonyms: of names; a class without any stands for itself.
        file: read from there instead; see :func:`training.class_embeddings.load_class_embeddings`.
        progress: show a bar.

    Raises:
        UserError: a file that is missing, unreadable, of another size, or without one of the classes.
    """
    if file:
        return load_class_embeddings(file, names, clip.model.embed_dim, flag="data.embeddings")
    ways: dict[str, Callable[[str], list[str]]] = {
        "ensemble": class_prompts,
        "single": lambda name: [f"a photo of a {process_name(name)}"],
        "synonyms": lambda name: [p for one in (synonyms or {}).get(name) or [name] for p in class_prompts(one)],
    }
    return load_or_compute(
        Namespace(embeddings=None), clip.model, clip.tokenizer, names, flag="embeddings",
        embed_dim=clip.model.embed_dim, device=device, progress=progress, prompts=ways[prompts],
    )  # fmt: skip


def attribute_table(
    clip: Clip, attributes: Sequence[str], *, text: str = "{}", prompts: str = "ensemble",
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """Embeddings of attributes, float32 ``[q, D]`` of unit length.

    Args:
        text: what stands in the prompts in place of a class's name, with ``{}`` for the attribute: "{} object".
    """
    names = [text.replace("{}", attribute) for attribute in attributes]
    return class_table(clip, names, prompts="ensemble" if prompts == "synonyms" else prompts, device=device)


def read_synonyms(content: Mapping[str, Any], file: str) -> dict[str, list[str]]:
    """Synonyms of each class of an LVIS file's content.

    Raises:
        UserError: its categories have none.
    """
    found = {
        str(category.get("name")): [str(s) for s in category["synonyms"]]
        for category in content["categories"]
        if isinstance(category, dict) and isinstance(category.get("synonyms"), list)
    }
    if not any(found.values()):
        raise UserError(f"{file}: its categories have no synonyms; give an LVIS file, or data.prompts=ensemble")
    return found
