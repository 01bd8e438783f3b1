"""The photograph story, from a folder and class names to pictures, with a tiny random model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "real_photos.sh"
TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 48, "head_width": 12, "patch_size": 8, "mlp_ratio": 2.6667,
                   "eva_model_name": "tiny", "rope": True, "naiveswiglu": True, "subln": True},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 1},
}  # fmt: skip


def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """The script, from another folder than the clone."""
    environment = {
        **os.environ, "PYTHON": sys.executable, "HOME": str(folder), "OMP_NUM_THREADS": "1", "DEVICE": "cpu",
        "CUDA_VISIBLE_DEVICES": "", **environment,
    }  # fmt: skip
    environment.pop("CLIPSELF_VENV", None)
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_photographs_in_pictures_out(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("one.jpg", "holiday/two.png", "holiday/three.jpg", "four.BMP", ".hidden.jpg"):
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(file)
    (tmp_path / "tiny-photos.json").write_text(json.dumps(TINY))
    small = {"MODEL": str(tmp_path / "tiny-photos.json"), "PRETRAINED": "", "STEPS": "2", "SIZE": "64", "OUT": "out"}
    done = run("photos", "dog", "traffic light", folder=tmp_path, **small)
    assert done.returncode == 0, done.stderr[-3000:]
    pictures = sorted(p.relative_to(tmp_path / "out" / "pictures") for p in (tmp_path / "out/pictures").rglob("*.png"))
    assert [p.name for p in pictures] == ["four.png", "one.png", "three.png", "two.png"]
    assert (tmp_path / "out" / "distilled" / "checkpoints" / "clipself.pt").is_file()
    width, height = Image.open(tmp_path / "out" / "pictures" / pictures[0]).size
    assert width > height > 300  # two rows of panels
    assert "4 images" in (tmp_path / "out" / "distilled" / "out.log").read_text()  # drawn is what was trained on
    # A second run does not write over the first.
    again = run("photos", folder=tmp_path, **small)
    assert again.returncode == 2 and "exists" in again.stderr


def test_mistakes_are_one_line(tmp_path):
    (tmp_path / "photos").mkdir()
    for arguments, environment, message in [
        (["nowhere"], {}, "is no folder"),
        ([], {}, "usage:"),
        (["photos"], {"MODEL": "EVA02-CLIP-B16"}, "did you mean"),
        (["photos"], {}, "no image below this folder"),
        (["photos"], {"SHOW": "0"}, "SHOW"),
    ]:
        done = run(*arguments, folder=tmp_path, OUT="out", **environment)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()
