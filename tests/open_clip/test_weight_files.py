"""Checkpoint files by their first bytes, OpenAI's archives without their code, and names that wrappers leave."""

from __future__ import annotations

import io
import json
import logging
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import open_clip
from open_clip.factory import build_model
from open_clip.jit_archive import is_jit_archive, read_jit_archive
from open_clip.weights import (
    export_state_dict,
    load_state,
    load_state_dict_file,
    load_tower,
    load_weights,
    uses_quick_gelu,
)

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 60, "width": 64, "heads": 1, "layers": 1},
}


def model(quick_gelu: bool = True, seed: int = 0) -> open_clip.CLIP:
    torch.manual_seed(seed)
    return build_model({**CONFIG, "quick_gelu": quick_gelu}).eval()


# -- OpenAI's archives ------------------------------------------------------------------------------------------------


class Tree(nn.Module):
    """A module with given tensors under given dotted names, which TorchScript can save."""

    def __init__(self, tensors: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor] | None = None) -> None:
        super().__init__()
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            head, _, rest = name.partition(".")
            if rest:
                parts.setdefault(head, {})[rest] = value
            else:
                self.register_parameter(head, nn.Parameter(value, requires_grad=value.is_floating_point()))
        for head, inner in parts.items():
            self.add_module(head, Tree(inner))
        for name, value in (buffers or {}).items():
            self.register_buffer(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the archive's code has run")


@pytest.fixture
def archive(tmp_path) -> tuple[Path, open_clip.CLIP]:
    """A file as OpenAI publishes them, of half-precision weights with their sizes beside them; and its model."""
    source = model()
    sizes = {"input_resolution": 32, "context_length": 12, "vocab_size": 60}
    half = {k: v.half() for k, v in export_state_dict(source, "openai").items()}
    path = tmp_path / "ViT-tiny.pt"
    tree = Tree(half, {k: torch.tensor(v) for k, v in sizes.items()})
    torch.jit.save(torch.jit.script(tree), str(path))
    return path, source


def test_an_archive_is_read_without_its_code(archive):
    path, source = archive
    assert is_jit_archive(path)
    state, expected = read_jit_archive(path), torch.jit.load(str(path)).state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[k], expected[k]) and state[k].dtype == expected[k].dtype for k in expected)
    target = model(seed=1)
    load_weights(target, path)
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value.half().float()), name


