"""``--drop-padding`` in the program: it trains and evaluates without padding, and the released weights say so."""

from __future__ import annotations

import json

import pytest
import torch

import open_clip
from training.data.collate import Collate
from training.methods.base import RegionMethod
from training.scenes.generate import main as generate


@pytest.fixture
def wide(program, tmp_path):
    """The program on scenes that are not square."""
    folder = tmp_path / "wide"
    generate(["--out", str(folder), "--train", "12", "--val", "4", "--size", "64", "--things", "8", "--stuff", "3",
              "--min-aspect", "0.5", "--max-aspect", "0.8"])  # fmt: skip
    program.scenes = folder
    return program


def record(program, name: str) -> dict:
    return json.loads((program.logs / name / "results.json").read_text())[-1]


def test_training_evaluation_and_release(wide, capsys):
    flags = {"val": True, "epochs": 1, "alpha": 0.7, "max_boxes": 4}
    assert wide("--drop-padding", name="without", **flags) == 0
    assert wide(name="with", **flags) == 0
    own, other = record(wide, "without"), record(wide, "with")
    assert own["drop_padding"] is True and "drop_padding" not in other
    released = wide.logs / "without" / "checkpoints" / "clipself.pt"
    model = open_clip.create_model(str(wide.config.stem), pretrained=str(released))
    assert model.visual.drop_padding
    # Evaluated again, without the flag: the weights know it. So does a checkpoint, of which alpha makes the ensemble.
    for name, weights in (("again", released), ("checkpoint", wide.logs / "without" / "checkpoints" / "epoch_1.pt")):
        assert wide("--train-data", "", name=name, val=True, pretrained=weights) == 0
        again = record(wide, name)
        assert again["drop_padding"] is True
        assert again["rois.thing.macc5"] == pytest.approx(own["rois.thing.macc5"], abs=1e-6)
    # Other calls of it differ: padding takes part there.
    image, sizes = torch.randn(1, 3, 64, 64), [(40, 64)]
    dropped = model.encode_dense(image, sizes=sizes)
    model.visual.set_drop_padding(False)
    assert (model.encode_dense(image, sizes=sizes) - dropped)[:, :40].abs().max() > 1e-3


def test_what_does_not_go_together_is_refused(program, capsys):
    assert program("--drop-padding", name="a", epochs=1, max_steps=4) == 0
    assert program(name="a", epochs=2, resume="latest") == 2
    assert "--drop-padding was True, now it is False" in capsys.readouterr().err
    assert program("--drop-padding", "--fsdp", name="b") == 2
    assert "--drop-padding does not go with --fsdp" in capsys.readouterr().err


@pytest.mark.parametrize("crop_on", ["worker", "device"])
def test_sizes_of_a_batch(crop_on):
    """Of the pictures, and of their boxes, which may lie beyond them."""
    picture = (3, 100, 200) if crop_on == "device" else (3, 32, 64)
    samples = [{"image": torch.zeros(picture, dtype=torch.uint8), "boxes": torch.tensor([[0.1, 0.1, 0.9, 0.6]]),
                "image_id": 1, "index": 0}]  # fmt: skip
    batch = Collate(image_size=64, crop_size=8, crop_on=crop_on)(samples)
    assert batch["sizes"] == [(32, 64)] and batch["reach"] == [(39, 64)]


def test_multiscale_scales_the_sizes():
    batch = {"images": torch.zeros(1, 3, 64, 64), "sizes": [(33, 64)], "reach": [(40, 64)]}
    student = type("S", (), {"visual": type("V", (), {"drop_padding": True})()})()
    made = type("M", (), {"student": student, "multiscale": True, "size": 24, "sizes": RegionMethod.sizes})()
    assert made.sizes(batch) == [(13, 24)]
    student.visual.drop_padding = False
    assert made.sizes(batch) == [(15, 24)]
