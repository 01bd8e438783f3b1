"""Memory of a program, measured by itself."""

from __future__ import annotations

import subprocess
import sys

import torch

from training.engine.memory import peak_memory

CODE = "from training.engine.memory import peak_memory; print(peak_memory())"


def test_a_programs_peak_is_its_own_and_grows_with_it():
    held = torch.ones(300_000_000, dtype=torch.uint8)  # of the parent, alive while the child starts
    before = peak_memory()
    child = int(subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout)
    assert child < before - len(held) / 2, "a child is charged with what its parent takes"
    more = torch.ones(before, dtype=torch.uint8)
    assert peak_memory() >= before + len(more) / 2
