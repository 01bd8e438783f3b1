"""A run's end that was broken off is made up for, and all processes go on from the same checkpoint."""

from __future__ import annotations

import os
import signal
from types import ModuleType, SimpleNamespace

import pytest
import torch

import training.engine.checkpoint as checkpoint_module
from training.engine.checkpoint import find_latest, prune, save_atomically
from training.engine.errors import EXIT_INTERRUPTED


@pytest.fixture(scope="module")
def toy(as_module) -> ModuleType:
    """A line to be fitted, and its training."""
    return as_module("tests/training/engine/test_loop.py")


@pytest.fixture(scope="module")
def common(as_module) -> str:
    """Head of what two processes run: a deeper task, and its training with or without full sharding."""
    return as_module("tests/training/engine/test_sharding.py").COMMON


def names(folder) -> list[str]:
    return sorted(f.name for f in (folder / "checkpoints").iterdir())


# -- the end of a run -------------------------------------------------------------------------------------------------


def test_files_for_users_follow_a_checkpoint_that_they_were_missing_from(toy, tmp_path, monkeypatch):
    """The last save is broken off between the two."""
    assert toy.train(toy.Line(), tmp_path / "whole") == 0
    original = save_atomically

    def killed(content, path, *rest):
        if path.name == "line.pt" and content["epoch"] == 2:
            raise KeyboardInterrupt
        original(content, path, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint_module, "save_atomically", killed)
        toy.train(toy.Line(), tmp_path / "run")
    assert torch.load(tmp_path / "run/line.pt", weights_only=True)["epoch"] == 1
    saved = (tmp_path / "run/checkpoints/epoch_2.pt").read_bytes()
    assert toy.train(toy.Line(), tmp_path / "run", resume="latest") == 0
    whole, run = (torch.load(tmp_path / name / "line.pt", weights_only=True) for name in ("whole", "run"))
    assert run["epoch"] == 2 and toy.equal(whole, run)
    assert (tmp_path / "run/checkpoints/epoch_2.pt").read_bytes() == saved  # gigabytes, and there already


def test_files_for_users_of_a_run_that_ended_early(toy, tmp_path):
    def patient():
        task = toy.Line()
        task.ended = lambda progress: progress.epoch == 1
        return task

    assert toy.train(patient(), tmp_path, epochs=5) == 0
    (tmp_path / "line.pt").unlink()
    assert toy.train(patient(), tmp_path, epochs=5, resume="latest") == 0
    assert torch.load(tmp_path / "line.pt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("fsdp", [False, True])
def test_files_for_users_of_two_processes(two_processes, common, tmp_path, fsdp):
    two_processes(common + f"""
tmp = Path({str(tmp_path)!r})
assert train(Divided(), tmp / "run", fsdp={fsdp}) == 0
torch.distributed.barrier()
before = torch.load(tmp / "run/line.pt", weights_only=True)
torch.distributed.barrier()
if dist.is_master:
    (tmp / "run/line.pt").unlink()
assert train(Divided(), tmp / "run", resume="latest", fsdp={fsdp}) == 0
torch.distributed.barrier()
assert equal(torch.load(tmp / "run/line.pt", weights_only=True), before) and before["epoch"] == 2
""")  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"max_steps": 13}], ids=["of an epoch", "inside an epoch"])
def test_a_signal_in_the_very_last_step(toy, tmp_path, more):
    """What follows that step is made up for: the epoch's checkpoint, the pruning, the evaluation."""
    end, options = more.get("max_steps", 20), {"save_every_steps": 4, "keep": 1, "save_latest": True, **more}
    assert toy.train(toy.Line(), tmp_path / "whole", **options) == 0
    task = toy.Line()
    task.hook = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == end - 1 else None
    assert toy.train(task, tmp_path / "run", **options) == EXIT_INTERRUPTED
    assert find_latest(tmp_path / "run/checkpoints")[0].name == f"epoch_1_step_{end - 10}.pt"
    task = toy.Line()
    assert toy.train(task, tmp_path / "run", resume="latest", **options) == 0
    assert task.evaluated == [(end, False)]
    assert names(tmp_path / "run") == names(tmp_path / "whole") == ["epoch_2.pt", "epoch_latest.pt"]
    whole, run = (toy.last(tmp_path / name) for name in ("whole", "run"))
    for content in (whole, run):
        for group in content["optimizer"]["param_groups"]:
            group.pop("lr")  # that of the last step, which the resumed run did not make
    assert toy.equal(whole, run)
    whole, run = (torch.load(tmp_path / name / "line.pt", weights_only=True) for name in ("whole", "run"))
    assert toy.equal(whole, run)
    task = toy.Line()
    assert toy.train(task, tmp_path / "run", resume="latest", **options) == 0
    assert task.evaluated == [] and names(tmp_path / "run") == names(tmp_path / "whole")


