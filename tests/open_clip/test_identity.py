"""A model's fingerprint: changes with whatever changes its outputs, and with nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from open_clip.factory import build_model
from open_clip.identity import IMAGE_FACTS, TEXT_FACTS, architecture, identity

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}
EVA = {"eva_model_name": "t", "rope": True, "naiveswiglu": True, "subln": True, "mlp_ratio": 2.6667}


def build(vision: dict | None = None, text: dict | None = None, **top):
    config = copy.deepcopy({**CONFIG, **top})
    config["vision_cfg"].update(vision or {})
    config["text_cfg"].update(text or {})
    torch.manual_seed(0)
    return build_model(config)


def same_weights(model, like):
    """The tensors are the same in all that follows: what differs is the function."""
    model.load_state_dict(like.state_dict())
    return model


# name: (another model with the same tensors, the towers that it changes)
CHANGES = {
    "activation": (lambda: build(quick_gelu=True), "image text"),
    "heads": (lambda: build({"head_width": 24}), "image"),
    "text heads": (lambda: build(text={"heads": 4}), "text"),
    "causal": (lambda: build(text={"no_causal_mask": True}), "text"),
    "text pooling": (lambda: build(text={"pool_type": "last"}), "text"),
    "text epsilon": (lambda: build(text={"norm_kwargs": {"eps": 1e-6}}), "text"),
    "text activation": (lambda: build(text={"act_kwargs": {"approximate": "tanh"}}), "text"),
    "normalisation": (lambda: build(preprocess_cfg={"mean": [0.5] * 3}), "image"),
    "resizing": (lambda: build(preprocess_cfg={"resize_mode": "squash"}), "image"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_no_weight_shows_is_in_the_identity(change):
    make, towers = CHANGES[change]
    start = build()
    other = same_weights(make(), start)
    assert identity(start) != identity(other)
    assert (identity(start.visual) != identity(other.visual)) == ("image" in towers.split())
    assert (identity(start.text) != identity(other.text)) == ("text" in towers.split())


def test_epsilon_pooling_and_rotary_embedding_of_the_trunk():
    start = build(EVA)
    seen = {identity(start.visual)}
    for change in ("eps", "pool", "rope", "indexing"):
        other = same_weights(build(EVA), start).visual
        if change == "eps":
            other.trunk.norm.eps = 1e-5
        if change == "pool":
            other.trunk.global_pool = "avg"
        if change == "rope":
            other = same_weights(build({**EVA, "pt_hw_seq_len": 8}), start).visual
        if change == "indexing":
            other.trunk.rope.grid_indexing = "xy"
        seen.add(identity(other))
    assert len(seen) == 5


def test_weights_types_and_readings_are_in_the_identity():
    start, other = build(), build()
    assert identity(start) == identity(other)
    with torch.no_grad():
        other.visual.trunk.blocks[0].mlp.fc1.bias[0] += 1e-7
    assert identity(start) != identity(other) and identity(start.text) == identity(other.text)
    with torch.no_grad():
        start.logit_scale += 1
    assert identity(start) != identity(build()) and identity(start.visual) == identity(build().visual)
    other = build()
    other.visual.set_readout("qq")
    assert identity(other.visual) != identity(start.visual)
    assert identity(build().bfloat16()) != identity(build())


def test_how_a_model_is_run_is_not_in_the_identity():
    model = build(EVA)
    before = identity(model)
    model.eval().requires_grad_(False).set_grad_checkpointing(True)
    model.visual.trunk.blocks[0].attn.fused_attn = False
    model.encode_dense(torch.zeros(1, 3, 16, 16))
    assert identity(model) == before and identity(copy.deepcopy(model)) == before
    model.text = None  # a teacher that embeds images only
    assert identity(model) != before and identity(model.visual) == identity(build(EVA).visual)


def test_every_attribute_of_a_tower_is_a_fact_or_is_known_to_be_none():
    """One that is new is to be added to the facts, if it changes what the tower computes."""
    no_fact = {"training", "grad_checkpointing", "patch_size", "vocab_size", "output_dim", "width"}  # weights show four
    # Exact; a part of the dense reading; who computes it.
    no_fact |= {"leave_unread", "drop_padding", "changing_kernels"}
    model = build()
    for tower, facts in ((model.visual, IMAGE_FACTS), (model.text, TEXT_FACTS)):
        plain = {n for n, v in vars(tower).items() if isinstance(v, (bool, int, float, str, tuple, list))}
        assert {n for n in plain if not n.startswith("_")} <= {*facts, *no_fact}


def test_only_models_have_one():
    with pytest.raises(TypeError, match="a Linear has no identity here: give a CLIP"):
        identity(nn.Linear(2, 2))
    assert json.loads(json.dumps(architecture(build()))) == architecture(build())


def test_a_recorded_model_keeps_its_own_over_releases():
    """Caches and runs made earlier, with another timm or by a former commit, are found again."""
    from safetensors.torch import load_file

    from open_clip.weights import load_state

    folder = Path(__file__).parents[1] / "golden" / "eva"
    model = build_model(json.loads((folder / "config.json").read_text()))
    load_state(model, load_file(folder / "weights.safetensors"))
    assert identity(model.visual) == "f40823d795f38fe6b442b93d8a9aeaa9"
