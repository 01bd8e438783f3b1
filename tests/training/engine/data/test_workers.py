"""Loader workers: what a signal at any moment of their start does, and batches that do not fit into shared memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import training.engine.data.workers as workers
from training.engine.errors import UserError

SRC, TESTS = Path(__file__).parents[4] / "src", Path(__file__).parents[1]
ROUNDS = """
import os, random, shutil, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from test_loop import Line, train
from training.engine.checkpoint import find_latest
from training.engine.data.workers import Loader
from training.engine.errors import EXIT_INTERRUPTED

class Loaded(Line):
    def batches(self, epoch, start):
        loader = Loader(list(range(start, 10)), workers=2, persistent_workers=False, batch_size=None)
        # To the whole group, as a terminal and a scheduler do, while the workers are being born.
        threading.Timer(rng.uniform(0, 0.03), os.killpg, (0, rng.choice(numbers))).start()
        made = {{batch["image_ids"][0] % 100: batch for batch in super().batches(epoch, 0)}}
        for i in loader:
            time.sleep(0.002)
            yield made[int(i)]

rng, numbers = random.Random(0), (signal.SIGTERM, signal.SIGINT)
folder = Path({folder!r})
for number in range({rounds}):
    status = train(Loaded(), folder, epochs=1000)
    assert status == EXIT_INTERRUPTED, (number, status)
    assert find_latest(folder / "checkpoints")[1]["step"] >= 1
    shutil.rmtree(folder)
print("all saved")
"""


@pytest.mark.parametrize("rounds", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_a_signal_at_worker_start_saves(tmp_path, rounds):
    """A worker that dies of it would end the run with an error, and what was trained would be lost."""
    code = ROUNDS.format(tests=str(TESTS), folder=str(tmp_path / "run"), rounds=rounds)
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=600,
        start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("all saved\n"), (done.returncode, done.stderr[-3000:])


def test_signals_wait_until_the_workers_are_there():
    """What a loader's iteration begins with is done with signals held back; afterwards they arrive."""
    received, blocked = [], []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(1))

    class Dataset(list):
        def __getitem__(self, index):
            return index, list(signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    try:
        loader = workers.Loader(Dataset(range(4)), workers=1, batch_size=None, collate_fn=lambda value: value)
        original = workers.held_back
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [1]
        with original():
            os.kill(os.getpid(), signal.SIGTERM)
            blocked = list(iter(loader))  # another thread of this process may take the signal meanwhile: no matter
        assert received == [1, 1]
        assert [index for index, _ in blocked] == [0, 1, 2, 3] and not any(mask for _, mask in blocked)
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.signal(signal.SIGTERM, before)


def test_batches_that_do_not_fit_into_shared_memory_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "_SHARED_MEMORY", tmp_path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * 2**30))
    workers.check_shared_memory(100 * 2**20, workers=4, flags="--workers")  # 4 x 5 x 100 MB
    workers.check_shared_memory(2**40, workers=0, flags="--workers")
    with pytest.raises(UserError, match="200 MB from 4 loader workers need 3.9 GB .* 2.0 GB free: lower --workers"):
        workers.check_shared_memory(200 * 2**20, workers=4, flags="--workers")
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20))
    with pytest.raises(UserError, match="20 MB from 1 loader workers need 100 MB of shared memory, .* 64 MB free"):
        workers.check_shared_memory(20 * 2**20, workers=1, flags="--workers")
    workers.check_shared_memory(20 * 2**20, workers=1, in_all=3, flags="--workers")  # there are no more in an epoch


def test_training_processes_of_a_machine_share_its_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    check = partial(workers.check_shared_memory, 20 * 2**20, workers=4, flags="--workers")
    check(world_size=2)  # 2 x 4 x 5 x 20 MB = 800 MB
    with pytest.raises(UserError, match="from 16 loader workers need 1.6 GB .* 1.0 GB free"):
        check(world_size=16)  # of which 4 are here
    check(world_size=16, in_all=10)
