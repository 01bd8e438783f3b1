"""Samples that cannot be used: named, counted, and too many of them end the run."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

from training.engine.errors import UserError

log = logging.getLogger(__name__)

NAMED = 20  # unusable samples named in the log; the others are counted
FEW = 32  # samples seen before the share of unusable ones is judged, unless there are fewer
SPREADS = 4  # standard deviations beyond which a share of some samples tells of the share of all


class SkipPolicy:
    """Counts usable and unusable samples of all processes, from one :meth:`reset` to the next.

    Args:
        source: where the samples come from, for messages: a flag and its value.
        allowed: share of unusable ones above which a run stops, 0 to 1.
        flag: sets ``allowed``, for messages.
        whole: samples that will be counted in all, to judge before their end.
    """

    def __init__(self, source: str, allowed: float, flag: str = "--max-skipped", whole: float = 0) -> None:
        self.source, self.allowed, self.flag, self.whole = source, allowed, flag, whole
        self.reset()

    def reset(self, usable: float = 0, skipped: float = 0) -> None:
        """Begin counting anew, or from where a run stands that is resumed."""
        self.usable, self.skipped = usable, skipped
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
        """See that the share of unusable samples is not too large.

        Before all have been counted it is where more are unusable than may be of all of them, or so many of those seen
        that the share of all, of which these are a random part, is hardly within what is allowed.

        Args:
            at_end: what was counted is all there is.

        Raises:
            UserError: it is.
        """
        asked = self.usable + self.skipped
        whole = asked if at_end else max(self.whole, asked)
        if asked < min(FEW, whole):
            return
        # Of a sample without replacement: 0 when all have been seen.
        spread = math.sqrt(asked * self.allowed * (1 - self.allowed) * (1 - asked / max(whole, 1)))
        if self.skipped > min(self.allowed * whole, self.allowed * asked + SPREADS * spread):
            raise UserError(
                f"{self.skipped:.0f} of {asked:.0f} samples of {self.source} could not be used, more than "
                f"{self.flag} {self.allowed:g} allows: see the files named in the log"
            )
