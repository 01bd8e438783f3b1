"""The pictures of dense maps: titles that differ, queries, targets, and a whole run on a golden model."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from ovseg.options import short_names
from training.engine.errors import UserError
from training.engine.pictures import distinct_colours, overlay, principal_components, similarity_to

FILE = Path(__file__).parents[2] / "tools" / "show.py"


@pytest.fixture(scope="module")
def tool(as_module) -> ModuleType:
    return as_module("tools/show.py")


@pytest.mark.parametrize(
    "paths, names",
    [
        (["logs/a/checkpoints/clipself.pt", "logs/b/checkpoints/clipself.pt"], ["a", "b"]),
        (["x/epoch_1.pt", "x/epoch_2.pt"], ["epoch_1.pt", "epoch_2.pt"]),
        (["x/a.pt", "x/y/a.pt"], ["a.pt", "y/a.pt"]),
        (["logs/a/checkpoints/clipself.pt"], ["clipself.pt"]),
        (["", "logs/a.pt"], ["random weights", "a.pt"]),
        (["openai", "laion2b"], ["openai", "laion2b"]),
        (["/start/eva.pt", "logs/run/clipself.pt"], ["eva.pt", "clipself.pt"]),
    ],
)
def test_titles_differ(paths, names):
    assert short_names(paths) == names


def test_queries(tool):
    assert tool.parse_query("3,4") == (3, 4, 3, 4) and tool.parse_query("1,2,3.5,4") == (1, 2, 3.5, 4)
    for text in ("1", "a,b", "1,2,3", "3,1,2,4"):
        with pytest.raises(UserError, match="give a point"):
            tool.parse_query(text)
    assert tool.query_box((10, 5, 40, 30), 20, 20) == (0.5, 0.25, 1.0, 1.0)
    with pytest.raises(UserError, match="outside a photograph of 20 x 10"):
        tool.query_box((3, 10, 3, 10), 10, 20)


def test_similarity_is_that_of_the_cells_asked_for():
    dense = torch.eye(6).view(6, 2, 3)  # every cell its own direction
    assert torch.equal(similarity_to(dense, (0.4, 0.1, 0.4, 0.1)), torch.tensor([[0.0, 1, 0], [0, 0, 0]]))
    box = similarity_to(dense, (0.0, 0.5, 2 / 3, 1.0))
    torch.testing.assert_close(box, torch.tensor([[0, 0, 0], [0.5**0.5, 0.5**0.5, 0]]))
    assert similarity_to(dense, (0.99, 0.99, 0.99, 0.99))[1, 2] == 1


def test_components_separate_what_differs_most():
    dense = torch.zeros(4, 4, 6)
    dense[0, :, :2], dense[1, :, 2:] = 1.0, 1.0
    first = principal_components(dense)[0]
    assert first[:, :2].unique().tolist() == [1.0] and first[:, 2:].unique().tolist() == [0.0]  # the rarer is bright
    assert torch.equal(principal_components(torch.ones(2, 1, 1)), torch.full((3, 1, 1), 0.5))


def test_overlay_leaves_pixels_without_a_class():
    image = np.full((1, 2, 3), 100, np.uint8)
    mixed = overlay(image, np.asarray([[0, 255]]), np.asarray([[200, 0, 0]], np.uint8), 0.5)
    assert mixed.tolist() == [[[150, 50, 50], [100, 100, 100]]]
    assert len({tuple(c) for c in distinct_colours(171)}) == 171


def test_pictures_of_a_golden_model(tool, golden, tmp_path, capsys):
    folder, image = golden / "vit_quickgelu", min((golden / "data" / "images").glob("*rgb.jpg"))
    config = json.loads((folder / "config.json").read_text())
    width, short = config["embed_dim"], str(4 * config["vision_cfg"]["patch_size"])
    words = np.random.default_rng(0).normal(size=(3, width)).astype(np.float32)
    weights = folder / "weights.safetensors"
    np.save(tmp_path / "words.npy", words)
    common = ["--model", str(folder / "config.json"), "--device", "cpu", "--embed-path", str(tmp_path / "words.npy")]
    common += ["--short-side", short, "--classes", "cat,dog", "sky"]
    output = ["--output", str(tmp_path / "out")]
    arguments = [str(image), *common, "--pretrained", str(weights), "", "--query", "5,5,40,40", *output]
    assert tool.main(arguments) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / f"{image.stem}.png")]
    assert Image.open(tmp_path / "out" / f"{image.stem}.png").size[0] > 1000

    assert tool.main([str(golden / "data" / "images"), *common, "--output", str(tmp_path / "one.png")]) == 2
    assert "name a folder" in capsys.readouterr().err
    for wrong, message in [
        ([str(image), *common, "--classes", "cat", "cat"], '"cat" is given 2 times'),
        ([str(image), *common, "--classes", "cat"], f"(3, {width})"),
        ([str(image), *common, "--pretrained", "a.pt", "a.pt"], "the same checkpoint twice"),
        ([str(tmp_path / "none"), *common], "no such file or folder"),
        (["", *common], "an empty word"),
        ([str(image), *common, "--query", "500000,3"], "outside a photograph"),
        ([str(image), *common, "--pretrained", str(image)], image.name),
    ]:
        assert tool.main([*wrong, *output]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
