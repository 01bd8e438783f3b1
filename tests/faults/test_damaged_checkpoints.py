"""Truncated and altered files: loaded exactly, or refused by name in one line. Never wrong weights."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import open_clip
from open_clip.weights import load_state_dict_file, load_weights
from training.class_embeddings import load_class_embeddings
from training.engine.checkpoint import find_latest, read_checkpoint, save_atomically
from training.engine.errors import UserError

COUNT = 50  # of truncations, and of altered bytes


@pytest.fixture(scope="module")
def trained(scenes, tiny_config, tmp_path_factory) -> Path:
    """The checkpoint folder of a real run; not to be written to."""
    from training.main import main

    logs = tmp_path_factory.mktemp("trained")
    data = scenes / "annotations/instances_train2017.json"
    flags = {"model": tiny_config, "train-data": data, "train-image-root": scenes / "train2017", "det-image-size": 64,
             "batch-size": 2, "epochs": 1, "workers": 0, "device": "cpu", "logs": logs, "name": "run", "max-steps": 4,
             "max-boxes": 6, "max-split": 3, "alpha": 0.7}  # fmt: skip
    assert main([f"--{k}={v}" for k, v in flags.items()]) == 0
    return logs / "run/checkpoints"


def damages(good: bytes, seed: int) -> list[tuple[str, bytes]]:
    """Truncations and single altered bytes. Half of the bytes are among headers and pickles, which are a small part."""
    rng = np.random.default_rng(seed)
    cut = [int(n) for n in rng.integers(0, len(good), COUNT)]
    # Places where something other than weights is: near every zip header, and in the directory at the end.
    headers = [i for i in range(len(good) - 4) if good[i : i + 2] == b"PK"]
    near = [min(int(rng.choice(headers) + rng.integers(0, 80)), len(good) - 1) for _ in range(COUNT)]
    found = [(f"cut at {n}", good[:n]) for n in cut]
    for place in [*rng.integers(0, len(good), COUNT).tolist(), *near]:
        changed = bytearray(good)
        changed[place] ^= int(rng.integers(1, 256))
        found.append((f"byte {place}", bytes(changed)))
    return found


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


CONTENT = {"epoch", "step_in_epoch", "step", "name", "state_dict", "optimizer", "random_states", "start_hash", "args",
           "versions"}  # fmt: skip


def test_what_is_kept_and_what_is_in_it(program):
    flags = {"epochs": 4, "batch_size": 6, "save_every_n_steps": 2, "keep_checkpoints": 2, "warmup": 1}
    assert program("--save-most-recent", name="run", **flags) == 0
    folder = program.logs / "run/checkpoints"
    assert sorted(f.name for f in folder.iterdir()) == ["clipself.pt", "epoch_3.pt", "epoch_4.pt", "epoch_latest.pt"]
    last, latest, before = (read_checkpoint(folder / f"epoch_{name}.pt") for name in ("4", "latest", "3"))
    assert CONTENT <= last.keys() and last["args"]["keep_checkpoints"] == 2 and last["versions"]["torch"]
    assert {"python", "numpy", "torch"} <= last["random_states"][0].keys()
    assert same(last, latest) and (before["epoch"], before["step"], last["step"]) == (3, 12, 16)


def test_damaged_training_checkpoints(trained, tmp_path):
    good_file = trained / "epoch_1.pt"
    expected, path = read_checkpoint(good_file), tmp_path / "epoch_1.pt"
    outcomes = Counter()
    for what, content in damages(good_file.read_bytes(), seed=0):
        path.write_bytes(content)
        try:
            loaded = read_checkpoint(path)
        except UserError as error:
            assert str(path) in str(error) and "damaged" in str(error) and "\n" not in str(error), what
            outcomes["refused"] += 1
        else:
            assert same(loaded, expected), what
            outcomes["loaded"] += 1
    assert outcomes["refused"] >= 2 * COUNT, outcomes


def test_damaged_released_weights(trained, tmp_path):
    good_file = trained / "clipself.pt"
    expected = load_state_dict_file(good_file)
    path, outcomes = tmp_path / "clipself.pt", Counter()
    for what, content in damages(good_file.read_bytes(), seed=1):
        path.write_bytes(content)
        try:
            loaded = load_state_dict_file(path)
        except RuntimeError as error:
            assert str(path) in str(error) and "\n" not in str(error), what
            outcomes["refused"] += 1
        else:
            assert same(loaded, expected), what
            outcomes["loaded"] += 1
    assert outcomes["refused"] >= 2 * COUNT, outcomes


def test_damaged_safetensors(trained, tmp_path):
    """The format has no checksum of the weights; a wrong length and a wrong header are refused."""
    state = torch.load(trained / "clipself.pt", weights_only=True)["state_dict"]
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
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


def test_resume_latest_passes_over_damaged_checkpoints(trained, tmp_path, caplog):
    good = (trained / "epoch_1.pt").read_bytes()
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


def test_all_checkpoints_damaged_starts_from_the_beginning(trained, program):
    folder = program.logs / "run/checkpoints"
    shutil.copytree(trained, folder)
    (folder / "epoch_1.pt").write_bytes(b"nothing")
    assert program(name="run", resume="latest", epochs=1, max_steps=4, alpha=0.7, warmup=10000, lr=1e-5) == 0
    text = (program.logs / "run/out.log").read_text()
    assert "epoch_1.pt is damaged" in text and "starts from the beginning" in text
    assert read_checkpoint(folder / "epoch_1.pt")["step"] == 4


class RunsCode:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_pickles_that_run_code_are_refused(tmp_path, program, capsys):
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
    assert program(name="run", resume=tmp_path / "zip.pt") == 2
    assert program(name="other", pretrained=tmp_path / "zip.pt") == 2
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
