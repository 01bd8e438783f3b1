"""Arguments of the factory calls, hub and local names, and models saved in OpenCLIP's form."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import open_clip
from open_clip.factory import build_model
from open_clip.push_to_hf_hub import generate_readme, upstream_config, upstream_state_dict

VIT = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}
SIGLIP = {
    "embed_dim": 96,
    "init_logit_bias": -10,
    "custom_text": True,
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
    "vision_cfg": {"timm_model_name": "test_vit4", "image_size": 32, "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1, "proj_bias": True,
                 "no_causal_mask": True, "pool_type": "last"},
}  # fmt: skip


@pytest.fixture
def names(monkeypatch) -> None:
    """Two small models by name."""
    monkeypatch.setitem(open_clip.configs._configs, "small-vit", VIT)
    monkeypatch.setitem(open_clip.configs._configs, "small-siglip", SIGLIP)


@pytest.fixture
def weights(names, tmp_path) -> Path:
    torch.manual_seed(5)
    torch.save(open_clip.create_model("small-vit", load_weights=False).state_dict(), tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def test_keywords_of_openclip(weights):
    model, train, val = open_clip.create_model_and_transforms(
        model_name="small-vit", pretrained=str(weights), precision="fp32", device="cpu", jit=False,
        force_custom_text=True, force_patch_dropout=0.0, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6),
        image_interpolation="bilinear", image_resize_mode="squash", aug_cfg={"scale": (0.5, 1.0)}, weights_only=True,
        pretrained_image=False, pretrained_text=True, output_dict=True, init_logit_scale=2.5,
    )  # fmt: skip
    assert val.transforms[-1].mean == (0.1, 0.2, 0.3) and train.transforms[-1].std == (0.4, 0.5, 0.6)
    assert train.transforms[0].scale == (0.5, 1.0) and val.transforms[0].size == (32, 32)
    assert model.visual.preprocess_cfg["interpolation"] == "bilinear"
    assert set(model(torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, dtype=torch.long))) == {
        "image_features", "text_features", "logit_scale",
    }  # fmt: skip
    alone = open_clip.create_model_from_pretrained("small-vit", weights, return_transform=False)
    assert isinstance(alone, open_clip.CustomTextCLIP) and not alone.training
    _, prepare = open_clip.create_model_from_pretrained("small-vit", weights, image_mean=(0, 0, 0))
    assert prepare.transforms[-1].mean == (0, 0, 0)
    assert open_clip.create_model("small-vit", force_preprocess_cfg={"resize_mode": "longest"}).visual.resize_mode == (
        "longest"
    )


@torch.no_grad()
def test_other_sizes(weights):
    start = open_clip.create_model("small-vit", weights)
    wide = open_clip.create_model("small-vit", weights, force_image_size=(32, 64), force_context_length=24)
    assert wide.visual.image_size == (32, 64) and wide.visual.grid_size == (4, 8)
    assert wide.visual.preprocess_cfg["size"] == (32, 64) and wide.context_length == 24
    old = start.text.positional_embedding
    expected = F.interpolate(old.T[None], size=24, mode="linear")[0].T
    torch.testing.assert_close(wide.text.positional_embedding, expected)
    assert wide.encode_image(torch.randn(1, 3, 32, 64)).shape == (1, 24)
    # A dense reading of another size resizes the same way, so the two models agree there.
    image = torch.randn(1, 3, 32, 64)
    torch.testing.assert_close(wide.encode_dense(image), start.encode_dense(image))


def test_weights_are_missed_when_there_are_none(names, caplog):
    with caplog.at_level(logging.WARNING):
        open_clip.create_model("small-vit")
    assert "small-vit has random weights" in caplog.text
    caplog.clear()
    open_clip.create_model("small-vit", load_weights=False)
    assert not caplog.text
    with pytest.raises(ValueError, match="is to have pretrained weights, and none are named"):
        open_clip.create_model("small-vit", require_pretrained=True)
    with pytest.raises(ValueError, match="give a tag or a file"):
        open_clip.create_model_from_pretrained("small-vit")


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"jit": True}, ValueError, "jit=True is not offered: use torch.compile"),
        ({"weights_only": False}, ValueError, "would run code"),
        ({"force_patch_dropout": 0.5}, ValueError, "dense maps need every patch"),
        ({"width": 7}, TypeError, "no argument width"),
        ({"force_image_size": (1, 2, 3)}, ValueError, "image size is"),
        ({"force_preprocess_cfg": {"means": 1}}, ValueError, "unknown keys means"),
        ({"pretrained_image": True}, ValueError, "names no timm_model_name"),
        ({"model_name": "RN50"}, ValueError, "a ResNet has no patch tokens"),
        ({"model_name": ""}, ValueError, "give one of open_clip.list_models"),
        ({"model_name": "hf-hub:"}, ValueError, "names no repository"),
        ({"model_name": "local-dir:/nowhere"}, FileNotFoundError, "has no open_clip_config.json"),
        ({"pretrained": "openai"}, ValueError, "neither a file nor a tag"),
    ],
)
def test_arguments_that_are_refused(names, arguments, kind, message):
    with pytest.raises(kind, match=message) as error:
        open_clip.create_model(**{"model_name": "small-vit", **arguments})
    assert "\n" not in str(error.value)


# -- folders and repositories -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small-vit", "small-siglip"])
@torch.no_grad()
def test_a_saved_model_comes_back(names, tmp_path, name):
    torch.manual_seed(1)
    model = open_clip.create_model(name, load_weights=False, force_quick_gelu=True).eval()
    folder = open_clip.save_pretrained(model, tmp_path / "saved", safe_serialization="both")
    assert {f.name for f in folder.iterdir()} == {
        "open_clip_config.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
    }  # fmt: skip
    again, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    image, text = torch.randn(1, 3, 32, 32), torch.randint(0, 99, (2, 8))
    assert all(torch.equal(a, b) for a, b in zip(model.eval()(image, text), again.eval()(image, text), strict=True))
    assert again.visual.preprocess_cfg == model.visual.preprocess_cfg
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    assert torch.equal(preprocess(picture), open_clip.create_model_and_transforms(name)[2](picture))
    (folder / "open_clip_model.safetensors").unlink()
    assert torch.equal(open_clip.create_model(f"local-dir:{folder}").text.ln_final.weight, model.text.ln_final.weight)
    assert open_clip.get_tokenizer(f"local-dir:{folder}")(["a cat"]).shape == (1, model.context_length)
    random = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    assert not torch.equal(random.text.token_embedding.weight, model.text.token_embedding.weight)
    assert open_clip.get_model_config(f"local-dir:{folder}")["embed_dim"] == model.embed_dim
    (folder / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights: looked for open_clip_model.safetensors"):
        open_clip.create_model(f"local-dir:{folder}")


def test_weights_of_an_earlier_save_do_not_come_back(names, tmp_path):
    for kinds in ((True, False), (False, True), ("both", False)):
        for kind in kinds:
            torch.manual_seed(len(str(kind)))
            model = open_clip.create_model("small-vit", load_weights=False)
            open_clip.save_pretrained(model, tmp_path, safe_serialization=kind)
        again = open_clip.create_model(f"local-dir:{tmp_path}")
        assert torch.equal(again.text.ln_final.weight, model.text.ln_final.weight)
        assert torch.equal(again.visual.trunk.pos_embed, model.visual.trunk.pos_embed)


@torch.no_grad()
@pytest.mark.parametrize("width", [128, 96])  # 4 x 16 cells, as many as 8 x 8 are; 4 x 12
def test_positions_that_are_no_square_are_resized_from_their_own_grid(names, tmp_path, width):
    model = open_clip.create_model("small-vit", load_weights=False, force_image_size=(32, width)).eval()
    torch.nn.init.normal_(model.visual.trunk.pos_embed)
    folder = open_clip.save_pretrained(model, tmp_path / "saved")
    same = open_clip.create_model(f"local-dir:{folder}", force_image_size=(32, width))
    assert torch.equal(same.visual.trunk.pos_embed, model.visual.trunk.pos_embed)
    for size in (64, 32):
        other = open_clip.create_model(f"local-dir:{folder}", force_image_size=size)
        image = torch.randn(1, 3, size, size)
        torch.testing.assert_close(other.encode_dense(image), model.encode_dense(image))
    weights = folder / "open_clip_model.safetensors"
    if width == 96:
        with pytest.raises(ValueError, match="open_clip_model.safetensors: its 48 positions are no square"):
            open_clip.load_checkpoint(other, weights)
        with pytest.raises(ValueError, match="force_image_size= and force_context_length= resize positions"):
            open_clip.create_model("small-vit", weights)


def test_a_model_with_a_reading_of_its_own_comes_back_and_says_that_openclip_refuses_it(names, tmp_path, caplog):
    model = open_clip.create_model("small-vit", load_weights=False)
    open_clip.save_pretrained(model, tmp_path / "saved")
    assert not caplog.text
    model.visual.set_readout("csa")
    open_clip.save_pretrained(model, tmp_path / "saved")
    assert 'set_readout("value")' in caplog.text
    assert open_clip.create_model(f"local-dir:{tmp_path / 'saved'}").visual.readout.name == "csa"


def test_eva_models_are_saved_by_timms_names(tmp_path):
    for name, other in (("EVA02-CLIP-B-16", "EVA02-B-16"), ("EVA01-CLIP-g-14", "EVA01-g-14"),
                        ("EVA02-CLIP-bigE-14", "EVA02-E-14"), ("EVA02-CLIP-L-14-336", "EVA02-L-14-336")):  # fmt: skip
        config = upstream_config(open_clip.get_model_config(name))
        with torch.device("meta"):
            ours, theirs = build_model(open_clip.get_model_config(name)), build_model(open_clip.get_model_config(other))
            made = build_model(config)
        state = upstream_state_dict(ours, ours.config)
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in made.state_dict().items()}
    tiny = {"image_size": 32, "layers": 3, "width": 48, "patch_size": 8, "eva_model_name": "t"}
    with pytest.raises(ValueError, match="timm has no EVA trunk of width 48, 3 layers and patch 8"):
        open_clip.save_pretrained(build_model({**VIT, "vision_cfg": {**tiny, "head_width": 12}}), tmp_path / "x")
    assert list((tmp_path / "x").iterdir()) == []


def test_a_repository_in_the_cache(names, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = open_clip.create_model("small-siglip", load_weights=False)
    root = tmp_path / "hub" / "models--someone--small"
    for revision in ("0123abc", "v2"):
        open_clip.save_pretrained(model, root / "snapshots" / revision)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0123abc")
    made = open_clip.create_model("hf-hub:someone/small", cache_dir=tmp_path / "hub")
    assert torch.equal(made.visual.trunk.pos_embed, model.visual.trunk.pos_embed) and made.logit_bias == -10
    (root / "refs" / "v2").write_text("v2")
    assert open_clip.create_model("hf-hub:someone/small@v2", cache_dir=tmp_path / "hub").embed_dim == 96
    with pytest.raises(FileNotFoundError, match="give its folder as local-dir:FOLDER"):
        open_clip.create_model("hf-hub:someone/other", cache_dir=tmp_path / "hub")


def test_pushing(names, monkeypatch, tmp_path):
    """What would be uploaded is OpenCLIP's form; the hub is not asked."""
    sent = {}

    class Repo:
        repo_id = "someone/small"

    def upload(**arguments):
        folder = Path(arguments["folder_path"])
        sent.update(arguments, files={f.name for f in folder.iterdir()}, readme=(folder / "README.md").read_text())
        sent["config"] = json.loads((folder / "open_clip_config.json").read_text())
        sent["state"] = load_file(folder / "open_clip_model.safetensors")
        return "done"

    monkeypatch.setattr("huggingface_hub.create_repo", lambda *_, **kwargs: sent.update(made=kwargs) or Repo)
    monkeypatch.setattr("huggingface_hub.file_exists", lambda *_, **__: False)
    monkeypatch.setattr("huggingface_hub.upload_folder", upload)
    model = open_clip.create_model("small-vit", load_weights=False)
    card = {"description": "A model.", "details": {"Trained on": "squares"}, "license": "apache-2.0"}
    assert open_clip.push_to_hf_hub(model, None, None, "small", private=True, model_card=card) == "done"
    assert sent["made"]["private"] and sent["repo_id"] == "someone/small" and sent["commit_message"] == "Add model"
    assert {"open_clip_config.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "README.md"} == (
        sent["files"]
    )
    assert sent["config"]["model_cfg"]["vision_cfg"] == VIT["vision_cfg"] and "visual.conv1.weight" in sent["state"]
    assert sent["config"]["preprocess_cfg"]["mean"] == list(open_clip.OPENAI_DATASET_MEAN)
    assert "license: apache-2.0" in sent["readme"] and "- **Trained on:** squares" in sent["readme"]
    torch.save(model.state_dict(), tmp_path / "w.pt")
    open_clip.push_pretrained_to_hf_hub("small-vit", str(tmp_path / "w.pt"), "small", image_mean=(0, 0, 0))
    assert sent["config"]["preprocess_cfg"]["mean"] == [0, 0, 0]
    assert generate_readme({}, "x").startswith("---\ntags:\n- zero-shot-image-classification\n")


