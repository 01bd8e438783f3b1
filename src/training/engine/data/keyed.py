"""Folders of results that are kept under a key: whatever they depend on is written beside them, and compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.engine.data.images import first_line
from training.engine.errors import UserError
from training.engine.files import write_atomically

NAME = "key.json"


def check_key(folder: Path, key: dict[str, Any], where: str) -> None:
    """See that a folder is new, or holds results of this key.

    Args:
        key: plain values, as json gives them back.
        where: the folder with the option that chooses it, for messages.

    Raises:
        UserError: it is a file, or holds results of another key or something else.
    """
    remedy = "give another folder, or delete this one"
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{where} is a file: give a folder")
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no dictionary")
    except FileNotFoundError:
        if any(f for f in folder.iterdir() if not f.name.startswith(".")):
            raise UserError(f"{where} holds something else (it has no {NAME}): give another folder") from None
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {NAME} is damaged ({first_line(error)}); {remedy}") from None
    differs = [n for n in sorted({*found, *key}) if found.get(n) != key.get(n)]
    if differs:
        name = differs[0]
        raise UserError(
            f"{where} was made with other {', '.join(differs)} ({name}: {found.get(name)}, now {key.get(name)}); "
            f"{remedy}"
        )


def write_key(folder: Path, key: dict[str, Any]) -> None:
    """Make the folder and say in it what it is for. OSError where that cannot be done."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / NAME, json.dumps(key, indent=1) + "\n")


@contextmanager
def writing(where: str) -> Iterator[None]:
    """A stretch of code whose failures to write become UserErrors that name the folder ``where``."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{where} cannot be written ({first_line(error)}): free some space or choose another"
        ) from error
