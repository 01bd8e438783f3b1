"""The page: what its buttons compute, and the whole of it in a headless browser."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from training.engine.errors import UserError


@pytest.fixture(scope="module")
def tool(as_module) -> ModuleType:
    return as_module("tools/page.py")


@pytest.fixture()
def models(tool, tmp_path):
    args = tool.parse_args(["--model", "ViT-Ti-8-64", "--pretrained", "", "--device", "cpu"])
    return tool.Models(args, torch.device("cpu"), tmp_path)


def photograph(height=50, width=80):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_labels_legend_and_download(models):
    picture, text, path = models.label(
        photograph(), "cat|kitten, <b>dog</b>\nsky", "", "random weights", "naclip", "pd", 64
    )
    assert picture.shape == (50, 80, 3)
    assert "&lt;b&gt;dog" in text and "<b>dog" not in text and text.count("%") == 3
    labels = Image.open(path)
    assert labels.mode == "P" and labels.size == (80, 50) and np.asarray(labels).max() < 3
    _, text, _ = models.label(photograph(), "cat", "wall, floor", "random weights", "the model's own", "none", 64)
    assert "background" in text


def test_similarity_is_one_at_the_point_and_marked_there(models):
    shown = models.similarity(photograph(), 60, 30, "random weights", "value", 64)
    assert shown.shape == (50 * 8, 80 * 8, 3)
    assert (shown[30 * 8 + 4, 60 * 8 + 4] == 255).all()
    assert len(models._maps) == 1
    models.similarity(photograph(), 5, 5, "random weights", "value", 64)
    assert len(models._maps) == 1  # another point of the same map


def test_mistakes(tool, models, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="upload one first"):
        models.label(None, "cat", "", "random weights", "value", "none", 64)
    with pytest.raises(UserError, match="no class names"):
        models.label(photograph(), " , ", "", "random weights", "value", "none", 64)
    with pytest.raises(UserError, match="up to 4000"):
        models.label(np.zeros((1, 4001, 3), np.uint8), "cat", "", "random weights", "value", "none", 64)
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    with pytest.raises(UserError, match="quickstart.sh"):
        tool.make_models(tool.parse_args([]), tmp_path)
    with pytest.raises(UserError, match="needs weights"):
        tool.make_models(tool.parse_args(["--model", "ViT-B-16"]), tmp_path)
    assert tool.quickstart_classes().startswith("person")


@pytest.mark.slow
def test_in_a_headless_browser(in_browser: Callable, tmp_path):
    """Upload, class names, the result with its legend, the slider, a click, the download."""
    torch.manual_seed(0)
    import open_clip

    weights = tmp_path / "weights.pt"
    torch.save(open_clip.create_model("ViT-Ti-8-64").state_dict(), weights)
    Image.fromarray(photograph(120, 160)).save(tmp_path / "photo.png")
    with in_browser("--model", "ViT-Ti-8-64", "--pretrained", str(weights)) as page:
        page.set_input_files("#photograph input[type=file]", str(tmp_path / "photo.png"))
        page.wait_for_selector("#photograph img", timeout=60_000)
        page.fill("#classes textarea", "cat, dog, sky")
        page.click("#label")
        page.wait_for_selector("#legend", timeout=120_000)
        legend = page.inner_text("#legend")
        assert all(name in legend for name in ("cat", "dog", "sky"))
        page.wait_for_function("document.querySelectorAll('#slider img').length >= 2", timeout=60_000)
        with page.expect_download(timeout=60_000) as download:
            page.click("#download")
        labels = Image.open(download.value.path())
        assert labels.mode == "P" and labels.size == (160, 120)
        box = page.query_selector("#photograph img").bounding_box()
        page.mouse.click(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
        page.wait_for_selector("#heat img", timeout=60_000)
        page.fill("#classes textarea", "cat, cat")
        page.click("#label")
        page.wait_for_selector("text=is given 2 times", timeout=60_000)
