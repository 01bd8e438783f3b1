"""The grounding tab of the page: what its button computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

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
