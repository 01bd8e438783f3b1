"""The embedding tool: what it reads, writes and refuses; and the class names that come with the project."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import open_clip
from open_clip.prompts import class_embeddings
from training.class_embeddings import load_class_embeddings

ROOT = Path(__file__).parents[2]
COCO_STYLE = {"categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "traffic light"}]}


@pytest.fixture(scope="module")
def tool(as_module) -> ModuleType:
    return as_module("tools/generate_text_embeddings.py")


@pytest.fixture
def run(tool, tmp_path):
    """Runs the tool for a tiny model on a names file of the given content; gives (status, output path)."""

    def call(content, out: str, *args: str, file: str = "names.json") -> tuple[int, Path]:
        names = tmp_path / file
        if isinstance(content, bytes):
            names.write_bytes(content)
        else:
            names.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        torch.manual_seed(0)
        arguments = ["--model", "ViT-Ti-8-64", "--classes-from", str(names), "--out", str(tmp_path / out)]
        return tool.main([*arguments, "--device", "cpu", *args]), tmp_path / out

    return call


def test_array_and_dict(run, capsys):
    """Rows in the order of the ids, equal to those of the library; the training program reads both forms."""
    status, array = run(COCO_STYLE, "new folder/e.npy")
    assert status == 0 and "2 classes, 128 dimensions" in capsys.readouterr().out
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-Ti-8-64").eval()
    names = ["traffic light", "dog"]
    expected = class_embeddings(model, open_clip.get_tokenizer("ViT-Ti-8-64"), names)
    rows = np.load(array)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-6)
    status, mapping = run(COCO_STYLE, "e.pt", "--background")
    content = torch.load(mapping, weights_only=True)
    assert status == 0 and list(content) == ["traffic light", "dog", "background"]
    for file in (array, mapping):
        torch.testing.assert_close(load_class_embeddings(file, names, 128), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "file"), [(["a", "b"], "n.json"), ("a\n\n  b \n", "n.txt"), (COCO_STYLE["categories"], "n.json")]
)
def test_kinds_of_name_files(tool, tmp_path, content, file):
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    assert tool.read_names(tmp_path / file) in (["a", "b"], ["traffic light", "dog"])


@pytest.mark.parametrize(
    ("content", "file", "out", "message"),
    [
        ([], "n.json", "e.npy", "holds no class names"),
        ({"categories": [{"id": 1}]}, "n.json", "e.npy", "holds no class names"),
        ([{"id": 1, "name": "a"}, {"id": "2", "name": "b"}], "n.json", "e.npy", "holds no class names"),
        (["a", " "], "n.json", "e.npy", "holds no class names"),
        ("{", "n.json", "e.npy", "is not json"),
        (b"caf\xe9", "n.txt", "e.npy", "is no text in UTF-8"),
        (["a", "b", "a"], "n.json", "e.pt", 'the name "a" stands there more than once'),
    ],
)
def test_refused_names(run, capsys, content, file, out, message):
    status, path = run(content, out, file=file)
    error = capsys.readouterr().err
    assert status == 2 and message in error and file in error and error.count("\n") == 1
    assert not path.exists()


def test_refused_flags(run, capsys):
    for flags, message in {
        ("--model", "ViT-Ti-8"): 'model "ViT-Ti-8" is unknown',
        ("--pretrained", "openai"): "its tags are none",
        ("--classes-from", "nowhere.json"): "nowhere.json",
        ("--names", "dog,cat"): "names themselves go to --classes",
    }.items():
        status, path = run(["a"], "e.npy", *flags)
        error = capsys.readouterr().err
        assert status == 2 and message in error and error.count("\n") == 1 and not path.exists()
    for flags in (("--batch-size", "0"), ("--out", "e.txt")):
        status, path = run(["a"], "e.npy", *flags)
        assert status == 2 and capsys.readouterr().err.count("\n") == 1 and not path.exists()


def test_class_names_of_the_project(tool):
    names = {file.stem: tool.read_names(file) for file in (ROOT / "metadata").glob("*.json")}
    assert {stem: len(set(values)) for stem, values in names.items()} == {
        "coco_80": 80, "coco_panoptic": 133, "lvis_v1_all_1203": 1203, "lvis_v1_novel_rare_337": 337,
        "objects365_v1": 365, "ov_coco_all_65": 65, "ov_coco_base_48": 48, "ov_coco_novel_17": 17, "voc_20": 20,
    }  # fmt: skip
    assert set(names["ov_coco_base_48"]) ^ set(names["ov_coco_novel_17"]) == set(names["ov_coco_all_65"])
    assert set(names["lvis_v1_novel_rare_337"]) < set(names["lvis_v1_all_1203"])
    assert names["coco_panoptic"][:80] == names["coco_80"]
