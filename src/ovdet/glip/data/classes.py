"""Class names to a training text: all of them in order, or those present among some that are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from numpy.random import Generator

from ovdet.glip.prompts import SEPARATOR, ClassPrompt, clean_name, write_query
from ovdet.glip.tokens import Span, Tokenizer
from training.engine.errors import UserError


def is_background(identity: int, name: str) -> bool:
    """Whether a category is no class but stands for the rest of the image; other classes may have the id 0."""
    return identity == 0 and name.strip("_ ").lower() == "background"


@dataclass
class ClassTexts:
    """Writes the text of an image from the classes of a data set.

    Args:
        classes: prompt of each class, by label; None for labels that are no class.
        tokenizer: counts tokens.
        negatives: names besides those present; 0 takes all classes, always.
        full: with ``negatives``, the share of images that ask for all of them; others ask for any number of 1 up to it.
        shuffle: without ``negatives``, whether the order is drawn; otherwise it always is.
        key: what the set was given as, for messages.

    Raises:
        UserError: all classes together need more tokens than the text encoder takes, and there is no choice of some.
    """

    classes: Sequence[ClassPrompt | None]
    tokenizer: Tokenizer
    negatives: int = 0
    full: float = 0.5
    shuffle: bool = False
    key: str = "data set"

    def __post_init__(self) -> None:
        self.labels = [label for label, entry in enumerate(self.classes) if entry is not None]
        if not self.labels:
            raise UserError(f"{self.key}: has no class besides the background")
        self.room = self.tokenizer.limit - 2
        self.costs = {i: len(self.tokenizer.encode(self.classes[i].text + SEPARATOR).ids) - 2 for i in self.labels}
        if not self.negatives:
            needed = len(self.tokenizer.encode(self._write(self.labels)[0]).ids)
            if needed > self.tokenizer.limit:
                raise UserError(
                    f"{self.key}: its {len(self.labels)} class names need {needed} tokens, but the text encoder takes "
                    f"{self.tokenizer.limit}: set a number of negatives (85 in pre-training)"
                )

    def _write(self, order: Sequence[int]) -> tuple[str, dict[int, Span]]:
        text, spans = write_query([self.classes[i] for i in order])
        return text, dict(zip(order, spans, strict=True))

    def write(self, present: Sequence[int], rng: Generator) -> tuple[str, dict[int, Span]]:
        """A text, and the characters of each class in it; classes present that do not fit are not in it.

        Args:
            present: labels of the image's objects.
        """
        if not self.negatives:
            order = list(self.labels)
            return self._write([order[i] for i in rng.permutation(len(order))] if self.shuffle else order)
        room, chosen = self.room, []
        present = sorted({i for i in present if i in self.costs})
        for place in rng.permutation(len(present)):
            if self.costs[present[place]] > room:
                break
            chosen.append(present[place])
            room -= self.costs[present[place]]
        asked = self.negatives if rng.random() < self.full else int(rng.integers(1, self.negatives + 1))
        # Drawn from all classes and then freed of those present, as published: present ones use up draws.
        drawn = rng.choice(self.labels, size=min(asked, len(self.labels)), replace=False)
        for label in drawn.tolist():
            if label in present:
                continue
            if self.costs[label] > room:
                break
            chosen.append(label)
            room -= self.costs[label]
        return self._write([chosen[i] for i in rng.permutation(len(chosen))])


def class_prompts(
    ids: Sequence[int], names: Sequence[str], written: Sequence[ClassPrompt] | None = None
) -> list[ClassPrompt | None]:
    """Prompt of each category by label: as given, or its cleaned name; None for the background."""
    entries = [ClassPrompt(clean_name(name)) for name in names] if written is None else list(written)
    return [None if is_background(int(i), n) else e for i, n, e in zip(ids, names, entries, strict=True)]
