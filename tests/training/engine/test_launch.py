"""What a restart by torchrun goes on with: a run that its own launch has begun, and no other one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.engine.launch import FILE, opened_by, sign, this_launch

SRC = Path(__file__).parents[3] / "src"


@pytest.fixture
def launch(monkeypatch) -> list[str]:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's own, of every launch that is given none
    return this_launch()


def test_a_folder_tells_its_launch_from_others(launch, tmp_path, monkeypatch):
    assert len(launch) == 1 and not opened_by(tmp_path / "none", launch) and not opened_by(tmp_path, launch)
    sign(tmp_path, launch)
    assert opened_by(tmp_path, this_launch())
    with monkeypatch.context() as patch:  # another torchrun
        patch.setattr(os, "getppid", os.getpid)
        assert this_launch() != launch and not opened_by(tmp_path, this_launch())
    with monkeypatch.context() as patch:
        patch.setenv("TORCHELASTIC_RUN_ID", "4711")
        assert not opened_by(tmp_path, this_launch())
    (tmp_path / FILE).write_bytes(b"\xff\xfe")
    assert not opened_by(tmp_path, launch)


def test_a_number_that_recurs_is_another_launch(launch, tmp_path):
    """In a container torchrun is process 1 each time."""
    host, boot, number, began, run = launch[0].split()
    assert (number, run) == (str(os.getppid()), "none")
    if boot == "-":
        pytest.skip("this system does not say when a process began")
    sign(tmp_path, [" ".join([host, boot, number, str(int(began) - 1), run])])
    assert not opened_by(tmp_path, launch)


def test_a_script_between_torchrun_and_the_program_changes_nothing(launch):
    """It is another one at each restart. Here this process is in torchrun's place."""
    code = "from training.engine.launch import this_launch; print(*this_launch())"
    environment = {**os.environ, "PYTHONPATH": str(SRC), "TORCHELASTIC_RUN_ID": "none"}
    command = ["sh", "-c", f"{sys.executable} -c '{code}'; exit $?"]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (process.communicate(timeout=120)[0].split() for process in started)
    if launch[0].split()[1] == "-":
        pytest.skip("this system does not show the environment of a process")
    assert first == second and first[2] == str(os.getpid())


def test_one_machine_in_common_suffices(launch, tmp_path):
    sign(tmp_path, ["one that is gone", *launch])
    assert opened_by(tmp_path, [*launch, "one that is new"])
    assert not opened_by(tmp_path, ["one that is new"])


def test_without_torchrun_nothing_is_noted(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    sign(tmp_path, this_launch())
    assert this_launch() == [] and not list(tmp_path.iterdir())
    (tmp_path / FILE).touch()
    assert not opened_by(tmp_path, [])


def test_machines_that_count_restarts_differently_go_on_alike(two_processes, tmp_path):
    """One was replaced, and does not see the folder yet: process 0 decides for both."""
    two_processes(f"""
        import os
        from pathlib import Path
        from training.engine.errors import Flags
        from training.engine.folder import open_folder, resume_after_restart

        os.environ |= {{"TORCHELASTIC_RUN_ID": "7", "TORCHELASTIC_MAX_RESTARTS": "3"}}
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(1 - dist.rank)
        folder = Path({str(tmp_path)!r}) / "run"
        seen = folder if dist.is_master else folder.with_name("none")
        assert resume_after_restart(seen, None, Flags()) is None
        with open_folder(folder, None, dist, Flags()):
            pass
        assert resume_after_restart(seen, None, Flags()) == "latest"
        assert resume_after_restart(seen, "a.pt", Flags()) == "a.pt"
    """)
