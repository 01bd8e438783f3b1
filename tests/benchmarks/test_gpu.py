"""The one command for a GPU, tried on the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import gpu  # noqa: E402


def test_results_are_written_after_every_stage_and_failures_are_named(tmp_path, monkeypatch, capsys):
    seen = []

    def good(run):
        """Works."""
        return {"images_per_s": 5.0}

    def bad(run):
        """Fails."""
        seen.append(json.loads((tmp_path / "out.json").read_text()))
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "STAGES", (good, bad, good))
    assert gpu.main(["--device", "cpu", "--smoke", "--out", str(tmp_path / "out.json")]) == 1
    assert seen[0]["good"]["images_per_s"] == 5.0
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["bad"] == {"status": "failed", "why": "no such kernel", "seconds": results["bad"]["seconds"]}
    assert "no such kernel" in capsys.readouterr().out


def test_stages_without_time_are_left_out(tmp_path, capsys):
    assert gpu.main(["--device", "cpu", "--smoke", "--minutes", "0.01", "--only", "environment"]) == 1
    assert "no time left" in capsys.readouterr().out


def test_a_command_that_fails_or_hangs_says_so(tmp_path):
    run = gpu.Run("cpu", True, tmp_path, None, deadline=float("inf"))
    with pytest.raises(RuntimeError, match="exit 3: gone"):
        run.command("-c", "print('gone'); raise SystemExit(3)", limit=60)
    with pytest.raises(RuntimeError, match="stopped after 1 s"):
        run.command("-c", "import time; time.sleep(30)", limit=1)


@pytest.mark.slow
def test_every_stage_runs_on_the_cpu(capsys):
    assert gpu.main(["--device", "cpu", "--smoke", "--minutes", "15"]) == 0, capsys.readouterr().out
