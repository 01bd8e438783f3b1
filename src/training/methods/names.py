"""Class names that methods learn from: lists of them, richer texts, and which of them an image shows."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.engine.data.images import ImageError, first_line, read_bytes
from training.engine.errors import UserError
from training.methods.base import Method

log = logging.getLogger(__name__)

LIST = "list of class names"  # what a method learns from that is given names, but not of which image
KNOWN = {"coco-stuff-ade20k": Path(__file__).with_name("coco_stuff_ade20k.json")}  # lists that are here, by name
NAMES_HELP = f"json list of class names, or of {{name, isthing}}; or the list {', '.join(KNOWN)}"


def _read(path: str, flag: str) -> Any:
    try:
        return json.loads(read_bytes(path).decode("utf-8-sig"))
    except ImageError as error:
        raise UserError(f"{flag} {path}: {error.reason}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag} {path}: not a json file ({first_line(error)})") from None


def read_names(path: str, flag: str = "--names") -> tuple[list[str], int]:
    """(class names, how many of them are things, which come first), in the file's order otherwise.

    The file is a json list of names, or of ``{"name": ..., "isthing": 0 or 1}`` (things where it does not say), or has
    such a list under ``categories``; or it is the name of one of :data:`KNOWN`. Entries without a name, and names that
    were there before, are left out, counted in the log.

    Raises:
        UserError: an unreadable file, or no name in it.
    """
    content = _read(str(KNOWN.get(path, path)), flag)
    entries = content.get("categories") if isinstance(content, dict) else content
    found: dict[str, bool] = {}
    bad: list[str] = []
    for entry in entries if isinstance(entries, list) else []:
        name = entry.get("name") if isinstance(entry, dict) else entry
        is_thing = entry.get("isthing", 1) if isinstance(entry, dict) else 1
        if not isinstance(name, str) or not name.strip() or name in found or is_thing not in (0, 1):
            bad.append(repr(entry)[:60])
        else:
            found[name] = bool(is_thing)
    if bad:
        log.warning("%s %s: %d entries are no new class (left out), e.g. %s", flag, path, len(bad), bad[0])
    if not found:
        raise UserError(f'{flag} {path}: no class name in it; give a json list of names or of {{"name", "isthing"}}')
    things = [name for name, is_thing in found.items() if is_thing]
    return things + [name for name, is_thing in found.items() if not is_thing], len(things)


def read_texts(path: str, names: Sequence[str], flag: str = "--rich-texts") -> list[str]:
    """A text about each class: its name, then what the file says of it, if anything ("label, definition, synonyms").

    The file is a json dictionary from a name to a text or a list of texts (joined by commas); a text that begins with
    the name is taken as it is. Values that are neither are left out, counted in the log.

    Raises:
        UserError: an unreadable file, no dictionary, or one that knows none of the names.
    """
    content = _read(path, flag)
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path}: no json dictionary from names to texts")
    texts, bad = {}, []
    for name, value in content.items():
        parts = value if isinstance(value, list) else [value]
        if parts and all(isinstance(p, str) and p.strip() for p in parts):
            text = ", ".join(parts)
            texts[name] = text if text.lower().startswith(name.lower()) else f"{name}, {text}"
        else:
            bad.append(name)
    if bad:
        log.warning("%s %s: the texts of %d names are no texts (left out), e.g. %s", flag, path, len(bad), bad[0])
    missing = [n for n in names if n not in texts]
    if len(missing) == len(names):
        raise UserError(f"{flag} {path}: no text about any of the {len(names)} classes, e.g. {names[0]!r}")
    if missing:
        log.warning("%s %s: nothing about %d of %d classes, e.g. %r: their names stand in", flag, path, len(missing),
                    len(names), missing[0])  # fmt: skip
    return [texts.get(n, n) for n in names]


def choose_classes(method: Method, batch: dict, names: Tensor) -> None:
    """Give a batch ``classes [M]`` and their images ``classes_of [M]``: the nearest name of each crop, once an image.

    Args:
        method: its teacher of ``crops`` is asked, once for the batch.
        batch: of the method's loop.
        names: text features ``[C, D]``.
    """
    batch["answers"] = {**batch.get("answers", {}), "crops": method.ask("crops", batch)}
    chosen = (batch["answers"]["crops"].float() @ F.normalize(names, dim=-1).T).argmax(1)
    owner = torch.repeat_interleave(
        torch.arange(len(batch["boxes"]), device=chosen.device),
        torch.tensor([len(b) for b in batch["boxes"]], device=chosen.device),
    )
    batch["classes_of"], batch["classes"] = torch.stack([owner, chosen], 1).unique(dim=0).unbind(1)
