"""Tokenizer, prompts, tags and the embedding tool, against recorded numbers."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import open_clip
from open_clip.pretrained import download, pretrained_info
from open_clip.prompts import PROMPT_TEMPLATES, average_prompts, class_embeddings, class_prompts, process_name
from open_clip.text_tower import TextTower, text_tower_from_config
from open_clip.tokenizer import SimpleTokenizer

ROOT = Path(__file__).parents[2]
TOKENIZER = SimpleTokenizer()


def test_vocabulary_is_the_published_one():
    content = (ROOT / "src/open_clip/bpe_simple_vocab_16e6.txt.gz").read_bytes()
    assert hashlib.sha256(content).hexdigest() == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    assert (TOKENIZER.vocab_size, TOKENIZER.sot_token_id, TOKENIZER.eot_token_id) == (49408, 49406, 49407)


def test_ids_equal_those_of_upstream():
    """Recorded from open_clip_torch 3.3.0: unicode, html entities, broken encodings, emoji, over-long words."""
    recorded = json.loads((Path(__file__).parent / "tokens.json").read_text(encoding="utf-8"))
    for text, ids in recorded:
        assert TOKENIZER.encode(text) == ids, text


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200), st.integers(2, 90))
def test_rows_are_well_formed(text, length):
    row = TOKENIZER(text, length)[0]
    end = int(row.argmax())
    assert row.shape == (length,) and row[0] == 49406 and row[end] == 49407 and not row[end + 1 :].any()
    full = [49406, *TOKENIZER.encode(text), 49407]
    assert row[: end + 1].tolist() == (full if len(full) <= length else [*full[: length - 1], 49407])


@given(st.lists(st.from_regex(r"[a-z]{1,12}", fullmatch=True), max_size=8))
def test_plain_words_survive_a_round_trip(words):
    assert TOKENIZER.decode(TOKENIZER.encode(" ".join(words))).split() == words


def test_prompts(golden):
    recorded = json.loads((golden / "prompts" / "prompts.json").read_text())
    assert len(PROMPT_TEMPLATES) == 63 and len(recorded) == 6
    for name, expected in recorded.items():
        assert class_prompts(name) == expected["prompts"]
        assert process_name(name) == expected["processed_rm_dot"]
        assert process_name(name, remove_dot=False) == expected["processed_keep_dot"]
    averaging = np.load(golden / "prompts" / "averaging.npz")
    actual = average_prompts(torch.from_numpy(averaging["per_prompt_raw"]))
    np.testing.assert_allclose(actual, averaging["class_embeddings"], atol=1e-6)


def test_class_embeddings_equal_one_prompt_at_a_time():
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-Ti-8-64").eval()
    tokenizer = open_clip.get_tokenizer("ViT-Ti-8-64")
    names = ["red circle", "orange/apple"]
    actual = class_embeddings(model, tokenizer, names, batch_size=50)
    with torch.no_grad():
        rows = [torch.stack([model.encode_text(tokenizer(p))[0] for p in class_prompts(n)]) for n in names]
    torch.testing.assert_close(actual, average_prompts(torch.stack(rows)), rtol=0, atol=1e-6)


def test_text_tower_schemas_and_errors():
    siglip = {"width": 32, "heads": 2, "layers": 1, "context_length": 8, "vocab_size": 50, "no_causal_mask": True,
              "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}, "hf_tokenizer_name": "x/y",
              "act_kwargs": {"approximate": "tanh"}}  # fmt: skip
    tower = text_tower_from_config(siglip, 16)
    assert tower(torch.randint(50, (3, 8))).shape == (3, 16) and not tower.causal
    with pytest.raises(ValueError, match="unknown keys colour"):
        text_tower_from_config({**siglip, "colour": 1}, 16)
    with pytest.raises(ValueError, match="9 tokens a text, but the model takes 8"):
        tower(torch.zeros(1, 9, dtype=torch.long))
    # A causal tower's embedding does not depend on what follows the end token.
    causal = TextTower(width=32, heads=2, layers=2, output_dim=16, context_length=8, vocab_size=50)
    tokens = torch.tensor([[1, 5, 49, 0, 0, 0, 0, 0], [1, 5, 49, 7, 8, 9, 3, 2]])
    first, second = causal(tokens)
    torch.testing.assert_close(first, second)


CONFIGS = {  # parameters in millions, of the image tower and in all, as published
    "EVA02-CLIP-B-16": (86, 149), "EVA02-CLIP-L-14": (304, 428), "EVA02-CLIP-L-14-336": (304, 428),
    "EVA02-CLIP-bigE-14": (4350, 4700), "EVA01-CLIP-g-14": (1010, 1136), "ViT-B-32": (88, 151), "ViT-B-16": (86, 150),
    "ViT-L-14": (304, 428), "ViT-L-14-336": (304, 428), "ViT-H-14": (632, 986), "ViT-B-16-SigLIP2-256": (93, 375),
    "ViT-L-16-SigLIP2-256": (316, 882),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_built_in_models_have_the_published_size(name):
    with torch.device("meta"):
        model = open_clip.factory.build_model(open_clip.get_model_config(name))
    image, total = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (model.visual, model))
    assert image == pytest.approx(CONFIGS[name][0], rel=0.012) and total == pytest.approx(CONFIGS[name][1], rel=0.012)


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-B-16-SigLIP2-256"])
def test_dense_and_region_calls_of_built_in_models(name):
    """The families beside EVA, whose tiny relatives the other tests use: small inputs, random weights."""
    config = open_clip.get_model_config(name)
    config["text_cfg"].update(layers=1, vocab_size=100)
    model = open_clip.factory.build_model(config).eval()
    patch = model.visual.patch_size
    with torch.no_grad():
        image = torch.randn(1, 3, 2 * patch, 3 * patch)
        dense = model.encode_dense(image)
        boxes = model.encode_pseudo_boxes(image, [torch.tensor([[0.0, 0.0, 1.0, 1.0]])], normalize=True)
    assert dense.shape == (1, model.embed_dim, 2, 3) and boxes.shape == (1, model.embed_dim)
    torch.testing.assert_close(dense.norm(dim=1), torch.ones(1, 2, 3))


def hub_cache(root: Path, repo: str, filename: str, content: bytes) -> None:
    """A hub cache with one downloaded file."""
    folder = root / f"models--{repo.replace('/', '--')}"
    for sub in ("blobs", "snapshots/abc", "refs"):
        (folder / sub).mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    (folder / "snapshots/abc" / filename).symlink_to(os.path.relpath(blob, folder / "snapshots/abc"))


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("filename", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_tags_are_read_from_the_hub_cache(tmp_path, offline, filename):
    repo = pretrained_info("EVA02-CLIP-B-16", "merged2b_s8b_b131k").repo
    assert repo == "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k"
    hub_cache(tmp_path, repo, filename, b"weights")
    path = download("EVA02-CLIP-B-16", "merged2b_s8b_b131k", cache_dir=tmp_path)
    assert path.read_bytes() == b"weights"
    path.resolve().write_bytes(b"changed")
    with pytest.raises(RuntimeError, match="is damaged"):
        download("EVA02-CLIP-B-16", "merged2b_s8b_b131k", cache_dir=tmp_path)


def test_offline_the_error_says_what_to_fetch(tmp_path, offline):
    with pytest.raises(FileNotFoundError) as error:
        open_clip.create_model("EVA02-CLIP-B-16", "merged2b_s8b_b131k", cache_dir=tmp_path)
    text = str(error.value)
    assert (
        "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k" in text and "pretrained=FILE" in text and "\n" not in text
    )
    with pytest.raises(ValueError, match="its tags are openai"):
        pretrained_info("ViT-L-14-336", "laion")
    assert ("ViT-B-16", "openai") in open_clip.list_pretrained()


def test_openai_weights_choose_quick_gelu(tmp_path, offline):
    """Users of the published code report wrong results with OpenAI's weights: the activation was the reason."""
    config = {"embed_dim": 8, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
              "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}}  # fmt: skip
    info = pretrained_info("ViT-B-16", "openai")
    assert info.quick_gelu and not pretrained_info("ViT-B-16", "laion2b_s34b_b88k").quick_gelu
    from open_clip.factory import _weights_file, build_model

    hub_cache(tmp_path, info.repo, "open_clip_model.safetensors", b"x")
    _weights_file("ViT-B-16", "openai", tmp_path, config)
    model = build_model(config)
    assert type(model.visual.trunk.blocks[0].mlp.act).__name__ == "QuickGELU"
    assert type(model.text.transformer.resblocks[0].mlp.act).__name__ == "QuickGELU"


def test_embedding_tool(tmp_path):
    names = tmp_path / "classes.json"
    names.write_text(json.dumps({"categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]}))
    run = lambda *args: subprocess.run(  # noqa: E731
        [sys.executable, ROOT / "tools/generate_text_embeddings.py", "--model", "ViT-Ti-8-64", *args],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    done = run("--names", names, "--out", tmp_path / "e.npy")
    assert done.returncode == 0, done.stderr
    rows = np.load(tmp_path / "e.npy")
    assert rows.shape == (2, 128) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert run("--names", names, "--background", "--out", tmp_path / "e.pt").returncode == 0
    assert list(torch.load(tmp_path / "e.pt", weights_only=True)) == ["cat", "dog", "background"]
    names.write_text("[]")
    failed = run("--names", names, "--out", tmp_path / "f.npy")
    assert failed.returncode == 2 and "holds no class names" in failed.stderr and not (tmp_path / "f.npy").exists()
