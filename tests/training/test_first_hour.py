"""What a newcomer does first: a folder of pictures, a dry run, a look at where the model is."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from PIL import Image

from training.engine.data.folder import folder_annotations, image_names
from training.engine.errors import UserError
from training.engine.journal import Journal


@pytest.fixture
def pictures(tmp_path):
    """Five photographs in two folders, beside things that are none."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    for name in ("b.jpg", "a.JPG", "holiday/1.png", "holiday/2.webp", "holiday/deep/3.jpeg"):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(file)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.jpg").write_bytes(b"no picture either")
    return folder


def test_a_folder_of_images_is_training_data(program, pictures, tmp_path, capsys):
    assert image_names(pictures) == ["a.JPG", "b.jpg", "holiday/1.png", "holiday/2.webp", "holiday/deep/3.jpeg"]
    annotations = folder_annotations(pictures, "--train-data")
    assert len(annotations) == 5 and annotations.file_name(2) == "holiday/1.png" and len(annotations.boxes) == 0
    assert program(name="own", train_data=pictures, train_image_root="", epochs=1, dataset_type="grid_distill") == 0
    log = (tmp_path / "logs" / "own" / "out.log").read_text()
    assert "5 images" in log and "the model is" in log and "clipself.pt" in log


def test_a_folder_without_images_is_refused(program, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert program(name="own", train_data=tmp_path / "empty", train_image_root="") == 2
    assert "no image below this folder" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()
    with pytest.raises(UserError, match="--x .*empty"):
        folder_annotations(tmp_path / "empty", "--x")


def test_a_dry_run_says_what_the_run_takes_and_writes_nothing(program, tmp_path, capsys):
    assert program("--dry-run", name="dry", epochs=3) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line.split()}
    assert {"time", "memory", "disk"} <= lines.keys()
    assert "2 checkpoints" in lines["disk"] and " steps of " in lines["time"]
    assert not (tmp_path / "logs").exists()


def test_scalars_go_where_they_are_asked_to(tmp_path, monkeypatch):
    seen = []
    run = types.SimpleNamespace(log=lambda values, step: seen.append((step, values)), finish=lambda: seen.append("end"))
    begun = {}
    fake = types.SimpleNamespace(init=lambda **settings: begun.update(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    journal = Journal(tmp_path, report_to="wandb")
    journal.scalars({"train/loss": 0.5}, 3)
    journal.close()
    assert seen == [(3, {"train/loss": 0.5}), "end"] and begun["name"] == tmp_path.name
    assert not (tmp_path / "tensorboard").exists()
    Journal(tmp_path, report_to="none").scalars({"x": 1.0}, 1)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Journal(tmp_path, report_to="wandb")


@pytest.mark.parametrize("flags", [{}, {"val": True, "train_data": "", "train_image_root": ""}])
def test_a_report_that_cannot_be_is_said_before_anything_is_written(program, monkeypatch, capsys, flags):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert program(name="run", report_to="wandb", **flags) == 2
    assert "--report-to wandb: wandb is not installed" in capsys.readouterr().err
    assert not program.logs.exists()


def test_a_folder_of_images_is_its_own_root(program, pictures, tmp_path):
    """A recipe gives the root of COCO's images; the folder that is given after it counts."""
    assert program(name="own", train_data=pictures, train_image_root=tmp_path, epochs=1) == 0
    assert "skipped" not in (tmp_path / "logs" / "own" / "out.log").read_text()
