"""Other captions around an image's own, as negatives (GLIP, appendix)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from numpy.random import Generator

from ovdet.glip.prompts import SEPARATOR
from ovdet.glip.tokens import Span, Tokenizer

NONE_SHARE = 0.4  # of the captions stay alone
MOST = 20  # others at most


def draw_number(rng: Generator) -> int:
    """How many other captions: none, as many as allowed (half of the rest), or any smaller number."""
    if rng.random() < NONE_SHARE:
        return 0
    return MOST if rng.random() < 0.5 else int(rng.integers(0, MOST))


def pack(
    caption: str,
    spans: Sequence[Sequence[Span]],
    draw: Callable[[], str],
    number: int,
    tokenizer: Tokenizer,
    rng: Generator,
) -> tuple[str, list[list[Span]]]:
    """A caption at a random place among others, and its spans, moved along.

    Args:
        spans: of each phrase.
        draw: gives another caption.
        number: of others; fewer are taken where the text encoder has no room for more.

    Returns:
        The text and the spans of the same phrases in it.
    """
    room = tokenizer.limit - len(tokenizer.encode(caption + SEPARATOR).ids)
    others: list[str] = []
    for _ in range(number):
        other = " ".join(draw().split())
        cost = len(tokenizer.encode(other + SEPARATOR).ids) - 2
        if cost > room:
            break
        others.append(other)
        room -= cost
    place = int(rng.integers(0, len(others) + 1))
    before = "".join(other + SEPARATOR for other in others[:place])
    after = "".join(SEPARATOR + other for other in others[place:])
    shift = len(before)
    return before + caption + after, [[(b + shift, e + shift) for b, e in group] for group in spans]
