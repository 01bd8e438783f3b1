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


def test_before_processes_meet_the_first_of_each_machine_tells(monkeypatch, capsys):
    def refuse():
        raise UserError("unknown flag")

    for rank, local, told in (("0", "0", True), ("1", "1", False), ("8", "0", True), ("9", "1", False)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        assert run_program(refuse) == EXIT_USER
        assert capsys.readouterr().err == ("error: unknown flag\n" if told else "")


def test_what_one_process_alone_knows_is_told_by_it(two_processes):
    """The other, which waits for it, can only say that it has gone."""
    outputs = two_processes("""
        import os, sys, torch
        from training.engine.distributed import all_reduce_sum
        from training.engine.errors import EXIT_FAILED, EXIT_USER, UserError, run_program

        def alone():
            if dist.rank == 1:
                raise UserError("a.json: mend it")
            all_reduce_sum(torch.ones(1))

        assert run_program(alone) == (EXIT_USER if dist.rank else EXIT_FAILED)
        sys.stdout.flush()
        os._exit(0)
    """)
    assert "error: process 1: a.json: mend it\n" in outputs[1]
    assert "error: another process of this run has died" in outputs[0]


def test_what_all_processes_know_is_told_once(two_processes):
    """Whether they have found it together, or each for itself."""
    outputs = two_processes("""
        import sys, time
        from training.engine.distributed import barrier, together
        from training.engine.errors import EXIT_USER, UserError, run_program

        def found():
            with together():
                if dist.rank == 1:
                    raise UserError("a.json: mend it")

        def judged():
            raise UserError("the loss was not finite")

        import training.engine.errors as errors
        leave, errors.dist.destroy_process_group = errors.dist.destroy_process_group, lambda: None
        assert run_program(found) == EXIT_USER
        assert run_program(judged) == EXIT_USER
        barrier()  # the store is process 0's
        errors.dist.destroy_process_group = leave
    """)
    said = [line for output in outputs for line in output.splitlines() if line.startswith("error: ")]
    assert [line for line in said if "a.json" in line] == ["error: process 1: a.json: mend it"]
    assert len([line for line in said if line.endswith("the loss was not finite")]) == 1 and len(said) == 2
