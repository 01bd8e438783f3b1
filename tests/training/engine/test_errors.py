"""Exit statuses of programs, and what they say."""

from __future__ import annotations

import os
import signal

import pytest

from training.engine.errors import EXIT_FAILED, EXIT_USER, UserError, run_program
from training.engine.files import save_atomically
from training.engine.signals import SIGNALS, StopSignal

DIED = "DataLoader worker (pid 7) is killed by signal: Killed."


class Dies:
    """Raises in the middle of a save, as the handler of a worker's death does."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self):
        raise RuntimeError(self.text)


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [(DIED, EXIT_FAILED, "a loader worker has died"), ("no space", EXIT_USER, "cannot be written")],
)
def test_a_worker_that_dies_during_a_save_is_no_full_disk(tmp_path, capsys, text, status, said):
    assert run_program(lambda: save_atomically({"state": Dies(text)}, tmp_path / "a.pt")) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line and not list(tmp_path.iterdir())


def test_an_error_for_the_user_has_its_own_status(capsys):
    def main():
        raise UserError("--lr -1: above 0")

    assert run_program(main) == EXIT_USER and capsys.readouterr().err == "error: --lr -1: above 0\n"


def test_a_launchers_sigterm_leaves_time_for_the_one_line(capsys):
    """torchrun sends it to the survivors of a process that died, most often between the error and the line about it."""

    def main():
        try:
            with StopSignal():
                raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    before = [signal.getsignal(s) for s in SIGNALS]
    assert run_program(main) == EXIT_FAILED
    assert "another process of this run has died or hangs" in capsys.readouterr().err
    assert [signal.getsignal(s) for s in SIGNALS] == before
    with pytest.raises(ZeroDivisionError), StopSignal():  # outside a program they come back at once
        raise ZeroDivisionError
    assert [signal.getsignal(s) for s in SIGNALS] == before
