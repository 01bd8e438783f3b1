"""The picture of a dense class map, and the map itself on an image whose classes are known."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

FILE = Path(__file__).parents[2] / "tools" / "show_dense_map.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("show_dense_map", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Colours(nn.Module):
    """Dense embedding: the mean colour of each 8 x 8 patch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.visual = SimpleNamespace(image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))

    def encode_dense(self, image, keep_shape=False):
        return F.normalize(F.avg_pool2d(image, 8), dim=1)


def test_the_map_lies_on_the_image(tool):
    """A wide image in four colours: padding and rounding must not shift the map."""
    image = torch.zeros(3, 50, 110, dtype=torch.uint8)
    image[0, :25], image[1, 25:], image[2, :, 55:] = 255, 255, 255
    colours = F.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 1], [0, 1, 1]]), dim=1)
    classes = tool.dense_class_map(Colours(), image, colours, 64)
    assert classes.shape == (50, 110)
    for label, (y, x) in enumerate([(6, 12), (43, 12), (6, 98), (43, 98)]):
        assert (classes[max(y - 6, 0) : y + 6, x - 12 : x + 11] == label).all()


def test_picture_of_a_golden_model(tool, golden, tmp_path, capsys):
    weights, image = golden / "eva" / "weights.safetensors", golden / "data" / "images" / "000_rgb.jpg"
    if not weights.is_file() or not image.is_file():
        pytest.skip("golden model or image not there")
    np.save(tmp_path / "classes.npy", np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32))
    arguments = ["--model", str(golden / "eva" / "config.json"), "--pretrained", str(weights), "", "--size", "128"]
    arguments += ["--image", str(image), "--embed-path", str(tmp_path / "classes.npy"), "--device", "cpu"]
    output = ["--output", str(tmp_path / "folder" / "map.png")]
    assert tool.main([*arguments, "--classes", "cat", "dog", "sky", *output]) == 0
    assert Image.open(tmp_path / "folder" / "map.png").size[0] > 1000
    assert tool.main([*arguments, "--classes", "cat", *output]) == 2
    assert "(3, 32)" in capsys.readouterr().err
    assert tool.main([*arguments, "--classes", "cat", "dog", "sky", "--size", "100", *output]) == 2
    assert "patch size 16" in capsys.readouterr().err
