"""Samples that cannot be used: named, counted, and too many of them end the run."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from training.engine.errors import UserError

log = logging.getLogger(__name__)

NAMED = 20  # unusable samples named in the log; the others are counted
FEW = 32  # samples seen before the share of unusable ones is judged


class SkipPolicy:
    """Counts usable and unusable samples of all processes, from one :meth:`reset` to the next.

    Args:
        source: where the samples come from, for messages: a flag and its value.
        allowed: share of unusable ones at which a run stops, 0 to 1.
        flag: sets ``allowed``, for messages.
    """

    def __init__(self, source: str, allowed: float, flag: str = "--max-skipped") -> None:
        self.source, self.allowed, self.flag = source, allowed, flag
        self.reset()

    def reset(self) -> None:
        """Begin counting anew."""
        self.usable = self.skipped = 0.0
        self.named = 0

    def name(self, skipped: Iterable[tuple[str, str]]) -> None:
        """Name (file, reason) of this process's unusable samples in the log, up to a number."""
        for file, reason in skipped:
            if self.named < NAMED:
                log.warning("skipped %s: %s", file, reason)
            self.named += 1

    def count(self, usable: float, skipped: float) -> None:
        """Add the samples of all processes."""
        self.usable += usable
        self.skipped += skipped

    def judge(self, *, at_end: bool = False) -> None:
        """UserError when the share of unusable samples is too large; not before ``FEW`` were seen, or at the end."""
        asked = self.usable + self.skipped
        if (asked >= FEW or at_end) and self.skipped > self.allowed * asked:
            raise UserError(
                f"{self.skipped:.0f} of {asked:.0f} samples of {self.source} could not be used, more than "
                f"{self.flag} {self.allowed:g} allows: see the files named in the log"
            )
