"""Command-line flags from frozen dataclasses: a field is a flag, and what a program hands on is typed.

A field ``max_boxes: int = flag(20, "regions an image", type=COUNT)`` is the flag ``--max-boxes``. Nothing is filled in
while parsing, so a program can tell which flags were given; :func:`take` makes the dataclass from them.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, TypeVar

from training.engine.errors import UserError

Options = TypeVar("Options")


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors: one line, and the same exit for every process."""

    def error(self, message: str) -> None:
        """UserError instead of the usage and an exit."""
        raise UserError(f"{message} (--help lists all flags)")


def number(kind: type, low: float, high: float = math.inf, *, open_low: bool = False) -> Callable[[str], float]:
    """argparse type: a finite number of ``kind`` in [low, high], or (low, high]."""

    def parse(text: str) -> float:
        value = kind(text)
        if not math.isfinite(value) or value > high or value < low or (open_low and value == low):
            bounds = f"{'above' if open_low else 'at least'} {low:g}" + (
                f", at most {high:g}" if high < math.inf else ""
            )
            raise argparse.ArgumentTypeError(f"{text} is out of range: give a number {bounds}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def _path(text: str) -> Path:
    """argparse type: a path. An empty word, which is what an unset shell variable leaves, is not the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty word is no path: is a shell variable unset?")
    return Path(text)


COUNT, NATURAL = number(int, 1), number(int, 0)
PATH = _path
POSITIVE, NOT_NEGATIVE, SHARE = number(float, 0, open_low=True), number(float, 0), number(float, 0, 1)


def flag(
    default: Any,
    help: str,
    *,
    type: Callable[[str], Any] | None = None,
    choices: tuple | None = None,
    metavar: str | None = None,
    nargs: str | None = None,
) -> Any:
    """A dataclass field that is a command-line flag.

    Args:
        default: value without the flag. ``False`` makes a switch without a value.
        type: text to value; that of the default if absent (text for None).
        nargs: ``"+"`` for a tuple of values.
    """
    kind = type or (str if default is None else default.__class__)
    settings = {"help": help, "type": kind, "choices": choices, "metavar": metavar, "nargs": nargs}
    return dataclasses.field(default=default, metadata={"flag": settings})


def flags_of(cls: type) -> dict[str, dataclasses.Field]:
    """The flags of an options dataclass, by field name; of none for None."""
    return {f.name: f for f in dataclasses.fields(cls) if "flag" in f.metadata} if cls is not None else {}


def spelling(name: str) -> str:
    """``max_boxes`` -> ``--max-boxes``."""
    return "--" + name.replace("_", "-")


def add_flags(group: Any, cls: type, seen: dict[str, dataclasses.Field], *, show: Container[str] | None = None) -> None:
    """Add the flags of a dataclass to an argparse group. Flags that were not given leave nothing behind.

    Args:
        seen: flags added so far, extended here. A flag of several dataclasses is added once; it may have another
            default in each.
        show: names that ``--help`` lists; None for all.

    Raises:
        ValueError: another dataclass has a flag of this name that takes other values.
    """
    for name, field in flags_of(cls).items():
        settings = dict(field.metadata["flag"])
        if name in seen:
            before = seen[name].metadata["flag"]
            if any(settings[k] != before[k] for k in ("type", "choices", "nargs")):
                raise ValueError(f"two flags {spelling(name)} take different values: {cls.__name__} redefines it")
            continue
        seen[name] = field
        listed = show is None or name in show
        settings["help"] = _help(settings["help"], field.default) if listed else argparse.SUPPRESS
        if field.default is False:
            group.add_argument(spelling(name), action="store_true", default=argparse.SUPPRESS, help=settings["help"])
        else:
            group.add_argument(spelling(name), default=argparse.SUPPRESS, **settings)


def _help(text: str, default: Any) -> str:
    if default in (None, "", False, ()):
        return text.replace("%", "%%")
    return f"{text} ({default})".replace("%", "%%")


def take(cls: type[Options], given: Mapping[str, Any]) -> Options:
    """The dataclass, with what was given; lists become tuples."""
    own = {n: given[n] for n in flags_of(cls) if n in given}
    return cls(**{n: tuple(v) if isinstance(v, list) else v for n, v in own.items()})
