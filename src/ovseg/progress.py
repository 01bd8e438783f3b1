"""Counts of an evaluation on disk: one that was cut short goes on where it was, with any number of processes."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.engine.errors import UserError, reason_of
from training.engine.files import write_atomically


class Counts:
    """A folder of partial counts. Every process of every attempt writes one file of its own; their sum is the result.

    Args:
        folder: made when it is not there; the counts are in its ``counts``.
        fingerprint: what the counts depend on, as json knows it.

    Raises:
        UserError: the folder holds counts of another run, or cannot be written to.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder = folder / "counts"
        self.file = self.folder / f"{uuid.uuid4().hex}.json"
        settings = self.folder / "run.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not settings.is_file():
                write_atomically(settings, json.dumps(fingerprint, indent=1) + "\n")
            before = json.loads(settings.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"--out {folder}: {reason_of(error)}") from None
        other = sorted(key for key in {*before, *fingerprint} if before.get(key) != fingerprint.get(key))
        if other:
            raise UserError(
                f"--out {folder}: holds counts of a run with other {', '.join(other)}; choose another folder, or "
                "delete it"
            )

    def restore(self) -> tuple[dict[str, Tensor], set[int]]:
        """Sum of all partial counts by variant, int64 ``[C, C]``, and the images that are in it."""
        total: dict[str, Tensor] = {}
        done: set[int] = set()
        for file in sorted(self.folder.glob("*.json")):
            if file.name == "run.json":
                continue
            content = json.loads(file.read_text(encoding="utf-8"))
            done.update(content["images"])
            for name, counts in content["counts"].items():
                counts = torch.tensor(counts, dtype=torch.int64)
                total[name] = total[name] + counts if name in total else counts
        return total, done

    def save(self, counts: Mapping[str, Tensor], images: Iterable[int]) -> None:
        """Write this process's own counts, in place of its last ones.

        Raises:
            UserError: the disk is full or not writable.
        """
        content = {"images": list(images), "counts": {name: value.tolist() for name, value in counts.items()}}
        try:
            write_atomically(self.file, json.dumps(content) + "\n")
        except OSError as error:
            raise UserError(f"{self.file} cannot be written: {error.strerror}") from None
