"""Signals that end a run, obeyed when its state is saved; and kept away from processes that are being born."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """A signal asked the run to end; its state is saved."""


_told: contextlib.ExitStack | None = None


@contextlib.contextmanager
def until_told() -> Iterator[None]:
    """Within this stretch a run that fails keeps its handlers to the end: a launcher answers the death of one process
    with SIGTERM to the others, which have still to say why they end."""
    global _told
    before = _told
    try:
        with contextlib.ExitStack() as _told:
            yield
    finally:
        _told = before


class StopSignal:
    """``with StopSignal() as stop``: SIGTERM and SIGINT are remembered, so that a step is finished and saved.

    A second SIGINT ends at once. The former handlers come back at the end, or of a run that fails within
    :func:`until_told`, at the end of that.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *about: Any) -> None:
        if kind is None or _told is None:
            self._restore()
        else:
            _told.callback(self._restore)

    def _note(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True

    def _restore(self) -> None:
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
