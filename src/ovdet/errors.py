"""One kind of error for what the user can mend, and the way it reaches the terminal."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator

from training.engine.errors import UserError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def as_user_error() -> Iterator[None]:
    """Turn the one-line errors of ``open_clip`` and of the config into :class:`UserError`.

    For set-up only: inside the training loop the same kinds of error are faults of the program.
    """
    try:
        yield
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        raise UserError(" ".join(str(error).split())) from error


def run(main: Callable[[], int | None]) -> None:
    """Run a program: a :class:`UserError` is printed as one line and ends it with status 2."""
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        status = 2
    except KeyboardInterrupt:
        status = 130
    sys.exit(status or 0)