# -- which checkpoint is the newest -----------------------------------------------------------------------------------


def test_a_clock_that_is_set_back_leaves_the_newest_checkpoints(toy, tmp_path, monkeypatch):
    times = iter(range(2_000_000_000, 0, -3600))
    monkeypatch.setattr(checkpoint_module, "time", SimpleNamespace(time=lambda: float(next(times))))
    task = toy.Line()
    task.hook = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 27 else None
    assert toy.train(task, tmp_path, epochs=5, keep=2, save_every_steps=3) == EXIT_INTERRUPTED
    assert names(tmp_path) == ["epoch_1.pt", "epoch_2.pt", "epoch_2_step_7.pt", "epoch_2_step_8.pt"]
    path, content = find_latest(tmp_path / "checkpoints")
    assert path.name == "epoch_2_step_8.pt" and content["step"] == 28
    assert toy.train(toy.Line(), tmp_path, epochs=5, keep=2, save_every_steps=3, resume="latest") == 0
    assert names(tmp_path) == ["epoch_4.pt", "epoch_5.pt"]
    assert find_latest(tmp_path / "checkpoints")[1]["step"] == 50


def test_pruning_spares_the_checkpoint_that_was_just_written(tmp_path):
    for number in (1, 2, 3):
        content = {"epoch": number, "step": number, "state_dict": {}, "optimizer": {}, "written": 1e9 - number}
        save_atomically(content, tmp_path / f"epoch_{number}.pt")
    prune(tmp_path, 1, "epoch_[0-9]*", spare=tmp_path / "epoch_3.pt")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["epoch_1.pt", "epoch_3.pt"]


# -- all processes go on from the same one ----------------------------------------------------------------------------

HEAD = """
import training.engine.checkpoint as checkpoint
import training.engine.files as files
tmp = Path({tmp!r})
assert train(Divided(), tmp / "run", fsdp=False) == 0
read = checkpoint.read_file
first, newest = (tmp / "run/checkpoints" / f"epoch_{{n}}.pt" for n in (1, 2))

def resumed(resume="latest"):
    "Step that the run goes on from, or what is wrong."
    steps = []
    class Watched(Divided):
        def prepare(self, progress):
            steps.append(progress.step)
    try:
        assert train(Watched(), tmp / "run", resume=resume, epochs=3, fsdp=False, max_steps=1) == 0
    except UserError as error:
        return str(error)
    return steps[0]
"""


def test_a_folder_that_one_process_sees_as_it_was(two_processes, common, tmp_path):
    """A stale listing of a network disk: process 0 says which checkpoint there is."""
    two_processes(common + HEAD.format(tmp=str(tmp_path)) + """
by_age = checkpoint.by_age
if dist.rank == 1:
    checkpoint.by_age = lambda folder, pattern: []
assert resumed() == 10
checkpoint.by_age = by_age
torch.distributed.barrier()
if dist.is_master:  # damaged for everybody: passed over by everybody
    newest.write_bytes(newest.read_bytes()[:-5])
torch.distributed.barrier()
assert resumed() == 5
""")  # fmt: skip


def test_a_checkpoint_that_one_process_cannot_read(two_processes, common, tmp_path):
    two_processes(common + HEAD.format(tmp=str(tmp_path)) + """
def fails(path):
    if path == newest:
        raise UserError(f"checkpoint {path} is damaged (Input/output error): use an earlier one")
    return read(path)
if dist.rank == 1:
    checkpoint.read_file = fails
said = resumed()
assert said.startswith(f"process 1: checkpoint {newest} is damaged (Input/output error)"), said
assert said.endswith("process 0 can read it: choose a folder on a disk that all machines share"), said
said = resumed(str(newest))
assert said.startswith(f"process 1: checkpoint {newest} is damaged (Input/output error)"), said
""")  # fmt: skip


def test_machines_with_disks_of_their_own_do_not_go_on(two_processes, common, tmp_path):
    """The same name on both, but on one of them it is of an earlier run."""
    two_processes(common + HEAD.format(tmp=str(tmp_path)) + """
if dist.rank == 1:
    checkpoint.read_file = lambda path: read(first if path == newest else path)
for resume in ("latest", str(newest)):
    said = resumed(resume)
    assert f"{newest} is another file on process 1 (epoch 1, step 5) than on process 0 (epoch 2, step 10)" in said, said
    assert "choose a folder on a disk that all machines share" in said, said
""")  # fmt: skip
