"""Class names to class embeddings, by an ensemble of prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .checks import check_names

#: The 63 templates of the published class embeddings: ``{article}`` and ``{}`` stand for "a" / "an" and the name.
PROMPT_TEMPLATES: tuple[str, ...] = tuple(
    json.loads((Path(__file__).parent / "prompt_templates.json").read_text(encoding="utf-8"))
)


def article(name: str) -> str:
    """ "an" before a, e, i, o, u of the raw name, else "a". Lower case only, as in the published embeddings."""
    return "an" if name[:1] in tuple("aeiou") else "a"


def process_name(name: str, remove_dot: bool = True) -> str:
    """A class name as it stands in a prompt: lower case, ``_`` to space, ``/`` to " or ", without a trailing dot."""
    name = name.replace("_", " ").replace("/", " or ").lower()
    return name.rstrip(".") if remove_dot else name


def class_prompts(name: str, templates: Sequence[str] = PROMPT_TEMPLATES) -> list[str]:
    """Prompts of a class name, one per template; those that begin with "a" or "the" become "This is a ..."."""
    prompts = [t.replace("{article}", article(name)).replace("{}", process_name(name)) for t in templates]
    return ["This is " + p if p.startswith(("a", "the")) else p for p in prompts]


def average_prompts(features: Tensor) -> Tensor:
    """Text embeddings ``[C, T, D]`` of T prompts a class -> ``[C, D]``: each normalised, averaged, normalised again."""
    return F.normalize(F.normalize(features, dim=-1).mean(1), dim=-1)


@torch.inference_mode(False)  # a tower that is moved in inference mode would never get a gradient again
@torch.no_grad()
def embed_texts(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    texts: Sequence[str],
    *,
    device: torch.device | str | None = None,
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor:
    """Text embeddings float32 ``[N, D]`` on the CPU, not normalised; arguments as in :func:`class_embeddings`."""
    text = getattr(model, "text", model)
    home = next(text.parameters()).device
    device = torch.device(device) if device is not None else home
    # A causal tower that is read at the end token never sees the padding, four fifths of a row of prompts.
    cut = getattr(text, "causal", False) and getattr(text, "pool", None) == "argmax"
    rows = []
    text.to(device)
    try:
        for start in tqdm(range(0, len(texts), batch_size), "class embeddings", unit="batch", disable=not progress):
            tokens = tokenizer(list(texts[start : start + batch_size]))
            if cut:
                tokens = tokens[:, : int(tokens.argmax(1).max()) + 1]
            rows.append(model.encode_text(tokens.to(device)).float().cpu())
    finally:
        text.to(home)
    return torch.cat(rows)


def class_embeddings(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    names: Sequence[str],
    *,
    device: torch.device | str | None = None,
    batch_size: int = 256,
    templates: Sequence[str] = PROMPT_TEMPLATES,
    prompts: Callable[[str], list[str]] | None = None,
    progress: bool = False,
) -> Tensor:
    """Class embeddings from a model's text tower.

    Args:
        model: anything with ``encode_text``; its text tower is used where it is, or moved to ``device`` and back.
        names: class names, in the order of the rows.
        batch_size: prompts embedded at a time.
        templates: filled in by :func:`class_prompts`.
        prompts: name -> its prompts, in place of :func:`class_prompts` with ``templates``.
        progress: show a bar.

    Returns:
        float32 ``[C, D]`` on the CPU, unit length.

    Raises:
        TypeError: ``names`` is one text instead of a list, or holds something else than texts.
        ValueError: no names or no templates, or an empty name.
    """
    check_names(names)
    if not len(names) or not len(templates):
        raise ValueError(f"class embeddings of {len(names)} names and {len(templates)} templates: give at least one")
    texts = [class_prompts(name, templates) if prompts is None else prompts(name) for name in names]
    features = embed_texts(
        model, tokenizer, [p for own in texts for p in own], device=device, batch_size=batch_size, progress=progress
    )
    counts = [len(own) for own in texts]
    if len(set(counts)) == 1:
        return average_prompts(features.unflatten(0, (len(names), -1)))
    return torch.cat([average_prompts(own[None]) for own in features.split(counts)])


def read_class_names(path: str | Path) -> list[str]:
    """Class names of a text file, one a line; empty lines are skipped, a byte-order mark is no part of a name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, or no name in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"file of class names {path} does not exist: check the path")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path} holds no class names: write one a line")
    return names
