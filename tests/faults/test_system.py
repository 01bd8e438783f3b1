"""Failures of the system around a run: full disks, processes that die or hang, signals. One line each, and no hang."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import Unsupported

from training.engine.checkpoint import find_latest, read_checkpoint, remove_unfinished, save_atomically
from training.engine.errors import EXIT_FAILED, EXIT_INTERRUPTED, UserError, explain
from training.engine.launch import sign, this_launch
from training.engine.loop import Loop
from training.main import continue_after_restart
from training.params import parse_args

SHORT = {"epochs": 2, "save_every": 2}
ENDLESS = {**SHORT, "epochs": 200}


def one_error(text: str) -> str:
    """The only line for the user; and nothing that looks like a traceback."""
    assert "Traceback" not in text and "Logging error" not in text, text[-3000:]
    errors = re.findall(r"^error: .*$", text, re.MULTILINE)
    assert len(errors) == 1, text[-3000:]
    return errors[0]


# -- disk -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def largest_file(size: int):
    """Writing beyond so many bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_size_limit_leaves_the_former_checkpoint(program, capfd):
    """Writing fails in the middle of a checkpoint."""
    assert program("whole", **SHORT) == 0
    shutil.copytree(program.folder("whole"), program.folder("run"))
    folder = program.folder("run") / "checkpoints"
    (folder / "epoch_2.pt").unlink()
    released = program.folder("run") / program.release
    before = {f: f.read_bytes() for f in (*folder.iterdir(), released)}
    size = (folder / "epoch_1.pt").stat().st_size
    for limit in (size // 2, size - 5):
        capfd.readouterr()
        with largest_file(limit):
            assert program("run", resume=True, **SHORT) == 2
        error = one_error(capfd.readouterr().err)
        assert "epoch_1_step_2.pt cannot be written" in error and "free some space" in error
        assert program.flags.folder in error
        assert {f: f.read_bytes() for f in (*folder.iterdir(), released)} == before
        assert not list(program.folder("run").rglob(".*.pt.*"))
    assert find_latest(folder)[0].name == "epoch_1.pt"
    assert program("run", resume=True, **SHORT) == 0
    program.check_equal(2, "whole", "run")


@contextlib.contextmanager
def small_disk(place: Path, megabytes: float):
    place.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(["mount", *options], capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no permission to mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("room", [1.2, *(pytest.param(room, marks=pytest.mark.slow) for room in (0.7, 2.6, 5.2))])
def test_a_full_disk_leaves_the_former_checkpoint(program, tmp_path, capfd, room):
    """``room`` for so many checkpoints, so that the disk ends now in a checkpoint, now in a release file or the log."""
    assert program("measure", max_steps=2, **SHORT) == 0
    size = (program.folder("measure") / "checkpoints/epoch_1.pt").stat().st_size / 2**20
    disk, many = tmp_path / "disk", {**SHORT, "epochs": 20}
    capfd.readouterr()
    with small_disk(disk, room * size):
        assert program("run", place=disk, **many) in (2, EXIT_FAILED)
        assert "free some space" in one_error(capfd.readouterr().err)
        shutil.copytree(disk / "run", program.folder("run"))
    # What was complete is still there and readable; on a larger disk the run goes on from it.
    folder = program.folder("run") / "checkpoints"
    assert not list(folder.glob(".*"))
    assert all(read_checkpoint(f) for f in folder.glob("epoch_*.pt"))
    found = find_latest(folder)
    assert (found is not None) == (room > 1)
    if found is not None:
        epochs = found[1]["epoch"] + 1
        assert program("run", resume=True, **many, max_steps=12 * epochs) == 0
        assert read_checkpoint(folder / f"epoch_{epochs}.pt")["step"] == 12 * epochs


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    for name in (".epoch_1.pt.77", ".clipself.pt.4242", "epoch_1.pt", "clipself.pt", ".notes.pt.txt"):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [".notes.pt.txt", "clipself.pt", "epoch_1.pt"]


def test_failures_are_told_from_programming_errors():
    assert "disk is full" in explain(OSError(28, "No space left on device", "results.json"))
    assert "loader worker" in explain(RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed."))
    assert "leave --compile out" in explain(Unsupported("no source of s15"))
    assert "another process" in explain(RuntimeError("[..gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert "another process" in explain(torch.distributed.DistBackendError("NCCL error: remote process exited"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50)
    assert "out of memory" in explain(error.value)
    assert "out of memory" in explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    for error in (RuntimeError("shape mismatch"), ValueError("x"), OSError(2, "No such file", "x"), KeyError("gloo")):
        assert explain(error) is None


# -- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # torch reports the death from a signal handler: wherever Python is then, and a hook may swallow it
def test_a_killed_loader_worker_ends_the_run_with_one_line(launcher):
    program = launcher.program
    run = launcher.start("run", workers=2, **ENDLESS)
    run.until(lambda: program.steps("run") >= 2, "checkpoint")
    workers = [pid for pid in run.descendants() if Path(f"/proc/{pid}/comm").read_text().strip() != "torch_shm_manag"]
    os.kill(workers[0], signal.SIGKILL)
    assert run.wait(120) == EXIT_FAILED, run.text[-3000:]
    assert "loader worker has died" in one_error(run.text)
    assert not run.descendants() and read_checkpoint(program.checkpoints("run")[-1])


def two_processes(launcher, *more: str):
    run = launcher.start("run", *more, processes=2, batch_size=1, **ENDLESS)
    run.until(lambda: launcher.program.steps("run") >= 2, "checkpoint")
    return run


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others_with_one_line(launcher, rank):
    run = two_processes(launcher)
    victim, other = (run.ranks()[r] for r in (rank, 1 - rank))
    begin = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    assert run.wait(90) != 0
    assert time.monotonic() - begin < 60
    errors = run.errors()
    assert len(errors) == 1 and "another process of this run has died or hangs" in errors[0], run.text[-3000:]
    assert not os.path.exists(f"/proc/{other}")
    assert find_latest(launcher.program.folder("run") / "checkpoints") is not None


@pytest.mark.slow
@pytest.mark.parametrize("program", ["clipself"], indirect=True)  # the others have no flag for it
def test_a_process_that_hangs_ends_the_others_after_the_timeout(launcher):
    run = two_processes(launcher, "--dist-timeout=8")
    begin = time.monotonic()
    os.kill(run.ranks()[1], signal.SIGSTOP)
    assert run.wait(120) != 0
    errors = run.errors()
    assert len(errors) == 1 and "another process of this run has died or hangs" in errors[0], run.text[-3000:]
    assert time.monotonic() - begin < 8 + 60  # torchrun grants the stopped process 30 s


@pytest.mark.slow
def test_torchrun_restarts_continue_by_themselves(launcher):
    """The command line has no --resume; two deaths later the weights are those of an undisturbed run."""
    program, flags = launcher.program, {**SHORT, "epochs": 4, "batch_size": 1, "processes": 2}
    run = launcher.start("run", restarts=3, **flags)
    rng = random.Random(0)
    for at in (4, 1004):
        run.until(lambda at=at: program.steps("run") >= at, f"step {at}")
        os.kill(run.ranks()[rng.randrange(2)], signal.SIGKILL)
    assert run.wait() == 0, run.text[-4000:]
    assert run.text.count("resumed ") == 2
    whole = launcher.start("whole", **flags)
    assert whole.wait() == 0
    program.check_equal(4, "whole", "run")


def test_what_a_restart_resumes(distillation, monkeypatch):
    def resume(*extra: str) -> str | None:
        options = parse_args(distillation.arguments(*extra, **({} if "--name" in extra else {"name": "run"})))
        return continue_after_restart(options).run.resume

    folder = distillation.logs / "run/checkpoints"
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert resume() is None and resume("--resume", "a.pt") == "a.pt"
    unnamed = parse_args(distillation.arguments())
    with pytest.raises(UserError, match="--max-restarts needs --name"):
        continue_after_restart(unnamed)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert resume() is None  # the first start died before it made its folder
    folder.mkdir(parents=True)
    save_atomically({"epoch": 1, "step": 1, "state_dict": {}, "optimizer": {}}, folder / "epoch_0_step_1.pt")
    assert resume() is None and resume("--resume", "a.pt") == "a.pt"  # of another run: the first start was refused
    (folder / "epoch_0_step_1.pt").unlink()
    sign(folder.parent, this_launch())
    assert resume() == "latest" and resume("--resume", "a.pt") == "a.pt"  # nothing newer than the file yet
    save_atomically({"epoch": 1, "step": 1, "state_dict": {}, "optimizer": {}}, folder / "epoch_0_step_1.pt")
    assert resume() == "latest" and resume("--resume", "a.pt") == "latest"


def test_a_restart_of_a_refused_run_leaves_the_other_one_alone(launcher):
    """Its name is taken, which it is told; torchrun starts it again, and it must not go on with what is there."""
    program, flags = launcher.program, {"epochs": 1, "batch_size": 6}
    assert program("run", **flags) == 0
    before = {f: f.read_bytes() for f in program.folder("run").rglob("*") if f.is_file()}
    run = launcher.start("run", restarts=1, **{**flags, "epochs": 2})
    assert run.wait() == 1
    assert {f: f.read_bytes() for f in program.folder("run").rglob("*") if f.is_file()} == before
    errors = run.errors()
    assert len(errors) == 2 and len(set(errors)) == 1 and program.flags.resume in errors[0], run.text[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_its_own_status(launcher, number):
    program, flags = launcher.program, {"epochs": 2, "workers": 1, "log_every": 1}
    run = launcher.start("run", **flags)
    run.until(lambda: "step 2/" in run.text, "step 2")
    os.killpg(run.process.pid, number)  # as a terminal or a scheduler does: to the workers as well
    assert run.wait(120) == EXIT_INTERRUPTED, run.text[-3000:]
    assert "Traceback" not in run.text and f"go on with {program.flags.resume}" in run.text
    run = launcher.start("run", resume=True, **flags)
    assert run.wait() == 0, run.text[-3000:]
    whole = launcher.start("whole", **flags)
    assert whole.wait() == 0
    program.check_equal(2, "whole", "run")


@pytest.mark.slow
def test_a_signal_to_torchrun_saves(launcher):
    """It passes the signal on, and gives the processes time to finish their step and save."""
    program = launcher.program
    run = launcher.start("run", processes=2, epochs=200, batch_size=1, workers=1, log_every=1)
    run.until(lambda: "step 2/" in run.text, "step 2")
    assert not program.checkpoints("run")
    run.process.terminate()
    assert run.wait(150) != 0 and not run.descendants()
    path, checkpoint = find_latest(program.folder("run") / "checkpoints")
    assert checkpoint["step"] >= 2 and len(checkpoint["random_states"]) == 2 and not run.errors()
    assert f"interrupted: saved as {path}" in run.text


# -- data that goes away ----------------------------------------------------------------------------------------------


def test_an_image_root_that_vanishes_stops_the_run(program, scenes, tmp_path, monkeypatch, capsys):
    images = tmp_path / "images"
    shutil.copytree(scenes / "train2017", images)
    original = Loop._judge

    def judge(loop, *args):
        if loop.progress.step == 14:  # in the second epoch
            images.rename(tmp_path / "elsewhere")
        original(loop, *args)

    monkeypatch.setattr(Loop, "_judge", judge)
    assert program("run", images=images, save_every=2, epochs=20) == 2
    error = one_error(capsys.readouterr().err)
    assert "could not be used" in error and program.flags.max_skipped in error
    log = program.text("run")
    assert "no such file" in log and str(images) in log
    (tmp_path / "elsewhere").rename(images)
    monkeypatch.undo()
    assert find_latest(program.folder("run") / "checkpoints")[1]["epoch"] >= 1
