"""The demonstration and the benchmark run from their command lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import open_clip

ROOT = Path(__file__).resolve().parents[2]


def environment(folder: Path) -> Path:
    """A virtual environment for the scripts that is this interpreter, marked as filled."""
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    state = subprocess.check_output("cat setup.py requirements.txt | cksum", shell=True, text=True, cwd=ROOT).strip()
    (folder / ".installed-fvit").write_text(f"{ROOT} {state}\n")
    return folder


def test_rows_of_choices_are_compared_on_their_own_seeds(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "F-ViT" / "scripts"))
    import demo_runs

    def scores(value: float) -> dict[str, float]:
        return dict.fromkeys(demo_runs.COLUMNS, value)

    rows = [demo_runs.Row("clipself", "CLIPSelf model", seeds=(0, 1)), demo_runs.Row("decay", "no decay")]
    results = {"clipself": {0: scores(0.5), 1: scores(0.3)}, "decay": {0: scores(0.475)}}
    lines = demo_runs.table(results, rows).splitlines()
    assert lines[2] == "| CLIPSelf model | " + " | ".join(["40.0 ± 14.1"] * 3) + " |"
    assert lines[3] == "| no decay | " + " | ".join(["47.5 (-2.5)"] * 3) + " |"


@pytest.mark.slow
def test_demonstration_runs(tmp_path: Path):
    torch.manual_seed(0)
    state = open_clip.create_model("ViT-Ti-8-64").state_dict()
    for name in ("start", "clipself"):
        file = tmp_path / "quickstart" / "logs" / name / "checkpoints" / "clipself.pt"
        file.parent.mkdir(parents=True)
        torch.save({"state_dict": state}, file)
    names = {"CLIPSELF_VENV": environment(tmp_path / "venv"), "QUICKSTART": tmp_path / "quickstart",
             "OUT": tmp_path / "out", "HOME": tmp_path}  # fmt: skip
    result = subprocess.run(
        ["bash", str(ROOT / "F-ViT" / "scripts" / "demo.sh"), "--smoke"],
        env={**os.environ, **{k: str(v) for k, v in names.items()}},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    table = (tmp_path / "out" / "result.md").read_text()
    assert table in result.stdout and "| start model |" in table and "| CLIPSelf model |" in table
    assert table.count("\n") == 2 + 4
    for name in ("start_0", "clipself_0", "former_0", "refined_0"):
        metrics = json.loads((tmp_path / "out" / name / "test" / "metrics.json").read_text())["bbox"]
        assert {"AP50", "AP50_base", "AP50_novel"} <= set(metrics)
    assert not (tmp_path / "out" / "refined_0" / "latest.pt").exists()  # it only tests
    base = json.loads((tmp_path / "out" / "data" / "annotations" / "instances_train2017_base.json").read_text())
    split = json.loads((tmp_path / "out" / "data" / "annotations" / "split.json").read_text())
    assert len(split["novel"]) == 3 and {c["name"] for c in base["categories"]} == set(split["base"])


@pytest.mark.slow
def test_benchmark_runs(tmp_path: Path):
    tiny = ["model.name=ViT-Ti-8-64", "model.blocks=[1, 2, 3]", "model.channels=16", "model.box_width=32"]
    tiny += ["model.roi_samples=16", "model.rpn_post_nms=20"]
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "detector.py"), *tiny, "--image-size", "64", "--steps", "2",
         "--images", "4", "--device", "cpu", "--data", str(tmp_path), "--part", "stages", "test", "masks", "waits",
         "memory"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    line = json.loads(result.stdout.strip().splitlines()[-1])
    assert line["stages"]["step"]["ratio"] > 0 and line["test"]["images_per_s"] > 0
    assert line["masks"]["identical"] > 0.99 and line["waits"]["ours"] <= 5 < line["waits"]["plain"]
    assert 0 < line["memory"]["frozen_gb"] < line["memory"]["trained_gb"]
