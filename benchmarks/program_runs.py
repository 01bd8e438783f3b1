"""The project's programs, run by benches with flags that some rows replace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]
from training.engine.data.keyed import check_key, write_key  # noqa: E402
from training.engine.errors import UserError  # noqa: E402


def claim_folder(out: Path, settings: Mapping[str, Any]) -> None:
    """Make a bench's folder, or see that what it holds was made with these settings: complete runs are not repeated.

    Raises:
        SystemExit: it was made with others, or for something else.
    """
    key = json.loads(json.dumps(settings, default=str))
    try:
        check_key(out, key, f"--out {out}")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    write_key(out, key)


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
