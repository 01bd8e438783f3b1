"""Truncated and altered files: loaded exactly, or refused by name in one line. Never wrong weights."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import open_clip
from open_clip.weights import load_weights
from training.class_embeddings import load_class_embeddings
from training.engine.checkpoint import find_latest, read_checkpoint, save_atomically
from training.engine.errors import UserError

COUNT = 50  # of truncations, and of altered bytes


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory) -> Callable:
    """Gives a program whose run "run" has ended after four steps; its files are not to be written to."""
    made = {}

    def train(name: str):
        if name not in made:
            made[name] = prepared(name, tmp_path_factory.mktemp(f"trained_{name}"))
            assert made[name]("run", epochs=1, max_steps=4) == 0
        return made[name]

    return train


def damages(good: bytes, seed: int, count: int) -> list[tuple[str, bytes]]:
    """Truncations and single altered bytes. Half of the bytes are among headers and pickles, which are a small part."""
    rng = np.random.default_rng(seed)
    cut = [int(n) for n in rng.integers(0, len(good), count)]
    # Places where something other than weights is: near every zip header, and in the directory at the end.
    headers = [i for i in range(len(good) - 4) if good[i : i + 2] == b"PK"]
    near = [min(int(rng.choice(headers) + rng.integers(0, 80)), len(good) - 1) for _ in range(count)]
    found = [(f"cut at {n}", good[:n]) for n in cut]
    for place in [*rng.integers(0, len(good), count).tolist(), *near]:
        changed = bytearray(good)
        changed[place] ^= int(rng.integers(1, 256))
        found.append((f"byte {place}", bytes(changed)))
    return found


CONTENT = {"epoch", "step_in_epoch", "step", "state_dict", "optimizer", "random_states", "identity", "args", "versions"}


def test_what_is_kept_and_what_is_in_it(program, same):
    flags = {"epochs": 4, "batch_size": 6, "save_every": 2}
    latest = ["--save-most-recent"] if program.name == "clipself" else []
    assert program("run", *latest, **flags) == 0
    folder = program.folder("run") / "checkpoints"
    kept = {"epoch_3.pt", "epoch_4.pt", *(["epoch_latest.pt", "clipself.pt"] if latest else [])}
    assert {f.name for f in folder.iterdir()} == kept and (program.folder("run") / program.release).is_file()
    last, before = (program.last("run", epoch) for epoch in (4, 3))
    assert CONTENT <= last.keys() and last["versions"]["torch"]
    assert {"python", "numpy", "torch"} <= last["random_states"][0].keys()
    assert (before["epoch"], before["step"], last["step"]) == (3, 12, 16)
    if latest:
        latest = read_checkpoint(folder / "epoch_latest.pt")
        assert latest.pop("written") >= last.pop("written")
        assert same(last, latest) and last["args"]["keep_checkpoints"] == 2


@pytest.mark.parametrize("count", [10, pytest.param(COUNT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["checkpoint", "release"])
def test_damaged_files_of_a_run(program, trained, same, tmp_path, what, count):
    """Those to go on from, and those for users."""
    program = trained(program.name)
    file, read = {
        "checkpoint": (program.checkpoints("run")[-1], read_checkpoint),
        "release": (program.folder("run") / program.release, program.read_release),
    }[what]
    expected, path, outcomes = read(file), tmp_path / file.name, Counter()
    for damage, content in damages(file.read_bytes(), seed=len(what), count=count):
        path.write_bytes(content)
        try:
            loaded = read(path)
        except (UserError, RuntimeError) as error:
            assert str(path) in str(error) and "\n" not in str(error), damage
            assert what == "release" or "damaged" in str(error), damage
            outcomes["refused"] += 1
        else:
            assert same(loaded, expected), damage
            outcomes["loaded"] += 1
    assert outcomes["refused"] >= 2 * count, outcomes


def test_damaged_safetensors(trained, same, tiny_config, tmp_path):
    """The format has no checksum of the weights; a wrong length and a wrong header are refused."""
    program = trained("clipself")
    state = torch.load(program.folder("run") / program.release, weights_only=True)["state_dict"]
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    open_clip.add_model_config(tiny_config)
    model = open_clip.create_model("tiny-eva", pretrained=path)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    names = {entry["data_offsets"][0] for entry in json.loads(good[8:header]).values()}
    assert len(names) == len(state)
    rng, refused = np.random.default_rng(2), 0
    contents = [good[: int(n)] for n in rng.integers(0, len(good), COUNT)]
    for place in rng.integers(0, header, COUNT):
        changed = bytearray(good)
        changed[place] ^= int(rng.integers(1, 256))
        contents.append(bytes(changed))
    for content in contents:
        path.write_bytes(content)
        try:
            load_weights(model, path)
        except (RuntimeError, ValueError) as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert same(dict(model.state_dict()), expected)
    assert refused >= 2 * COUNT - 5


def test_resume_latest_passes_over_damaged_checkpoints(program, trained, tmp_path, caplog):
    good = trained(program.name).checkpoints("run")[-1].read_bytes()
    for number, content in enumerate([good, good[: len(good) // 2], b"", good[:-1]]):
        (tmp_path / f"epoch_0_step_{number}.pt").write_bytes(content)
    (tmp_path / "epoch_0_step_9.pt").mkdir()
    (tmp_path / ".epoch_0_step_5.pt.123").write_bytes(good[:1000])  # a save that was killed
    with caplog.at_level(logging.WARNING):
        path, _ = find_latest(tmp_path)
    assert path.name == "epoch_0_step_0.pt"
    assert all(f"epoch_0_step_{n}.pt is damaged" in caplog.text for n in (1, 2, 3)), caplog.text
    path.unlink()
    assert find_latest(tmp_path) is None


def test_all_checkpoints_damaged_starts_from_the_beginning(program, trained, same):
    shutil.copytree(trained(program.name).folder("run"), program.folder("run"))
    file = program.folder("run") / "checkpoints" / "epoch_1.pt"
    file.write_bytes(b"nothing")
    assert program("run", resume=True, epochs=1, max_steps=4) == 0
    text = program.text("run")
    assert "epoch_1.pt is damaged" in text and "starts from the beginning" in text
    assert same(read_checkpoint(file)["state_dict"], trained(program.name).last("run", 1)["state_dict"])


def test_a_lost_release_of_a_run_that_has_ended_is_written_again(program, trained, same):
    """As when the last save is broken off before it."""
    shutil.copytree(trained(program.name).folder("run"), program.folder("run"))
    release = program.folder("run") / program.release
    before = program.read_release(release)
    release.unlink()
    assert program("run", resume=True, epochs=1, max_steps=4) == 0
    assert same(program.read_release(release)[program.key], before[program.key])


class RunsCode:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_pickles_that_run_code_are_refused(tmp_path, distillation, capsys):
    marker = tmp_path / "code_ran"
    evil = RunsCode(marker)
    checkpoint = {"epoch": 1, "step": 1, "state_dict": {}, "optimizer": {}, "random_states": [evil]}
    torch.save(checkpoint, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(checkpoint))
    torch.save(checkpoint, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    np.save(tmp_path / "embeddings.npy", np.array([evil], dtype=object), allow_pickle=True)
    torch.save({"cat": evil}, tmp_path / "embeddings.pt")
    for name in ("zip.pt", "plain.pt", "old.pt"):
        with pytest.raises(UserError, match=f"{name} is damaged"):
            read_checkpoint(tmp_path / name)
        with pytest.raises(RuntimeError, match=f"{name} cannot be loaded"):
            open_clip.create_model("ViT-Ti-8-64", pretrained=tmp_path / name)
    for name in ("embeddings.npy", "embeddings.pt"):
        with pytest.raises(UserError, match=f"{name}: not readable"):
            load_class_embeddings(tmp_path / name, ["cat"], 24)
    assert distillation(name="run", resume=tmp_path / "zip.pt") == 2
    assert distillation(name="other", pretrained=tmp_path / "zip.pt") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 2 and "holds a Python object (getattr)" in errors[1]
    assert not marker.exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes())
    assert marker.exists(), "the files do hold code"


def test_a_save_over_a_good_checkpoint_is_all_or_nothing(tmp_path):
    path = tmp_path / "epoch_1.pt"
    save_atomically({"epoch": 1, "step": 1, "state_dict": {}, "optimizer": {}}, path)
    with pytest.raises(AttributeError):  # not a failure of the disk: shown as it is
        save_atomically({"epoch": 2, "function": lambda: 0}, path)
    assert read_checkpoint(path)["epoch"] == 1 and [f.name for f in tmp_path.iterdir()] == ["epoch_1.pt"]
