"""A run that is killed again and again ends with the weights of one that was left alone, bit by bit."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

EPOCHS = 9  # of 12 steps
RUN = {"epochs": EPOCHS, "save_every": 1}
OWN = {"clipself": ["--lock-image", "--lock-image-unlocked-groups=2", "--warmup=5"]}
KILLS, KILLS_OF_TWO = 24, 8


def newest(program, run: str = "run") -> set:
    found = set()
    for file in program.checkpoints(run):
        try:
            found.add((file.name, file.stat().st_mtime_ns))
        except FileNotFoundError:
            pass  # pruned meanwhile
    return found


def kill_soon(run, program, rng: random.Random, victim=None) -> bool:
    """Kill a run a random moment after one to four new checkpoints. False when it has ended by itself before.

    A step and its save take some 50 ms here, so that the moment falls now into a save, now between two of them.
    """
    seen = newest(program)
    saves, before = rng.randint(1, 4), len(seen)
    while len(seen) - before < saves:
        if run.process.poll() is not None:
            return False
        seen |= newest(program)
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.1))
    if run.process.poll() is not None:
        return False
    if victim is None:
        run.kill()
    else:
        os.kill(victim(), signal.SIGKILL)
    return True


def killed(launcher, kills: int, workers: int) -> tuple[int, list[int]]:
    """Kills a run so often, then lets it end, beside one that is left alone; checks that they are equal.

    Returns:
        Kills within a save, and where each kill found the run.
    """
    program, rng = launcher.program, random.Random(workers)
    own = [*OWN.get(program.name, []), *(["--dataset-type=proposals_distill"] if _proposals(program, workers) else [])]
    whole = launcher.start("whole", *own, workers=workers, **RUN)
    unfinished, reached = 0, []
    for kill in range(kills):
        run = launcher.start("run", *own, resume=True, workers=workers, **RUN)
        if kill % 8 == 7:  # once in a while before it has got anywhere
            time.sleep(rng.uniform(0.5, 6))
            assert run.process.poll() is None, run.text[-3000:]
            run.kill()
        else:
            assert kill_soon(run, program, rng), f"ended after {kill} kills at {reached}: {run.text[-3000:]}"
        unfinished += bool(list(program.folder("run").rglob(".*.pt.*")))
        reached.append(program.steps("run"))
    run = launcher.start("run", *own, resume=True, workers=workers, **RUN)
    assert run.wait(600) == 0, run.text[-3000:]
    assert whole.wait(600) == 0, whole.text[-3000:]
    program.check_equal(EPOCHS, "whole", "run")
    assert not list(program.folder("run").rglob(".*.pt.*")), "what a killed save leaves behind is removed"
    return unfinished, reached


def _proposals(program, workers: int) -> bool:
    return program.name == "clipself" and workers > 0


def test_two_kills(launcher, monkeypatch):
    """The short form."""
    monkeypatch.setitem(globals(), "EPOCHS", 2)
    monkeypatch.setitem(RUN, "epochs", 2)
    killed(launcher, 2, workers=1)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_killed_at_random_moments(launcher, workers):
    unfinished, reached = killed(launcher, KILLS, workers)
    assert len(set(reached)) > KILLS / 2, reached
    print(f"\n{KILLS} kills, {unfinished} of them within a save, at epoch * 1000 + step {reached}")


COMPARE = """
import runpy, sys, torch, torch.distributed as dist
from training.engine.saves import Saves
original = Saves.save
def check(self, name):
    flat = torch.cat([p.detach().flatten() for group in self.optimizer.param_groups for p in group["params"]])
    others = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(others, flat)
    assert torch.equal(others[0], others[1])
    print("weights are identical on both processes", flush=True)
    original(self, name)
Saves.save = check
del sys.argv[0]
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_two_processes_killed_at_random_moments(launcher, tmp_path):
    """All processes at once, as when a machine fails, or one of them, whose partner must not wait for ever."""
    program, rng, own = launcher.program, random.Random(2), OWN.get(launcher.program.name, [])
    script = tmp_path / "compare.py"
    script.write_text(COMPARE)
    common = {**RUN, "batch_size": 1, "processes": 2, "script": script}
    whole = launcher.start("whole", *own, **common)
    assert whole.wait(600) == 0, whole.text[-3000:]
    assert whole.text.count("weights are identical") > 2 * EPOCHS * 11
    for kill in range(KILLS_OF_TWO):
        run = launcher.start("run", *own, resume=True, **common)
        rank = rng.randrange(2)
        victim = (lambda run=run, rank=rank: run.ranks()[rank]) if kill % 2 else None
        assert kill_soon(run, program, rng, victim), run.text[-3000:]
        if victim is not None:
            begin = time.monotonic()
            assert run.wait(100) != 0
            assert not run.descendants() and time.monotonic() - begin < 60 + 30
    run = launcher.start("run", *own, resume=True, **common)
    assert run.wait(600) == 0, run.text[-3000:]
    assert "weights are identical" in run.text
    program.check_equal(EPOCHS, "whole", "run")
