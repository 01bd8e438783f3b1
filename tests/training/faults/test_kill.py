"""A run that is killed again and again ends with the weights of one that was left alone, bit by bit."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
import torch

from training.engine.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow

EPOCHS = 9  # of 12 steps
STEPS = {"epochs": EPOCHS, "save_every_n_steps": 1, "accum_freq": 1, "alpha": 0.7, "lock_image_unlocked_groups": 2,
         "warmup": 5}  # fmt: skip
KILLS, KILLS_OF_TWO = 24, 8


def newest(launcher, name: str = "run") -> set:
    found = set()
    for file in launcher.checkpoints(name):
        try:
            found.add((file.name, file.stat().st_mtime_ns))
        except FileNotFoundError:
            pass  # pruned meanwhile
    return found


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def check_equal(launcher, *names: str) -> None:
    """The last checkpoints (weights, optimizer, random states) and the released weights of experiments are the same."""
    first, *others = (launcher.logs / name / "checkpoints" for name in names)
    whole = read_checkpoint(first / f"epoch_{EPOCHS}.pt")
    assert whole["step"] > 0 and whole["optimizer"]["state"]
    for other in others:
        resumed = read_checkpoint(other / f"epoch_{EPOCHS}.pt")
        for key in ("state_dict", "optimizer", "random_states", "step", "epoch"):
            assert same(whole[key], resumed[key]), key
        a, b = (torch.load(f / "clipself.pt", weights_only=True)["state_dict"] for f in (first, other))
        assert same(a, b)


def kill_soon(run, launcher, rng: random.Random, victim=None) -> bool:
    """Kill a run a random moment after one to four new checkpoints. False when it has ended by itself before.

    A step and its save take some 50 ms here, so that the moment falls now into a save, now between two of them.
    """
    seen = newest(launcher)
    saves, before = rng.randint(1, 4), len(seen)
    while len(seen) - before < saves:
        if run.process.poll() is not None:
            return False
        seen |= newest(launcher)
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.1))
    if run.process.poll() is not None:
        return False
    if victim is None:
        run.kill()
    else:
        os.kill(victim(), signal.SIGKILL)
    return True


@pytest.mark.parametrize("workers", [0, 1])
def test_killed_at_random_moments(launcher, workers):
    rng = random.Random(workers)
    common = {**STEPS, "workers": workers, "train": ("grid_distill", "proposals_distill")[workers]}
    whole = launcher.start("--lock-image", name="whole", **common)
    kills, unfinished, reached = 0, 0, []
    while kills < KILLS:
        run = launcher.start("--lock-image", name="run", resume="latest", **common)
        if kills % 8 == 7:  # once in a while before it has got anywhere
            time.sleep(rng.uniform(0.5, 6))
            assert run.process.poll() is None, run.text[-3000:]
            run.kill()
        else:
            assert kill_soon(run, launcher, rng), f"ended after {kills} kills at {reached}: {run.text[-3000:]}"
        kills += 1
        folder = launcher.logs / "run/checkpoints"
        unfinished += bool(list(folder.glob(".*.pt.*")))
        reached.append(launcher.steps())
    assert len(set(reached)) > KILLS / 2, reached
    print(f"\n{kills} kills, {unfinished} of them within a save, at epoch * 1000 + step {reached}")
    run = launcher.start("--lock-image", name="run", resume="latest", **common)
    assert run.wait() == 0, run.text[-3000:]
    assert whole.wait() == 0, whole.text[-3000:]
    check_equal(launcher, "whole", "run")
    assert not list(folder.glob(".*")), "what a killed save leaves behind is removed"


COMPARE = """
import sys, torch, torch.distributed as dist
import training.trainer as t
original = t.Trainer._save
def check(self, name):
    flat = torch.cat([p.detach().flatten() for p in self.student.parameters()])
    others = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(others, flat)
    assert torch.equal(others[0], others[1])
    print("weights are identical on both processes", flush=True)
    original(self, name)
t.Trainer._save = check
from training.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_two_processes_killed_at_random_moments(launcher, tmp_path):
    """All processes at once, as when a machine fails, or one of them, whose partner must not wait for ever."""
    rng = random.Random(2)
    script = tmp_path / "compare.py"
    script.write_text(COMPARE)
    common = {**STEPS, "batch_size": 1, "workers": 0, "processes": 2, "dist_timeout": 60, "script": script}
    whole = launcher.start("--lock-image", name="whole", **common)
    assert whole.wait() == 0, whole.text[-3000:]
    assert whole.text.count("weights are identical") > 2 * EPOCHS * 11
    for kill in range(KILLS_OF_TWO):
        run = launcher.start("--lock-image", name="run", resume="latest", **common)
        rank = rng.randrange(2)
        victim = (lambda run=run, rank=rank: run.ranks()[rank]) if kill % 2 else None
        assert kill_soon(run, launcher, rng, victim), run.text[-3000:]
        if victim is not None:
            begin = time.monotonic()
            assert run.wait(100) != 0
            assert not run.descendants() and time.monotonic() - begin < 60 + 30
    run = launcher.start("--lock-image", name="run", resume="latest", **common)
    assert run.wait() == 0, run.text[-3000:]
    assert "weights are identical" in run.text
    check_equal(launcher, "whole", "run")
