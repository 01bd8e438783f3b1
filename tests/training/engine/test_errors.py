"""Exit statuses of programs, and what they say."""

from __future__ import annotations

import pytest

from training.engine.errors import EXIT_FAILED, EXIT_USER, UserError, run_program
from training.engine.files import save_atomically

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
