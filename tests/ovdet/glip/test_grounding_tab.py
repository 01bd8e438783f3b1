"""The grounding tab of the page: what its button computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from ovdet.glip import files
from ovdet.glip.model import GLIP
from training.engine.errors import UserError


@pytest.fixture(scope="module")
def tab(as_module) -> ModuleType:
    return as_module("tools/grounding_tab.py")


def test_captions_and_names_are_found(tab: ModuleType, tiny: Callable[..., GLIP], config_of_tiny, tmp_path: Path):
    config = config_of_tiny()
    config.data.test_size, config.data.longest, config.train.precision = 64, 128, "fp32"
    torch.save(files.content_of(tiny(seed=3), config), tmp_path / "tiny.pt")
    grounder = tab.open_grounder(str(tmp_path / "tiny.pt"), None, torch.device("cpu"))
    image = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    picture, table = tab.ground(grounder, image, "a red ball near the small dog", "", False, 0.02)
    assert picture.shape[1] == 640 and picture.shape[0] > 384 and "a red ball" in table
    picture, table = tab.ground(grounder, image, "dog, <b>cat</b>", "", True, 0.02)
    assert picture.shape[:2] == (384, 640) and "&lt;b&gt;cat" in table and "<b>" not in table
    _, table = tab.ground(grounder, image, "a red ball near the dog", "dog", False, 0.99)
    assert "Nothing reaches" in table
    for values, message in (
        ((None, "dog", "", True, 0.1), "upload one first"),
        ((image, " ", "", False, 0.1), "no text"),
        ((image, "a dog", "cat", False, 0.1), "does not stand in the caption"),
        ((np.zeros((1, 4001, 3), np.uint8), "dog", "", True, 0.1), "up to 4000"),
    ):
        with pytest.raises(UserError, match=message):
            tab.ground(grounder, *values)


@pytest.mark.slow
def test_in_a_headless_browser(in_browser: Callable, tiny: Callable[..., GLIP], config_of_tiny, tmp_path: Path):
    """Upload, a caption, the picture and its table; names with a strange one; a mistake."""
    import open_clip

    config = config_of_tiny()
    config.data.test_size, config.data.longest, config.train.precision = 64, 128, "fp32"
    torch.save(files.content_of(tiny(seed=3), config), tmp_path / "tiny.pt")
    torch.save(open_clip.create_model("ViT-Ti-8-64").state_dict(), tmp_path / "weights.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    clip, glip = str(tmp_path / "weights.pt"), str(tmp_path / "tiny.pt")
    with in_browser("--model", "ViT-Ti-8-64", "--pretrained", clip, "--glip", glip) as page:
        page.get_by_role("tab", name="Grounding").click()
        page.set_input_files("#grounding_photograph input[type=file]", str(tmp_path / "photo.png"))
        page.wait_for_selector("#grounding_photograph img", timeout=60_000)
        page.fill("#grounding_text textarea", "a red ball near the small dog")
        page.get_by_label("Smallest score").first.fill("0.02")
        page.click("#find")
        page.wait_for_selector("#grounded img", timeout=120_000)
        page.wait_for_selector("td:has-text('a red ball')", timeout=60_000)
        page.get_by_label("These are names, not a caption").check()
        page.fill("#grounding_text textarea", "dog, <b>cat</b>")
        page.click("#find")
        page.wait_for_selector("td:has-text('<b>cat</b>')", timeout=60_000)
        page.fill("#grounding_text textarea", "")
        page.click("#find")
        page.wait_for_selector("text=no text", timeout=60_000)