def test_what_openais_files_prove_is_chosen_or_demanded(archive, tmp_path, caplog):
    path, _ = archive
    (tmp_path / "tiny-openai.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "tiny-openai.json")
    with pytest.raises(
        ValueError, match="trained with QuickGELU, but the model has GELU: build it with force_quick_gelu"
    ):
        load_weights(model(quick_gelu=False), path)
    with caplog.at_level(logging.WARNING):
        made = open_clip.create_model("tiny-openai", str(path))
    assert uses_quick_gelu(made) and made.config["quick_gelu"] and "is built with QuickGELU" in caplog.text
    assert "QuickGELU" in repr(made.visual.trunk.blocks[0].mlp.act)
    # The same tensors in an ordinary file, as people save them from OpenAI's own code.
    torch.save(torch.jit.load(str(path)).state_dict(), tmp_path / "plain.pt")
    assert uses_quick_gelu(open_clip.create_model("tiny-openai", tmp_path / "plain.pt"))
    assert not uses_quick_gelu(open_clip.create_model("tiny-openai", load_weights=False))


def test_openais_model_from_a_file_alone(archive, tmp_path):
    path, source = archive
    made = open_clip.load_openai_model(path, device="cpu")
    image, text = torch.randn(2, 3, 32, 32), torch.randint(0, 59, (2, 12))
    with torch.no_grad():
        for value in source.state_dict().values():
            value.copy_(value.half().float())
        torch.testing.assert_close(made(image, text), source(image, text))
    assert not made.training and made.visual.image_size == 32 and made.context_length == 12
    assert "ViT-B-32" in open_clip.list_openai_models() and "RN50" not in open_clip.list_openai_models()
    with pytest.raises(ValueError, match="neither a file nor one of OpenAI's models"):
        open_clip.load_openai_model("RN50")
    torch.save({f"visual.layer1.0.conv{i}.weight": torch.zeros(1) for i in range(2)}, tmp_path / "rn.pt")
    with pytest.raises(ValueError, match="a ResNet, which has no patch tokens"):
        open_clip.load_openai_model(tmp_path / "rn.pt")


def rewritten(path: Path, data: bytes, target: Path) -> Path:
    """The archive with another pickle in it."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith("/data.pkl") else old.read(name))
    return target


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/open_clip_archive_ran_code"),))


def test_an_archive_with_a_strange_pickle_is_refused(archive, tmp_path):
    path, _ = archive
    marker = Path("/tmp/open_clip_archive_ran_code")
    marker.unlink(missing_ok=True)
    evil = rewritten(path, pickle.dumps({"a": Evil()}), tmp_path / "evil.pt")
    with pytest.raises(
        RuntimeError, match="evil.pt cannot be loaded.*asks for .*which is no part of a model's weights"
    ):
        load_state_dict_file(evil)
    assert not marker.exists()
    empty = rewritten(path, pickle.dumps([1, 2]), tmp_path / "empty.pt")
    with pytest.raises(RuntimeError, match="holds no state dict"):
        load_state_dict_file(empty)


# -- first bytes ------------------------------------------------------------------------------------------------------


def zip_without_its_end() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(4000)}, buffer)
    return buffer.getvalue()[:9000]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(100), "is a JPEG picture: give a state dict"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is a PNG picture"),
        (b"RIFF\x10\x00\x00\x00WEBPVP8 ", "is a WebP picture"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "is a Git LFS pointer.*: fetch it with git lfs pull",
        ),
        (b"\n<!DOCTYPE html><html>", "is a web page.*fetch the file behind it"),
        (b"<html><body>404", "is a web page"),
        (b'{"error": "not found"}', "is a json text"),
        (b"\x1f\x8b\x08\x00" + bytes(20), "is compressed with gzip: unpack it first"),
        (b"%PDF-1.7", "is a PDF document"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        (b"", "is empty: fetch it again"),
        (zip_without_its_end(), "the beginning of an archive whose end is missing: the download stopped early"),
    ],
)
def test_other_files_are_named(tmp_path, content, message):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=message) as error:
        open_clip.create_model("ViT-Ti-8-64", str(path))
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value) and str(path) in str(error.value)


def test_no_advice_to_run_code(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(RuntimeError, match="it holds a Python object .*ask for its state dict alone") as error:
        load_state_dict_file(tmp_path / "evil.pt")
    assert "weights_only" not in str(error.value)


def test_the_content_tells_the_format_not_the_name(tmp_path):
    state = model().state_dict()
    save_file(state, tmp_path / "weights.pt")
    torch.save(state, tmp_path / "weights.safetensors")
    for name in ("weights.pt", "weights.safetensors"):
        loaded = load_state_dict_file(tmp_path / name)
        assert all(torch.equal(loaded[k], v) for k, v in state.items())


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rename",
    [
        lambda k: f"_orig_mod.{k}",
        lambda k: f"module._orig_mod.{k}",
        lambda k: k.replace("blocks.0.", "blocks.0._orig_mod."),
        lambda k: k.replace("visual.", "visual._orig_mod."),
    ],
)
def test_names_of_compiled_and_wrapped_models(tmp_path, rename):
    source, target = model(), model(seed=1)
    torch.save({rename(k): v for k, v in source.state_dict().items()}, tmp_path / "a.pt")
    load_weights(target, tmp_path / "a.pt")
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in source.state_dict().items())


def test_a_scale_inside_the_text_tower():
    """Beside the model's own it is dropped; alone it is the model's."""
    source, target = model(), model(seed=1)
    state = {**source.state_dict(), "text.logit_scale": torch.tensor(7.0)}
    load_state(target, state)
    assert target.logit_scale == source.logit_scale
    del state["logit_scale"]
    load_state(target, state)
    assert target.logit_scale == 7


def test_one_tower_from_a_file(tmp_path):
    source = model(seed=3)
    whole, trunk = tmp_path / "clip.pt", tmp_path / "trunk.pt"
    torch.save(export_state_dict(source, "openai"), whole)
    torch.save({k: v for k, v in source.visual.trunk.state_dict().items() if not k.startswith("head.")}, trunk)
    (tmp_path / "tiny-tower.json").write_text(json.dumps({**CONFIG, "quick_gelu": True}))
    open_clip.add_model_config(tmp_path / "tiny-tower.json")
    made = open_clip.create_model("tiny-tower", pretrained_image_path=trunk, pretrained_text_path=whole)
    assert torch.equal(made.visual.trunk.pos_embed, source.visual.trunk.pos_embed)
    assert torch.equal(made.text.ln_final.weight, source.text.ln_final.weight)
    assert not torch.equal(made.visual.trunk.head.weight, source.visual.trunk.head.weight)
    torch.save({"blocks.0.norm1.weight": torch.zeros(3)}, trunk)
    with pytest.raises(ValueError, match="does not fit the visual tower"):
        open_clip.create_model("tiny-tower", pretrained_image_path=trunk)
    # With its dense reading, and the reading's weights.
    source.visual.set_readout("gated:2")
    source.visual.readout.gate.bias.data.fill_(0.25)
    torch.save(export_state_dict(source, "openai"), whole)
    made = open_clip.create_model("tiny-tower", pretrained_image_path=whole)
    assert made.visual.readout.name == "gated:2" and (made.visual.readout.gate.bias == 0.25).all()
    narrow = {k: v for k, v in export_state_dict(source, "openai").items() if "ln_post" not in k}
    torch.save(narrow, whole)
    made = model(seed=3)
    with pytest.raises(ValueError, match="does not fit the visual tower"):
        load_tower(made, "visual", whole)
    assert made.visual.readout.name == "value"
