"""Class names to prompts: one text with a span for each name, or several where one is not long enough."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovdet.glip.config import KNOWLEDGE
from ovdet.glip.data.transforms import names_a_side
from ovdet.glip.model import Prompt
from ovdet.glip.tokens import Encoded, Span, Tokenizer, tokens_of_spans
from training.engine.errors import UserError

SEPARATOR = ". "


@dataclass(frozen=True)
class ClassPrompt:
    """How a class is written in a prompt: only the name is matched, the words around it describe it.

    "stingray" with the suffix ", which is flat and round" finds more than the bare word.
    """

    name: str
    prefix: str = ""
    suffix: str = ""

    @property
    def text(self) -> str:
        """All of it."""
        return self.prefix + self.name + self.suffix


def clean_name(name: str) -> str:
    """A class name as it stands in a prompt: no brackets (from the first to the last), spaces for underscores.

    Pairs of spaces become one, once; ``"bow_(weapon)"`` becomes ``"bow "``.
    """
    return re.sub(r"\(.*\)", "", name).replace("_", " ").replace("  ", " ")


def write_query(classes: Sequence[ClassPrompt], separator: str = SEPARATOR) -> tuple[str, list[Span]]:
    """Classes as one text, and the characters of each name in it."""
    text, spans = "", []
    for i, entry in enumerate(classes):
        if i:
            text += separator
        begin = len(text) + len(entry.prefix)
        spans.append((begin, begin + len(entry.name)))
        text += entry.text
    return text, spans


def make_prompts(
    classes: Sequence[str | ClassPrompt],
    tokenizer: Tokenizer,
    *,
    chunk: int = 0,
    separator: str = SEPARATOR,
    labels: Sequence[int] | None = None,
) -> list[Prompt]:
    """Prompts for a list of classes, in its order.

    Args:
        classes: names, which are cleaned, or class prompts, which are taken as they are.
        chunk: classes of a prompt (40 for LVIS in the paper); 0 for as many as there is room for. Where a group needs
            more tokens than the text encoder takes, it is split further.
        labels: what each class is called in results; its row by default.

    Raises:
        UserError: no class, a name without any token, or one that alone is too long.
    """
    entries = [ClassPrompt(clean_name(c)) if isinstance(c, str) else c for c in classes]
    if not entries:
        raise UserError("the list of classes is empty: name at least one")
    labels = list(range(len(entries))) if labels is None else list(labels)
    prompts: list[Prompt] = []
    start = 0
    while start < len(entries):
        # The longest run that fits: more names never need fewer tokens, and each needs one at least.
        low, high = start, min(len(entries), start + (chunk or tokenizer.limit))
        best = None
        while low < high:
            middle = (low + high + 1) // 2
            prompt = _prompt(entries[start:middle], labels[start:middle], tokenizer, separator)
            if prompt is None:
                high = middle - 1
            else:
                low, best = middle, prompt
        if best is None:
            needed = len(tokenizer.encode(entries[start].text).ids)
            raise UserError(
                f'class "{entries[start].name[:60]}" alone needs {needed} tokens, but the text encoder takes '
                f"{tokenizer.limit}: shorten its name or its prompt"
            )
        prompts.append(best)
        start = low
    return prompts


def _prompt(
    entries: Sequence[ClassPrompt], labels: Sequence[int], tokenizer: Tokenizer, separator: str
) -> Prompt | None:
    """The prompt of some classes; None where it has too many tokens."""
    text, spans = write_query(entries, separator)
    encoded = tokenizer.encode(text)
    if len(encoded.ids) > tokenizer.limit:
        return None
    tokens = [tokens_of_spans(encoded, [span]) for span in spans]
    for entry, positions in zip(entries, tokens, strict=True):
        if not positions:
            raise UserError(f'class "{entry.name}" has no letters that the text encoder knows: give it another name')
    return Prompt(encoded, tokens, list(labels), names_a_side(text))


def read_class_prompts(path: str | Path, names: Sequence[str]) -> list[ClassPrompt]:
    """Prompts of classes from a json file: a list, in the order of ``names``, of prefix, name and suffix.

    Entries may also be a dict from class name to such a dict; classes that it does not name stay as they are.

    Raises:
        UserError: missing, not json, another number of classes, or other keys.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"prompts {path} cannot be read ({error}): give a json list of prefix, name, suffix") from error
    if isinstance(content, Mapping):
        unknown = sorted(set(content) - set(names))
        if unknown:
            raise UserError(f'prompts {path}: "{unknown[0]}" is no class of the data set: write the names as it does')
        content = [content.get(name, {"name": clean_name(name)}) for name in names]
    if not isinstance(content, list) or len(content) != len(names):
        number = len(content) if isinstance(content, list) else "no"
        raise UserError(f"prompts {path}: {number} entries for {len(names)} classes: give one for each, in their order")
    return [_class_prompt(entry, name, path) for entry, name in zip(content, names, strict=True)]


