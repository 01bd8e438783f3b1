"""The ensemble of two files, and training checkpoints that are loaded as their run would have released them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

import open_clip
from open_clip.weight_files import load_state_dict_file, save_weights
from training.engine.checkpoint import read_checkpoint

ROOT = Path(__file__).parents[2]
TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 48, "head_width": 12, "patch_size": 8, "mlp_ratio": 2.6667,
                   "eva_model_name": "tiny", "rope": True, "naiveswiglu": True, "subln": True},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def tool(as_module) -> ModuleType:
    return as_module("tools/ensemble_weights.py")


@pytest.fixture
def files(tmp_path) -> Path:
    """A folder with a model's config and two files of its weights."""
    (tmp_path / "tiny-pair.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path / "tiny-pair.json", "tiny-pair")
    for seed, name in enumerate(("student.pt", "start.safetensors")):
        torch.manual_seed(seed)
        model = open_clip.create_model("tiny-pair", pretrained=None)
        save_weights(open_clip.weights.export_state_dict(model), tmp_path / name, "tiny-pair")
    return tmp_path


@pytest.mark.parametrize("target", ["mixed.pt", "mixed.safetensors"])
def test_two_files_and_alpha(tool, files, target):
    arguments = [str(files / n) for n in ("student.pt", "start.safetensors", target)]
    assert tool.main([*arguments, "--model", str(files / "tiny-pair.json"), "--alpha", "0.7"]) == 0
    student, start, mixed = (load_state_dict_file(Path(a)) for a in arguments)
    assert mixed.keys() == student.keys() == start.keys()
    for name, value in mixed.items():
        expected = 0.7 * student[name].double() + 0.3 * start[name].double()
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("readout", ["csa", "gated:2"])
def test_a_student_with_a_reading_of_its_own(tool, files, readout):
    model = open_clip.create_model("tiny-pair", files / "student.pt")
    model.visual.set_readout(readout)
    for parameter in model.visual.readout.parameters():
        parameter.data.fill_(0.5)
    save_weights(open_clip.weights.export_state_dict(model), files / "read.pt", "tiny-pair")
    arguments = [str(files / n) for n in ("read.pt", "start.safetensors", "mixed.pt")]
    assert tool.main([*arguments, "--model", str(files / "tiny-pair.json"), "--alpha", "0.75"]) == 0
    mixed = open_clip.create_model("tiny-pair", files / "mixed.pt")
    assert mixed.visual.readout.name == readout  # the gate of the start model is at its start, 0
    assert all((p == 0.375).all() for p in mixed.visual.readout.parameters())


def test_a_training_checkpoint_is_loaded_as_its_ensemble(tool, files, tmp_path, monkeypatch):
    """C4: epoch_N.pt holds the student; evaluated is what the run releases, or the ensemble of another --alpha."""
    from training.main import main
    from training.scenes.compose import SceneOptions
    from training.scenes.generate import write_dataset

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_dataset("scenes", train=4, val=2, options=SceneOptions(size=48, things=4, stuff=2))
    common = ["--model", "tiny-pair.json", "--device", "cpu", "--workers", "0", "--det-image-size", "64", "--val-data",
              "scenes/annotations/panoptic_val2017.json", "--val-image-root", "scenes/val2017"]  # fmt: skip
    train = ["--train-data", "scenes/annotations/instances_train2017.json", "--train-image-root", "scenes/train2017",
             "--pretrained", "start.safetensors", "--lr", "0.01", "--warmup", "1", "--epochs", "1"]  # fmt: skip
    assert main([*common, *train, "--name", "run", "--alpha", "0.5"]) == 0
    folder = Path("logs/run/checkpoints")

    def evaluated(name: str, file: str, *flags: str) -> dict:
        assert main([*common, "--name", name, "--pretrained", str(folder / file), *flags]) == 0
        (record,) = json.loads(Path(f"logs/{name}/results.json").read_text())
        return record

    def numbers(record: dict) -> dict:
        return {k: v for k, v in record.items() if "acc" in k}

    released, raw = evaluated("released", "clipself.pt"), evaluated("raw", "epoch_1.pt", "--alpha", "1")
    again = evaluated("again", "epoch_1.pt")
    assert again["kind"] == "ensemble" and again["alpha"] == 0.5 and numbers(again) == numbers(released)
    assert raw["kind"] == released["kind"] == "checkpoint" and "alpha" not in raw
    during = json.loads(Path("logs/run/results.json").read_text())
    assert [r["kind"] for r in during] == ["start", "ensemble"] and during[1]["alpha"] == 0.5
    assert numbers(during[1]) == numbers(released)
    # The tool makes the same of the two files.
    arguments = [str(folder / "epoch_1.pt"), "start.safetensors", "made.pt", "--model", "tiny-pair.json"]
    assert tool.main([*arguments, "--alpha", "0.5"]) == 0
    made, released_state = load_state_dict_file(Path("made.pt")), load_state_dict_file(folder / "clipself.pt")
    assert all(torch.equal(made[k], v) for k, v in released_state.items())
    # Without the start model nothing is guessed.
    assert read_checkpoint(folder / "epoch_1.pt")["args"]["alpha"] == 0.5
    Path("start.safetensors").rename("moved.safetensors")
    assert main([*common, "--name", "lost", "--pretrained", str(folder / "epoch_1.pt")]) == 2
    assert not Path("logs/lost").exists()
