"""The converter's command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ovdet.config import format_config
from ovdet.glip.model import GLIP
from training.engine.errors import UserError


@pytest.fixture(scope="module")
def tool(as_module) -> ModuleType:
    return as_module("tools/convert_glip.py")


def test_round_trip_through_all_layouts(tool: ModuleType, tiny: Callable[..., GLIP], config_of_tiny, tmp_path: Path):
    model, config = tiny(seed=4), tmp_path / "tiny.toml"
    config.write_text(format_config(config_of_tiny()))
    torch.save({"model": {}, "model_ema": model.state_dict()}, tmp_path / "start.pt")
    chain = ["start.pt", "a.pth", "b.pth", "c.pt"]
    for source, target, layout in zip(chain, chain[1:], ("glip", "mmdet", "own"), strict=False):
        flags = ["--ema"] if source == "start.pt" else []
        args = [str(tmp_path / source), str(tmp_path / target), "--config", str(config), "--layout", layout, *flags]
        assert tool.main(args) == 0
    state = torch.load(tmp_path / "c.pt", weights_only=True)["model"]
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    names = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    assert all(name.startswith("module.") for name in names) and "module.rpn.head.bias0" in names


def test_nothing_is_written_where_something_is_wrong(
    tool: ModuleType, tiny: Callable[..., GLIP], config_of_tiny, tmp_path: Path
):
    config, source, target = tmp_path / "tiny.toml", tmp_path / "source.pt", tmp_path / "target.pt"
    config.write_text(format_config(config_of_tiny(blocks=1)))
    torch.save({"model": tiny().state_dict()}, source)
    for args, words in (
        ([str(source), str(target)], "has unknown head.blocks.1"),
        ([str(source), str(source)], "exists"),
        ([str(source), str(tmp_path / "nowhere" / "x.pt")], "does not exist"),
        ([str(source), str(target), "--ema"], "no averaged weights"),
        ([str(source), str(target), "text.vocabulary=/nowhere/vocab.txt"], "/nowhere/vocab.txt does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            tool.main([*args, "--config", str(config)])
        assert not target.exists()
