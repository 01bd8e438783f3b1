"""The lock of a run's folder: against another process, another machine, and the dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import training.engine.lock as lock
from training.engine.errors import UserError

SRC = Path(__file__).parents[3] / "src"
HOLD = "import sys, time; from pathlib import Path; from training.engine.lock import FolderLock\n" \
       "held = FolderLock(Path(sys.argv[1])); print('held', flush=True)\n"  # fmt: skip


def hold(folder: Path, then: str = "time.sleep(60)") -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD + then, str(folder)], env={**os.environ, "PYTHONPATH": str(SRC)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_and_a_killed_one_leaves_nothing(tmp_path):
    # A child, as loader workers are, outlives the holder: it must not hold the folder in its place.
    process = hold(tmp_path, "import os\nif os.fork() == 0: time.sleep(5); os._exit(0)\ntime.sleep(60)")
    with pytest.raises(UserError, match=f"another run .process {process.pid}, on .* is at work in {tmp_path}"):
        lock.FolderLock(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with lock.FolderLock(tmp_path) as mine:
        with pytest.raises(UserError, match=f"process {os.getpid()}"):
            lock.FolderLock(tmp_path)
    mine.release()
    lock.FolderLock(tmp_path).release()
    assert [f.name for f in tmp_path.iterdir()] == [lock.FILE] and not (tmp_path / lock.FILE).read_text()


@pytest.fixture
def another_machine(tmp_path, monkeypatch):
    """The lock's file as a machine left it whose kernel's locks do not reach this one; a second is ten."""
    monkeypatch.setattr(lock, "BEAT", 0.2)
    monkeypatch.setattr(lock, "STALE", 1.0)
    file = tmp_path / lock.FILE
    file.write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": "today"}))
    return file


def test_a_living_run_of_another_machine_is_respected(another_machine, tmp_path):
    end = threading.Event()

    def live():
        while not end.wait(0.1):
            os.utime(another_machine)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 7, on elsewhere, since today"):
            lock.FolderLock(tmp_path)
    finally:
        end.set()
        thread.join()


def test_a_dead_run_of_another_machine_is_not(another_machine, tmp_path):
    begin = time.monotonic()
    with lock.FolderLock(tmp_path):
        assert 0.5 < time.monotonic() - begin < 20
        first = another_machine.stat().st_mtime_ns
        deadline = time.monotonic() + 20
        while another_machine.stat().st_mtime_ns == first:  # its own signs of life
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "elsewhere" not in another_machine.read_text()


def test_a_disk_without_locks(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", unsupported)
    monkeypatch.setattr(lock, "BEAT", 0.2)
    monkeypatch.setattr(lock, "STALE", 1.0)
    process = hold(tmp_path, "import os\nwhile True: os.utime(sys.argv[1] + '/.lock'); time.sleep(0.1)")
    with pytest.raises(UserError, match=f"process {process.pid}"):  # it gives signs of life
        lock.FolderLock(tmp_path)
    process.kill()
    process.wait()
    with lock.FolderLock(tmp_path):
        assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid()
    (tmp_path / lock.FILE).write_text("{damaged")
    lock.FolderLock(tmp_path).release()