def test_loading_into_a_model_and_describing_one(weights):
    model = open_clip.create_model("small-vit", load_weights=False, force_image_size=64)
    result = open_clip.load_checkpoint(model, weights)
    assert result.missing_keys == [] and model.visual.grid_size == (8, 8)
    with pytest.raises(ValueError, match="loads strictly"):
        open_clip.load_checkpoint(model, weights, strict=False)
    assert open_clip.get_model_tokenize_cfg(model) == {"context_length": 16, "vocab_size": 49408}
    open_clip.set_model_preprocess_cfg(model, {"mean": (0, 0, 0), "interpolation": "bilinear"})
    assert open_clip.get_model_preprocess_cfg(model)["interpolation"] == "bilinear"
    assert model.visual.image_mean == (0, 0, 0)
    with pytest.raises(ValueError, match="build it with force_image_size"):
        open_clip.set_model_preprocess_cfg(model, {"size": 48})


def test_precisions():
    assert [open_clip.get_cast_dtype(p) for p in ("fp32", "bf16", "fp16", "amp_bf16")] == [
        None, torch.bfloat16, torch.float16, None,
    ]  # fmt: skip
    assert open_clip.get_input_dtype("pure_bf16") == torch.bfloat16 and open_clip.get_input_dtype("amp") is None
    model = torch.nn.Linear(2, 2)
    open_clip.convert_weights_to_lp(model, torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16
    open_clip.convert_weights_to_fp16(model)
    assert model.weight.dtype == torch.float16


def test_a_traced_model(names):
    model = open_clip.create_model("small-vit", load_weights=False).eval()
    traced = open_clip.trace_model(model, batch_size=2)
    image, text = torch.randn(3, 3, 32, 32), torch.randint(0, 99, (3, 16))
    with torch.no_grad():
        torch.testing.assert_close(traced.encode_image(image), model.encode_image(image))
        torch.testing.assert_close(traced(image, text)[1], model(image, text)[1])


def test_the_text_tower_thaws_from_its_end(names):
    model = open_clip.create_model("small-vit", load_weights=False)
    trained = lambda: {n.split(".")[1] for n, p in model.named_parameters() if n[:4] == "text" and p.requires_grad}  # noqa: E731
    expected = [set(), {"text_projection"}, {"text_projection", "transformer", "ln_final"}]
    for count, names_ in enumerate(expected):
        model.lock_text_tower(unlocked_layers=count)
        assert trained() == names_
    model.lock_text_tower(9)
    assert {"token_embedding", "positional_embedding"} < trained()
    for arguments, message in (((-1,), "unlocked_layers is -1"), ((1, False), "freeze_layer_norm")):
        with pytest.raises(ValueError, match=message):
            model.lock_text_tower(*arguments)


@torch.no_grad()
def test_intermediates_and_logits(names):
    model = open_clip.create_model("small-siglip", load_weights=False).eval()
    image, text = torch.randn(2, 3, 32, 48), torch.randint(0, 99, (3, 8))
    out = model.forward_intermediates(image, text, 2, 1, image_output_extra_tokens=True, output_logits=True)
    assert [tuple(m.shape) for m in out["image_intermediates"]] == [(2, 96, 2, 3)] * 2
    assert [tuple(m.shape) for m in out["text_intermediates"]] == [(3, 8, 64)]
    images, texts, scale, bias = model(image, text)
    logits = scale * images @ texts.T + bias
    torch.testing.assert_close(out["image_logits"], logits)
    torch.testing.assert_close(model.get_logits(image, text)[1], logits.T)
    assert set(out) == {
        "image_intermediates", "image_intermediates_prefix", "text_intermediates", "image_features", "text_features",
        "image_logits", "text_logits", "logit_scale", "logit_bias",
    }  # fmt: skip
    few = model.forward_intermediates(image, image_indices=[0, -1], image_output_fmt="NLC", intermediates_only=True)
    assert set(few) == {"image_intermediates"} and few["image_intermediates"][1].shape == (2, 6, 96)
    last = model.visual.forward_intermediates(image, [0], stop_early=True, normalize_intermediates=True)
    assert len(last["image_intermediates"]) == 1
    with pytest.raises(ValueError, match=r"blocks \[9\] do not exist"):
        model.forward_intermediates(image, image_indices=[9])
