"""The project's programs, run by benches with flags that some rows replace."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_python(arguments: Sequence[object], threads: int | None = 1) -> None:
    """Run Python with so many threads (None: as it likes), and stop with its last words when it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_WAIT_POLICY": "passive"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, cwd=ROOT, text=True, capture_output=True
    )
    if done.returncode:
        raise SystemExit(f"error: {' '.join(map(str, arguments))}\n{(done.stderr or done.stdout)[-2000:]}")


def without(flags: Sequence[object], given: set[str]) -> list[object]:
    """Flags with their values, but for those that are given otherwise."""
    kept, skipping = [], False
    for part in flags:
        if str(part).startswith("--"):
            skipping = part in given
        if not skipping:
            kept.append(part)
    return kept
