"""A small generated dataset and a tiny model, for tests of the whole program."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from training.main import main

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 48, "head_width": 12, "patch_size": 8, "mlp_ratio": 2.6667,
                   "eva_model_name": "tiny", "rope": True, "naiveswiglu": True, "subln": True},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 1},
}  # fmt: skip


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Folder of drawn scenes in COCO's layout: 24 for training, 6 for validation, and image-text pairs."""
    from training.scenes.generate import main as generate

    folder = tmp_path_factory.mktemp("scenes")
    generate(["--out", str(folder), "--train", "24", "--val", "6", "--pairs", "6", "--size", "64", "--things", "8",
              "--stuff", "3", "--novel", "2"])  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory) -> Path:
    """Config file of a model that trains in milliseconds."""
    file = tmp_path_factory.mktemp("model") / "tiny-eva.json"
    file.write_text(json.dumps(TINY))
    return file


class Program:
    """Runs ``training.main`` with the tiny model on the scenes."""

    def __init__(self, scenes: Path, config: Path, logs: Path) -> None:
        self.scenes, self.config, self.logs = scenes, config, logs

    def arguments(self, *extra: str, train: str = "grid_distill", val: bool = False, **flags) -> list[str]:
        data = self.scenes / "annotations"
        values = {
            "model": self.config, "dataset-type": train, "det-image-size": 64, "batch-size": 2, "epochs": 2, "lr": 1e-3,
            "warmup": 2, "workers": 0, "logs": self.logs, "max-split": 3, "max-boxes": 6, "log-every-n-steps": 4,
            "device": "cpu", "train-data": data / "instances_train2017.json",
            "train-image-root": self.scenes / "train2017",
        }  # fmt: skip
        if train == "contrastive":
            values |= {"train-data": data / "captions_train2017.json"}
        if val:
            values |= {"val-data": data / "panoptic_val2017.json", "val-image-root": self.scenes / "val2017"}
        values |= {k.replace("_", "-"): v for k, v in flags.items()}
        return [*(part for k, v in values.items() for part in (f"--{k}={v}",)), *extra]

    def __call__(self, *extra: str, **kwargs) -> int:
        return main(self.arguments(*extra, **kwargs))


@pytest.fixture
def program(scenes, tiny_config, tmp_path, monkeypatch) -> Program:
    """The program, with its logs and caches in the test's own folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RANK", raising=False)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return Program(scenes, tiny_config, tmp_path / "logs")