def _class_prompt(entry: Any, name: str, path: str | Path) -> ClassPrompt:
    keys = ("prefix", "name", "suffix")
    if not isinstance(entry, Mapping) or not set(entry) <= set(keys):
        raise UserError(f'prompts {path}: the entry of "{name}" must hold {", ".join(keys)} only')
    values = {key: entry[key] for key in entry}
    if not all(isinstance(value, str) for value in values.values()):
        raise UserError(f'prompts {path}: the entry of "{name}" holds something else than text')
    return ClassPrompt(**({"name": clean_name(name)} | values))


# -- knowledge --------------------------------------------------------------------------------------------------------


def knowledge_texts(entries: Mapping[str, Any], names: Sequence[str], kind: str, sentences: int = 3) -> list[str]:
    """One text for each class: its name and what is known of it (Shen et al. 2022, K-LITE).

    Args:
        entries: class name to a dict of ``clean_name``, ``def_wiki``, ``def_wn``, ``path_wn`` (texts) and ``gpt3``
            (a list of sentences).
        kind: one of :data:`ovdet.glip.config.KNOWLEDGE`.
        sentences: of ``gpt3`` that are taken.

    Raises:
        UserError: an unknown kind or class.
    """
    if kind not in KNOWLEDGE:
        raise UserError(f'knowledge "{kind}" is unknown: use one of {", ".join(KNOWLEDGE)}')
    texts = []
    for name in names:
        entry = entries.get(name)
        if not isinstance(entry, Mapping):
            raise UserError(f'the knowledge file has no entry for class "{name}"')
        parts = []
        if kind in ("gpt3", "gpt3_and_wiki"):
            parts += [str(s) for s in (entry.get("gpt3") or [])[:sentences]]
        if kind == "gpt3_and_wiki":
            parts.insert(0, str(entry.get("def_wiki") or ""))
        elif kind != "gpt3":
            parts.append(str(entry.get(kind) or ""))
        known = " ".join(part.strip() for part in parts if part.strip())
        label = str(entry.get("clean_name") or clean_name(name))
        texts.append(f"{label}: {known}" if known else label)
    return texts


def read_knowledge(path: str | Path) -> dict[str, Any]:
    """A knowledge file (YAML or json) as a dict from class name to its entry.

    Raises:
        UserError: missing, or of another form.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"knowledge {path} cannot be read ({reason}): give a YAML file of classes") from error
    if isinstance(content, list):
        content = {e.get("classname", e.get("name")): e for e in content if isinstance(e, Mapping)}
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"knowledge {path} holds no classes: give a YAML file of class names with their entries")
    return dict(content)


def knowledge_prompt(texts: Sequence[str], labels: Sequence[int] | None = None) -> Prompt:
    """The prompt that belongs to one pooled state per class: class i is token i."""
    labels = list(range(len(texts))) if labels is None else list(labels)
    nothing = Encoded([0] * len(texts), [(0, 0)] * len(texts))
    return Prompt(nothing, [[i] for i in range(len(texts))], labels)
