"""A signal to the process group while loader workers are being born never ends a run but with status 75, and saved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = """
import importlib.util, os, random, shutil, signal, sys, threading
from pathlib import Path
conftest, name, scenes, setup, place, rounds = sys.argv[1:]
spec = importlib.util.spec_from_file_location("described", conftest)
described = importlib.util.module_from_spec(spec)
spec.loader.exec_module(described)
from training.engine.checkpoint import find_latest
from training.engine.data.workers import Loader
from training.engine.errors import EXIT_INTERRUPTED

rng, original = random.Random(0), Loader.__iter__

def iterate(loader):
    # To the whole group, as a terminal and a scheduler do.
    number = rng.choice((signal.SIGTERM, signal.SIGINT))
    threading.Timer(rng.uniform(0, 0.05), os.killpg, (0, number)).start()
    return original(loader)

Loader.__iter__ = iterate
program = described.PROGRAMS[name](Path(scenes), Path(setup), Path(place))
for number in range(int(rounds)):
    status = program("run", workers=2, epochs=1000, log_every=1)
    assert status == EXIT_INTERRUPTED, (number, status)
    assert find_latest(program.folder("run") / "checkpoints")[1]["step"] >= 1
    shutil.rmtree(program.folder("run"))
print("all saved")
"""


@pytest.mark.parametrize("rounds", [2, pytest.param(200, marks=pytest.mark.slow)])
def test_a_signal_at_worker_start_saves(program, tmp_path, rounds):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    where = (program.name, str(program.scenes), str(program.setup), str(tmp_path), str(rounds))
    done = subprocess.run(
        [sys.executable, "-c", ROUNDS, str(Path(__file__).with_name("conftest.py")), *where], env=environment,
        capture_output=True, text=True, timeout=3000, start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("all saved\n"), (done.returncode, done.stderr[-3000:])
