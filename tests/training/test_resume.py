"""Interrupted and resumed runs end as uninterrupted ones, bit by bit; damaged checkpoints are never taken for good."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch

from training.engine.checkpoint import find_latest, read_checkpoint, save_atomically
from training.engine.errors import EXIT_INTERRUPTED, UserError
from training.engine.loop import Loop

TOTAL = 12  # optimizer steps of the runs here: 2 epochs of 6


def final_state(program, name: str) -> dict[str, torch.Tensor]:
    return read_checkpoint(program.logs / name / "checkpoints" / "epoch_2.pt")["state_dict"]


def run(program, *extra, **flags) -> int:
    flags = {"accum_freq": 2, "lock_image_unlocked_groups": 2, "alpha": 0.7, **flags}
    return program("--lock-image", *extra, **flags)


def stop_after(monkeypatch, step: int) -> None:
    """Send this process a SIGTERM while optimizer step ``step`` is under way."""
    original = Loop._judge

    def judge(loop, *args):
        original(loop, *args)
        if loop.progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Loop, "_judge", judge)


@pytest.mark.parametrize("method", ["grid_distill", "region_clip", "contrastive"])
def test_resumed_run_is_bit_identical(program, monkeypatch, method):
    flags = {} if method != "contrastive" else {"accum_freq": 1}
    assert run(program, train=method, name="whole", **flags) == 0
    expected = final_state(program, "whole")
    for step in (1, 5, 6, 9):
        name = f"stopped{step}"
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            assert run(program, train=method, name=name, **flags) == EXIT_INTERRUPTED
        assert run(program, train=method, name=name, resume="latest", **flags) == 0
        actual = final_state(program, name)
        assert all(torch.equal(actual[k], v) for k, v in expected.items()), step
        a, b = (read_checkpoint(program.logs / n / "checkpoints" / "epoch_2.pt") for n in ("whole", name))
        assert torch.equal(a["random_states"][0]["torch"], b["random_states"][0]["torch"]), step


def test_step_checkpoints_are_pruned_and_the_newest_is_used(program, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 4)  # seen by all processes one step later
        assert run(program, name="run", save_every_n_steps=1) == EXIT_INTERRUPTED
    folder = program.logs / "run" / "checkpoints"
    assert sorted(f.name for f in folder.glob("epoch_*")) == ["epoch_0_step_4.pt", "epoch_0_step_5.pt"]
    path, content = find_latest(folder)
    assert path.name == "epoch_0_step_5.pt" and content["step"] == 5
    for file in folder.iterdir():  # a copy that does not keep times
        os.utime(file, (1, 1 + ("step_4" in file.name)))
    assert find_latest(folder)[0] == path
    path.write_bytes(path.read_bytes()[:-1000])
    assert find_latest(folder)[0].name == "epoch_0_step_4.pt"
    assert run(program, name="run", resume="latest") == 0
    assert sorted(f.name for f in folder.glob("epoch_*")) == ["epoch_1.pt", "epoch_2.pt"]
    assert run(program, name="other") == 0
    a, b = final_state(program, "run"), final_state(program, "other")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_resume_refuses_other_start_weights_and_other_parameters(program, capsys):
    assert run(program, name="run", epochs=1) == 0
    file = program.logs / "run/checkpoints/epoch_1.pt"
    assert run(program, name="run", resume=file, pretrained=program.logs / "run/checkpoints/clipself.pt") == 2
    assert "began from other weights" in capsys.readouterr().err
    assert run(program, name="run", resume=file, seed=5) == 2
    assert "--seed was 0, now it is 5" in capsys.readouterr().err
    assert run(program, name="run", resume=file, lock_image_unlocked_groups=1) == 2
    assert "--lock-image-unlocked-groups was 2, now it is 1" in capsys.readouterr().err
    assert run(program, name="run", resume=program.logs / "none.pt") == 2
    assert "none.pt does not exist" in capsys.readouterr().err


def test_damaged_checkpoints_are_refused_by_name(tmp_path):
    path = tmp_path / "epoch_1.pt"
    weights = torch.randn(2000)
    save_atomically({"epoch": 1, "step": 2, "state_dict": {"w": weights}, "optimizer": {"lr": [0.5]}}, path)
    good, rng = path.read_bytes(), np.random.default_rng(0)
    damages = [good[: int(n)] for n in rng.integers(0, len(good), 50)]
    for place in rng.integers(0, len(good), 50):
        flipped = bytearray(good)
        flipped[place] ^= 1 << int(rng.integers(8))
        damages.append(bytes(flipped))
    outcomes = {"loaded": 0, "refused": 0}
    for damage in damages:
        path.write_bytes(damage)
        try:
            content = read_checkpoint(path)
        except UserError as error:
            assert "epoch_1.pt" in str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            assert torch.equal(content["state_dict"]["w"], weights) and content["optimizer"] == {"lr": [0.5]}
            assert (content["epoch"], content["step"]) == (1, 2)
            outcomes["loaded"] += 1
    assert outcomes["refused"] > 50


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "epoch_1.pt"
    save_atomically({"epoch": 1, "step": 1, "state_dict": {}, "optimizer": {}}, path)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        save_atomically({"epoch": 2, "step": 2, "state_dict": {}, "optimizer": {}}, path)
    assert read_checkpoint(path)["epoch"] == 1 and [f.name for f in tmp_path.iterdir()] == ["epoch_1.pt"]


def test_nan_losses_stop_the_run_and_name_the_images(program, monkeypatch, capsys):
    import training.methods.clipself as clipself

    monkeypatch.setattr(
        clipself.CLIPSelf, "ask", lambda self, name, batch: batch["crops"].new_full((1, 1), float("nan"))
    )
    assert run(program, name="run", max_nan_steps=3) == 2
    error = capsys.readouterr().err
    assert "3 steps in a row" in error and "images [" in error and "last good checkpoint is none" in error


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_ends_the_program_at_once(program, monkeypatch, workers):
    """Loader workers outlive a SIGTERM, so that a run can save; an error must not wait for them."""
    monkeypatch.setattr(Loop, "_judge", lambda *_: 1 / 0)
    begin = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        run(program, name="run", workers=workers)
    assert not multiprocessing.active_children() and time.monotonic() - begin < 60
