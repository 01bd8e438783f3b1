"""Tags, sizes of the models they belong to, and files from a local hub cache."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import open_clip
from open_clip.factory import build_model
from open_clip.pretrained import download, list_pretrained, list_pretrained_tags_by_model, pretrained_info

# Millions of parameters as published by EVA-CLIP; OpenCLIP's names are in test_upstream_surface.py.
SIZES = {
    "EVA01-CLIP-g-14": 1136.44, "EVA02-CLIP-B-16": 149.69, "EVA02-CLIP-L-14": 427.76, "EVA02-CLIP-L-14-336": 428.08,
    "EVA02-CLIP-bigE-14": 4704.59,
}  # fmt: skip
REPO = "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k"


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    with torch.device("meta"):
        model = build_model(open_clip.get_model_config(name))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(SIZES[name], abs=0.006)
    assert list_pretrained_tags_by_model(name)


def test_tags():
    pairs = list_pretrained()
    assert pairs == open_clip.list_pretrained() and len(set(pairs)) == len(pairs)
    assert {model for model, _ in pairs} <= set(open_clip.list_models())
    assert pretrained_info("EVA02-CLIP-B-16", "merged2b_s8b_b131k").repo == REPO
    assert (
        pretrained_info("EVA02-CLIP-L-14-336", "merged2b_s6b_b61k").repo
        == "timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k"
    )
    for model in ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336"):
        assert pretrained_info(model, "openai") == pretrained_info(f"{model}-quickgelu", "openai")
        assert pretrained_info(model, "openai").quick_gelu
    inception = [pair for pair in pairs if pretrained_info(*pair).mean is not None]
    assert inception == [("ViT-L-14", "laion2b_s32b_b82k")]  # unlike its siblings; other models say it in their config
    assert open_clip.get_pretrained_cfg(*inception[0])["mean"] == (0.5, 0.5, 0.5)
    assert open_clip.get_pretrained_cfg("ViT-B/16", "openai")["std"] == open_clip.OPENAI_DATASET_STD
    assert open_clip.get_pretrained_cfg("ViT-L-14-CLIPA", "datacomp1b")["interpolation"] == "bilinear"
    assert open_clip.get_pretrained_cfg("PE-Core-B-16", "meta")["resize_mode"] == "squash"
    assert open_clip.get_pretrained_cfg("ViT-H-14", "dfn5b")["resize_mode"] == "squash"
    assert open_clip.get_pretrained_cfg("ViT-H-14", "nosuch") == {} and open_clip.get_pretrained_url("x", "y") == ""
    with pytest.raises(ValueError, match="its tags are merged2b_s8b_b131k$"):
        pretrained_info("EVA02-CLIP-B-16", "openai")
    with pytest.raises(ValueError, match="its tags are none$"):
        download("ViT-Ti-8-64", "openai")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache: Path, repo: str, filename: str, source: Path, linked: bool = True) -> Path:
    """Lay a file in a hub cache as the hub does: content under its hash, a link under its name."""
    root = cache / f"models--{repo.replace('/', '--')}"
    target = root / "snapshots" / "0123abc" / filename
    target.parent.mkdir(parents=True)
    if linked:
        blob = root / "blobs" / hashlib.sha256(source.read_bytes()).hexdigest()
        blob.parent.mkdir()
        blob.write_bytes(source.read_bytes())
        target.symlink_to(blob)
    else:
        target.write_bytes(source.read_bytes())
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0123abc")
    return target


@pytest.mark.parametrize("filename", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("linked", [True, False])
def test_file_of_a_cache(cache, tmp_path, filename, linked):
    source = tmp_path / "weights"
    source.write_bytes(b"content")
    expected = put(cache, REPO, filename, source, linked)
    assert download("EVA02-CLIP-B-16", "merged2b_s8b_b131k", cache) == expected


def test_damaged_file_is_refused(cache, tmp_path):
    source = tmp_path / "weights"
    source.write_bytes(b"content")
    put(cache, REPO, "open_clip_model.safetensors", source).resolve().write_bytes(b"contemt")
    with pytest.raises(RuntimeError, match="is damaged: its SHA-256 is not .*delete it"):
        download("EVA02-CLIP-B-16", "merged2b_s8b_b131k", cache)


def test_missing_file_says_what_to_fetch(cache):
    with pytest.raises(FileNotFoundError) as error:
        open_clip.create_model("EVA02-CLIP-B-16", "merged2b_s8b_b131k", cache_dir=cache)
    message = str(error.value)
    assert REPO in message and "open_clip_model.safetensors" in message and "pretrained=FILE" in message
    assert 'pretrained="eva", cache_dir=FILE' in message and "\n" not in message


def test_create_model_by_tag(cache, tmp_path, monkeypatch):
    """Weights and pixel normalisation of a tag reach the model."""
    small = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    config = {"embed_dim": 16, "vision_cfg": small, "text_cfg": {"width": 16, "heads": 2, "layers": 1}}
    monkeypatch.setitem(open_clip.configs._configs, "ViT-L-14", config)
    torch.manual_seed(1)
    state = build_model(config).state_dict()
    save_file(state, tmp_path / "weights")
    put(cache, "laion/CLIP-ViT-L-14-laion2B-s32B-b82K", "open_clip_model.safetensors", tmp_path / "weights")
    model = open_clip.create_model("ViT-L-14", "laion2b_s32b_b82k", cache_dir=cache)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert tuple(model.visual.image_mean) == tuple(model.visual.image_std) == (0.5, 0.5, 0.5)
    put(cache, "timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors", tmp_path / "weights")
    openai = open_clip.create_model("ViT-L/14", "openai", cache_dir=cache)
    assert tuple(openai.visual.image_mean) == open_clip.OPENAI_DATASET_MEAN
    assert "QuickGELU" in repr(openai.visual.trunk.blocks) and "QuickGELU" in repr(openai.text)
    # The recipes name EVA's file as cache_dir: with a tag it is no folder of downloads, nor is "" the working folder.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(cache))
    for place in (tmp_path / "EVA02.pt", ""):
        again = open_clip.create_model("ViT-L-14", "laion2b_s32b_b82k", cache_dir=place)
        assert torch.equal(again.text.ln_final.weight, model.text.ln_final.weight)


def test_download_by_what_is_known_of_a_tag(cache, tmp_path, monkeypatch):
    source = tmp_path / "weights"
    source.write_bytes(b"content")
    expected = put(cache, REPO, "open_clip_model.safetensors", source)
    cfg = open_clip.get_pretrained_cfg("EVA02-B-16", "merged2b_s8b_b131k")
    assert open_clip.download_pretrained(cfg, cache_dir=cache) == str(expected)
    assert open_clip.download_pretrained({"file": "here.pt"}) == "here.pt" and open_clip.download_pretrained({}) == ""
    digest = hashlib.sha256(b"content").hexdigest()
    fetched = []

    def fetch(url: str, target: str) -> None:
        fetched.append(url)
        Path(target).write_bytes(b"content" if "good" in url else b"contemt")

    monkeypatch.setattr("torch.hub.download_url_to_file", fetch)
    for _ in range(2):  # the second time it is there
        path = open_clip.download_pretrained_from_url(f"https://x.org/{digest}/good.pt", tmp_path / "files")
    assert Path(path).read_bytes() == b"content" and len(fetched) == 1
    with pytest.raises(RuntimeError, match="is damaged: its SHA-256 is not"):
        open_clip.download_pretrained({"url": f"https://x.org/{digest}/bad.pt"}, cache_dir=tmp_path / "files")
