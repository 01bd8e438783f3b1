"""Signals that end a run, obeyed when its state is saved; and kept away from processes that are being born."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """A signal asked the run to end; its state is saved."""


class StopSignal:
    """Remembers SIGTERM and SIGINT, so that a step is finished and saved. A second SIGINT ends at once."""

    def __init__(self) -> None:
        self.received = False
        self._before = {s: signal.signal(s, self._note) for s in SIGNALS}

    def _note(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """SIGTERM and SIGINT wait until the end of this stretch; processes forked in it are born with them blocked.

    A signal to the whole process group would end a child that has not set its own handlers yet, and with it the run
    that is about to save.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_through() -> None:
    """Unblock SIGTERM and SIGINT in a child that was forked within :func:`held_back` and has set its handlers."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
