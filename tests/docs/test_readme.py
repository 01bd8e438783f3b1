"""The README's table of models agrees with the configs and the tags."""

from __future__ import annotations

import re
from pathlib import Path

import timm

import open_clip

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| `([\w-]+)` \| (\d+) \| (\d+) \| (\d+) \| (.*) \|$", re.M)


def test_models_have_the_sizes_and_tags_of_the_table():
    rows = ROW.findall((ROOT / "README.md").read_text(encoding="utf-8").partition("## Models")[2])
    assert len(rows) > 10
    for name, patch, size, width, tags in rows:
        config = open_clip.get_model_config(name)
        vision = config["vision_cfg"]
        trunk = vision.get("timm_model_name")
        # timm names the patch, and its configs hold no number of it.
        own = int(re.search(r"patch(\d+)", trunk)[1]) if trunk else vision["patch_size"]
        assert not trunk or timm.is_model(trunk), name
        assert [own, vision["image_size"], config["embed_dim"]] == [int(patch), int(size), int(width)], name
        assert set(re.findall(r"`(\w+)`", tags)) <= set(open_clip.list_pretrained_tags_by_model(name)), name
