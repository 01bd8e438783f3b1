"""Names, parameters and models of open_clip_torch 3.3.0: present, or refused by a decision that stands here.

The list (upstream_surface.json) was recorded from the published package by ``inspect``; ``name=`` is optional.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path

import pytest
import torch
from packaging.version import Version

import open_clip
from open_clip.factory import build_model

SURFACE = json.loads((Path(__file__).parent / "upstream_surface.json").read_text(encoding="utf-8"))

# Names that are not offered, and why.
_TRUNK = "image trunks are timm's: the same tensors are visual.trunk's, by timm's names"
REFUSED = {
    "CoCa": "a captioner; its image tower pools by a cross-attention that no dense reading here goes through",
    "CoCaLoss": "the captioning loss of CoCa",
    "CLIP": "put together from two towers that are given; create_model or build_model(config) makes them from a config",
    "CustomTextCLIP": "the same class as CLIP, see there",
    "visual.init_parameters": "timm initialises its trunks when they are made",
    "visual.prune_intermediate_layers": "it cuts blocks off a trunk, another model under the same config",
    "visual (timm).set_input_size": "the native size is chosen when the model is made: force_image_size",
    "text.build_causal_mask": "the mask is attn_mask; attention is told to be causal and needs none",
    "text.init_parameters": "called init_weights",
    "text.prune_intermediate_layers": "as visual.prune_intermediate_layers",
    "SimpleTokenizer.bpe": "a step inside encode, with an alphabet of its own",
    "HFTokenizer.set_language": "for NLLB, whose text tower is a model of the hub",
    "HFTokenizer(**kwargs)": "they go to transformers' tokenizers, which are not used",
}
ATTRIBUTES_REFUSED = {
    **dict.fromkeys(
        ["attn_pool", "class_embedding", "conv1", "final_ln_after_pool", "ln_post", "ln_pre", "patch_dropout",
         "pool_type", "positional_embedding", "proj", "transformer", "head", "output_tokens"], _TRUNK,
    ),
    **dict.fromkeys(
        ["cls_emb", "correct_cls_mask", "num_pos", "output_tokens", "pad_id", "use_pad_mask"],
        "of CoCa's text tower, whose class token is not here",
    ),
    **dict.fromkeys(
        ["bpe_ranks", "byte_decoder", "byte_encoder", "cache", "pat", "reduction_fn"], "workings of the tokenizer",
    ),
}  # fmt: skip
MODULES_REFUSED = {
    "coca_model": "CoCa", "convert": "weights of big_vision, MobileCLIP and PE in their own files",
    "hf_configs": "text models of the hub", "hf_model": "text models of the hub", "modified_resnet": "ResNets",
    "pos_embed": "fixed positions of no ViT here", "timm_model": "image_tower",
    "transformer": "image_tower, text_tower", "utils": "helpers of batch norm in ResNets",
}  # fmt: skip


def names_of(function) -> list[str]:
    """Parameters in order, in the list's notation."""
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [
        marks.get(p.kind, "") + p.name + ("=" if p.default is not p.empty else "")
        for p in inspect.signature(function).parameters.values()
        if p.name != "self"
    ]


def differences(function, recorded: list[str]) -> list[str]:
    """What a call that fits the recorded parameters may meet here: a missing or a moved one, or a further demand."""
    own, wrong = names_of(function), []
    for i, name in enumerate(recorded):
        if name not in own and name.rstrip("=") + "=" not in own:
            wrong.append(f"no {name}")
        elif not name.startswith("*") and (own[i] if i < len(own) else "").rstrip("=") != name.rstrip("="):
            wrong.append(f"{name} is not at place {i}")
    return wrong + [f"{n} is demanded" for n in own[len(recorded) :] if not n.endswith("=") and n[0] != "*"]


@pytest.mark.parametrize("name", SURFACE["functions"])
def test_functions(name):
    assert differences(getattr(open_clip, name), SURFACE["functions"][name]) == []
    assert name in open_clip.__all__


@pytest.mark.parametrize("name", SURFACE["classes"])
def test_classes(name):
    if name in REFUSED:
        assert name in ("CLIP", "CustomTextCLIP") or not hasattr(open_clip, name)
        return
    recorded = SURFACE["classes"][name]
    if f"{name}(**kwargs)" in REFUSED:
        recorded = [p for p in recorded if p != "**kwargs"]
    assert differences(getattr(open_clip, name).__init__, recorded) == []


@pytest.mark.parametrize("name", SURFACE["dataclasses"])
def test_dataclasses(name):
    own = {
        f.name: list(f.default) if isinstance(f.default, tuple) else f.default
        for f in dataclasses.fields(getattr(open_clip, name))
    }
    assert own == SURFACE["dataclasses"][name]


