"""Class lists of segmentation: names in label order, the words embedded for each, and their embeddings."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from open_clip.prompts import class_prompts
from training.class_embeddings import load_or_compute
from training.engine.errors import UserError, reason_of

IGNORE = 255  # the label of pixels that count for nothing
MAX_CLASSES = 255  # labels are bytes, and one of them is IGNORE
_FOLDER = Path(__file__).parent
_SHARED_WORDS = {"naclip": "sclip"}  # releases that embed the words of another
_TEMPLATES: dict[str, list[str]] = json.loads((_FOLDER / "templates.json").read_text(encoding="utf-8"))

#: Prompt templates by name: CLIP's own 80 for ImageNet, and these with MaskCLIP's five scenes. ``project`` stands for
#: the 63 of :mod:`open_clip.prompts`, which choose the article and lower the case; the others take a word as it is.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "imagenet": tuple(_TEMPLATES["imagenet"]),
    "maskclip": (*_TEMPLATES["imagenet"], *_TEMPLATES["scene"]),
    "plain": ("{}",),
}
TEMPLATE_NAMES = (*TEMPLATES, "project")


@dataclass(frozen=True)
class ClassList:
    """C classes in label order.

    Attributes:
        names: what each class is called.
        words: per class the words that are embedded; several are synonyms, the best of which counts.
        background: label of the class that stands for everything unnamed; None without one.
        unseen: labels without annotations in the zero-shot setting of MaskCLIP+.
        palette: RGB in 0..255 per class; empty for none.
    """

    names: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]
    background: int | None = None
    unseen: tuple[int, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.names:
            raise UserError("no class names: give at least one")
        if len(self.names) > MAX_CLASSES:
            raise UserError(f"{len(self.names)} classes are more than {MAX_CLASSES}, which is what label maps can hold")
        if len(self.words) != len(self.names) or not all(self.words):
            raise ValueError(f"{len(self.names)} classes with words for {sum(map(bool, self.words))} of them")
        for name in self.names:
            if self.names.count(name) > 1:
                raise UserError(f'the class "{name}" is given {self.names.count(name)} times: name each class once')
        if self.background is not None and not 0 <= self.background < len(self.names):
            raise ValueError(f"background is label {self.background} of {len(self.names)} classes")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def all_words(self) -> list[str]:
        """The words of all classes, one class after the other."""
        return [word for words in self.words for word in words]

    @property
    def word_classes(self) -> Tensor:
        """int64 ``[words]``: the class of each of :attr:`all_words`."""
        return torch.tensor([label for label, words in enumerate(self.words) for _ in words])

    def only(self, labels: Sequence[int]) -> ClassList:
        """Some of the classes, in the order of ``labels``; class i of the new list was ``labels[i]``."""
        labels = list(labels)
        return ClassList(
            tuple(self.names[i] for i in labels),
            tuple(self.words[i] for i in labels),
            labels.index(self.background) if self.background in labels else None,
            tuple(labels.index(u) for u in self.unseen if u in labels),
            tuple(self.palette[i] for i in labels) if self.palette else (),
        )

    def with_background(self, words: Sequence[str] = ("background",), name: str = "background") -> ClassList:
        """The same classes behind a class 0 for everything unnamed, with words of its own."""
        if self.background is not None:
            raise ValueError(f"there is a background class already: {self.names[self.background]}")
        palette = ((0, 0, 0), *self.palette) if self.palette else ()
        return ClassList(
            (name, *self.names), (tuple(words), *self.words), 0, tuple(u + 1 for u in self.unseen), palette
        )


def known_class_lists() -> list[str]:
    """Names of the built-in lists: voc20, voc21, context59, ..."""
    return sorted(path.stem for path in (_FOLDER / "class_lists").glob("*.json"))


def read_class_file(name: str) -> dict:
    """Content of a built-in list: names, label map, palette, words by release.

    Raises:
        UserError: no list of that name.
    """
    path = _FOLDER / "class_lists" / f"{name}.json"
    if name not in known_class_lists():
        raise UserError(f'no class list is called "{name}": use one of {", ".join(known_class_lists())}')
    return json.loads(path.read_text(encoding="utf-8"))


def class_list(name: str, words: str = "names") -> ClassList:
    """A built-in class list.

    Args:
        name: one of :func:`known_class_lists`.
        words: whose words are embedded: ``names`` (the data set's own), ``maskclip``, ``sclip``, ``naclip``,
            ``clearclip`` or ``proxyclip``.

    Raises:
        UserError: no list of that name, or a release that has no words for it.
    """
    content = read_class_file(name)
    chosen: dict[str, list[str]] = {}
    if words != "names":
        known = content["prompts"]
        words = _SHARED_WORDS.get(words, words)
        if words not in known:
            raise UserError(f'the release "{words}" has no words for {name}: use names or {", ".join(sorted(known))}')
        chosen = known[words]
    return ClassList(
        names=tuple(content["names"]),
        words=tuple(tuple(chosen.get(n, [n])) for n in content["names"]),
        background=content["background"],
        unseen=tuple(content.get("unseen", ())),
        palette=tuple(map(tuple, content["palette"])),
    )


def parse_classes(texts: Sequence[str]) -> ClassList:
    """Classes from what a user types: commas and separate arguments divide classes, ``|`` divides synonyms.

    The first synonym is the name of the class: ``["person|man|woman, car"]`` has the classes person and car.

    Raises:
        UserError: nothing is named, or something twice.
    """
    entries = [part.strip() for text in texts for part in text.split(",")]
    words = [tuple(w.strip() for w in entry.split("|") if w.strip()) for entry in entries]
    words = [w for w in words if w]
    return ClassList(tuple(w[0] for w in words), tuple(words))


def read_classes(path: str | Path) -> ClassList:
    """Classes from a file: lines of a text (synonyms divided by ``|``), a json list, or a COCO-style json.

    Categories of a COCO-style file are taken in the order of their ids.

    Raises:
        UserError: the file cannot be read, or holds no names.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if str(path).endswith(".json"):
            content = json.loads(text)
            entries = content["categories"] if isinstance(content, dict) else content
            if entries and isinstance(entries[0], dict):
                entries = [entry["name"] for entry in sorted(entries, key=lambda entry: entry["id"])]
            if not all(isinstance(entry, str) for entry in entries):
                raise ValueError("the list holds something that is not a text")
        else:
            entries = text.splitlines()
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else reason_of(error)
        raise UserError(f"{path}: no class names could be read ({reason})") from None
    words = [tuple(w.strip() for w in entry.split("|") if w.strip()) for entry in entries]
    words = [w for w in words if w]
    if not words:
        raise UserError(f"{path}: holds no class names; write one a line")
    return ClassList(tuple(w[0] for w in words), tuple(words))


def prompts_of(templates: str) -> Callable[[str], list[str]]:
    """Function from a word to its prompts, for the name of a set of templates (:data:`TEMPLATE_NAMES`)."""
    if templates == "project":
        return class_prompts
    if templates not in TEMPLATES:
        near = difflib.get_close_matches(templates, TEMPLATE_NAMES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(TEMPLATE_NAMES)}"
        raise UserError(f'no prompt templates are called "{templates}": {hint}')
    return partial(_fill, TEMPLATES[templates])


def _fill(templates: Sequence[str], word: str) -> list[str]:
    return [template.replace("{}", word) for template in templates]


def embed_words(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor] | None,
    classes: ClassList,
    *,
    templates: str = "imagenet",
    embed_path: str = "",
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Tensor:
    """Unit-length embeddings of all words of a class list, float32 ``[words, D]`` on the CPU.

    Each prompt is normalised, the mean over prompts normalised again. Results are cached on disk; with several
    processes, process 0 computes for all, and every process must call this.

    Args:
        model: its text tower is used.
        tokenizer: texts to token ids; None when ``embed_path`` is given.
        templates: one of :data:`TEMPLATE_NAMES`.
        embed_path: a file of embeddings (.npy in the order of the words, or .pt with a dict of words) to read instead.

    Raises:
        UserError: unknown templates, or a file that does not fit.
    """
    return load_or_compute(
        argparse.Namespace(embed_path=embed_path),
        model,
        tokenizer,
        classes.all_words,
        names_file="the class list",
        device=device,
        progress=progress,
        prompts=prompts_of(templates),
    )