def test_values():
    for name, form in SURFACE["values"].items():
        value = getattr(open_clip, name)
        assert f"{type(value).__name__}[{len(value)}]" == form


def test_modules_under_the_same_names():
    for name in SURFACE["modules"]:
        module = Path(open_clip.__file__).parent / f"{name}.py"
        assert module.is_file() != (name in MODULES_REFUSED), name


def instances() -> dict[str, object]:
    model = open_clip.create_model("ViT-Ti-8-64", load_weights=False)
    return {
        "CLIP": model, "CLIP (custom text)": model, "visual": model.visual, "visual (timm)": model.visual,
        "text": model.text, "ClipLoss": open_clip.ClipLoss(), "SigLipLoss": open_clip.SigLipLoss(),
        "DistillClipLoss": open_clip.DistillClipLoss(), "SimpleTokenizer": open_clip.SimpleTokenizer(),
        "HFTokenizer": open_clip.HFTokenizer.__new__(open_clip.HFTokenizer),
    }  # fmt: skip


def test_members():
    own, wrong = instances(), []
    for kind, members in SURFACE["members"].items():
        for name, recorded in members.items():
            if f"{kind}.{name}" in REFUSED:
                assert not hasattr(own[kind], name)
            elif not hasattr(own[kind], name):
                wrong.append(f"{kind}.{name} is missing")
            elif (kind, name) != ("visual", "forward") and (kind, name) != ("visual (timm)", "forward"):
                # (the image is called image there, and x in OpenCLIP; everybody gives it by place)
                wrong += [f"{kind}.{name}: {d}" for d in differences(getattr(own[kind], name), recorded)]
    assert wrong == []


def test_attributes():
    own = instances()
    missing = {
        f"{kind}.{name}"
        for kind, names in SURFACE["attributes"].items()
        for name in names
        if not hasattr(own[kind], name) and name not in ATTRIBUTES_REFUSED
    }
    assert missing == set()


def test_values_of_attributes():
    model = instances()["CLIP"]
    visual = model.visual
    height, width = visual.image_size
    assert (height, width) == visual.image_size == (64, 64) and visual.image_size[0] == visual.image_size == 64
    assert visual.grid_size == (8, 8) and visual.preprocess_cfg["size"] == (64, 64)
    assert set(visual.preprocess_cfg) == set(SURFACE["dataclasses"]["PreprocessCfg"])
    assert model.token_embedding is model.text.token_embedding and model.vocab_size == 49408
    mask = model.attn_mask
    assert mask.shape == (32, 32) and torch.isneginf(mask).sum() == 32 * 31 / 2 and mask[3, 2] == 0


def test_models_and_why_others_are_refused():
    for name in SURFACE["list_models"]:
        if name in open_clip.list_models():
            assert name in SURFACE["parameters"]
            continue
        with pytest.raises(ValueError, match="has no dense reading: ") as error:
            open_clip.create_model(name)
        assert "\n" not in str(error.value) and len(str(error.value)) < 250
    assert set(SURFACE["parameters"]) <= set(open_clip.list_models()) and len(SURFACE["parameters"]) == 85


@pytest.mark.parametrize("name", SURFACE["parameters"])
def test_sizes_of_all_models(name):
    """Built without memory; the numbers are those of OpenCLIP's own models: in all, and of the image tower."""
    with torch.device("meta"):
        model = build_model(open_clip.get_model_config(name))
    own = [sum(p.numel() for p in m.parameters()) for m in (model, model.visual)]
    assert own == SURFACE["parameters"][name]
    assert all(side % model.visual.patch_size == 0 for side in model.visual.image_size)


def test_tags():
    for model, tags in SURFACE["pretrained"].items():
        if model in SURFACE["parameters"]:
            assert sorted(open_clip.list_pretrained_tags_by_model(model)) == sorted(tags)
            for tag in tags:
                assert open_clip.is_pretrained_cfg(model, tag.replace("_", "-")) and model in (
                    open_clip.list_pretrained_models_by_tag(tag)
                )
                assert open_clip.get_pretrained_url(model, tag).startswith("https://")
        else:
            assert open_clip.list_pretrained_tags_by_model(model) == []
    assert "ViT-B-32:openai" in open_clip.list_pretrained(as_str=True)


def test_version_says_whose_calls_these_are():
    """A requirement such as open_clip_torch>=4 must not be met by a package with the calls of 3.3."""
    version = Version(open_clip.__version__)
    assert version.public == SURFACE["version"] and version.local
