"""Models against the numbers of the reference implementation, and against single-token identities."""

from __future__ import annotations

import json
import pickle
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import open_clip
from open_clip.factory import build_model
from open_clip.image_tower import resize_positions
from open_clip.timm_blocks import has_prefix_reading, prefix_block, value_attention, value_block
from open_clip.weights import load_state

KINDS = ["eva", "vit_gelu", "vit_quickgelu"]


@lru_cache
def load(folder: Path):
    """(model, inputs, outputs) of one golden folder; images come as float32."""
    if not (folder / "weights.safetensors").is_file():
        pytest.skip(f"{folder.name} is not among the golden files kept in the repository")
    model = build_model(json.loads((folder / "config.json").read_text())).eval()
    load_state(model, load_file(folder / "weights.safetensors"))
    inputs = {k: torch.from_numpy(v) for k, v in np.load(folder / "inputs.npz").items()}
    inputs = {k: v.float() if v.dtype == torch.float16 else v for k, v in inputs.items()}
    outputs = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(folder / "outputs.npz").items()}
    return model, inputs, outputs


@torch.no_grad()
def compute(model, inputs, name: str):
    """The output called ``name`` in the golden files."""
    native, dense = inputs["images_native"], inputs["images_dense"]
    count = len(dense)  # the repository keeps only the first dense image
    boxes, masks = ([inputs[f"{kind}_{i}"] for i in range(count)] for kind in ("boxes", "masks"))
    norm = name.endswith("_norm")
    base = name.removesuffix("_norm")
    if base.startswith("pseudo_boxes"):
        kind = base.split("_")[2]
        if base.endswith("nonsquare"):
            return model.encode_pseudo_boxes(
                inputs["images_nonsquare"], [inputs["boxes_0"][:3], inputs["boxes_1"][:2]], extract_type=kind
            )
        if base.endswith("only_image0"):
            boxes = [boxes[0]] + [b[:0] for b in boxes[1:]]
        return model.encode_pseudo_boxes(dense, boxes, normalize=norm, extract_type=kind)
    return {
        "encode_image": lambda: model.encode_image(native, normalize=norm),
        "encode_image_at_dense_size": lambda: model.encode_image(dense),
        "encode_image_nonsquare": lambda: model.encode_image(inputs["images_nonsquare"]),
        "encode_dense_map": lambda: model.encode_dense(dense, normalize=norm, keep_shape=True),
        "encode_dense_tokens": lambda: model.encode_dense(dense),
        "encode_dense_native_map": lambda: model.encode_dense(native, keep_shape=True),
        "encode_dense_nonsquare_map": lambda: model.encode_dense(inputs["images_nonsquare"], keep_shape=True),
        "masks_attn0": lambda: model.encode_masks(dense, masks, normalize=norm, mask_attn=False),
        "masks_attn1": lambda: model.encode_masks(dense, masks, normalize=norm, mask_attn=True),
        "rois_and_image.rois": lambda: model.encode_rois_and_image(dense, boxes)[0],
        "rois_and_image.image": lambda: model.encode_rois_and_image(dense, boxes)[1],
        "encode_text": lambda: model.encode_text(inputs["tokens"], normalize=norm),
        "logit_scale": lambda: model.logit_scale,
        "logit_scale_exp": lambda: model.logit_scale.exp(),
    }[base]()


OUTPUTS = """encode_image encode_image_norm encode_image_at_dense_size encode_image_nonsquare encode_dense_map
encode_dense_map_norm encode_dense_tokens encode_dense_native_map encode_dense_nonsquare_map pseudo_boxes_v1
pseudo_boxes_v1_norm pseudo_boxes_v1_only_image0 pseudo_boxes_v1_nonsquare pseudo_boxes_v2 pseudo_boxes_v2_norm
pseudo_boxes_v2_only_image0 pseudo_boxes_v2_nonsquare masks_attn0 masks_attn0_norm masks_attn1 masks_attn1_norm
rois_and_image.rois rois_and_image.image encode_text encode_text_norm logit_scale logit_scale_exp""".split()


@pytest.mark.parametrize("kind", KINDS)
def test_every_golden_output_is_covered(golden, kind):
    outputs = load(golden / kind)[2]
    assert set(outputs) <= set(OUTPUTS)


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_match_reference(golden, kind, name):
    model, inputs, outputs = load(golden / kind)
    if name not in outputs:
        assert kind == "eva" and ("v1" in name or "attn1" in name or "nonsquare" in name)
        return
    actual = compute(model, inputs, name)
    expected = outputs[name][: len(actual)] if outputs[name].ndim else outputs[name]
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_match_reference(golden, kind):
    model, inputs, _ = load(golden / kind)
    if not (golden / kind / "hidden.npz").is_file():
        pytest.skip("hidden states are not among the golden files kept in the repository")
    hidden = np.load(golden / kind / "hidden.npz")
    last = len(model.visual.trunk.blocks) - 1
    with torch.no_grad():
        for path, images in (("image", inputs["images_native"]), ("dense", inputs["images_dense"])):
            x, rope = model.visual.embed(images[:1])
            torch.testing.assert_close(x[0], torch.from_numpy(hidden[f"{path}.in"]), rtol=1e-5, atol=2e-5)
            for i in range(last + 1):
                if path == "dense" and i == last:
                    name, x = f"dense.block{i}_noattn", value_block(model.visual.trunk.blocks[i], x)
                else:
                    name, x = f"{path}.block{i}", model.visual.run_block(i, x, rope)
                torch.testing.assert_close(x[0], torch.from_numpy(hidden[name]), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("schema", ["eva02", "eva01", "eva_postnorm", "vit", "layerscale", "siglip"])
def test_value_path_is_attention_over_one_token(tiny, schema):
    """A softmax over one key is 1: a block on sequences of length one is the block without token mixing."""
    model = tiny(schema).double()
    block = model.visual.trunk.blocks[-1]
    x = torch.randn(2, 9, model.visual.width, dtype=torch.float64)
    alone = x.reshape(18, 1, -1)
    torch.testing.assert_close(value_attention(block.attn, x).reshape(18, 1, -1), block.attn(alone))
    torch.testing.assert_close(value_block(block, x).reshape(18, 1, -1), block(alone))


def test_attention_pooled_dense_is_pooling_of_one_token(tiny):
    model = tiny("siglip").double()
    image = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    tokens, _ = model.visual.dense_tokens(image)
    trunk = model.visual.trunk
    pooled = trunk.head(trunk.fc_norm(trunk.attn_pool(trunk.norm(tokens.reshape(-1, 1, tokens.shape[-1])))))
    expected = torch.nn.functional.normalize(pooled, dim=-1)
    actual = model.encode_dense(image)
    torch.testing.assert_close(actual.reshape(expected.shape), expected)


@pytest.mark.parametrize("schema", ["eva02", "eva01", "eva_postnorm", "vit", "siglip"])
def test_global_embedding_equals_timm(tiny, schema):
    """At the native size nothing is resized, and the forward pass written here is timm's."""
    model = tiny(schema).double()
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model.encode_image(image), model.visual.trunk(image))


@pytest.mark.parametrize("schema", ["eva02", "eva01", "vit", "siglip"])
def test_gradient_checkpointing_changes_nothing_but_memory(tiny, schema):
    model = tiny(schema)
    image = torch.randn(1, 3, 32, 48)
    boxes = [torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.2, 0.1, 0.7, 0.9]])]
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):  # noqa: B023
            loss = model.encode_pseudo_boxes(image, boxes).pow(2).mul(torch.arange(model.embed_dim)).sum()
        model.zero_grad()
        loss.backward()
        grads.append(([p.grad.clone() for p in model.visual.parameters() if p.grad is not None], sum(saved)))
    assert grads[1][1] < grads[0][1] / 2
    for a, b in zip(grads[0][0], grads[1][0], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("schema", ["eva02", "eva01", "vit", "siglip"])
def test_unreached_parameters_are_exactly_those_without_gradient(tiny, schema):
    model = tiny(schema)
    model.encode_dense(torch.randn(1, 3, 32, 48)).mul(torch.randn(model.embed_dim)).sum().backward()
    without = {n for n, p in model.visual.named_parameters() if p.grad is None}
    unreached = {id(p) for p in model.visual.unreached_by_dense()}
    assert without == {n for n, p in model.visual.named_parameters() if id(p) in unreached}


def test_lock_image_tower(tiny):
    model = tiny("vit")
    count = lambda: sum(p.requires_grad for p in model.visual.parameters())  # noqa: E731
    model.lock_image_tower(0)
    assert count() == 0
    model.lock_image_tower(2)
    assert {n.split(".")[2] for n, p in model.visual.named_parameters() if p.requires_grad} == {"1", "2"}
    model.lock_image_tower(5)  # 3 blocks, positions, stem
    frozen = {n for n, p in model.visual.named_parameters() if not p.requires_grad}
    assert frozen == {"trunk.norm.weight", "trunk.norm.bias", "trunk.head.weight"}
    eva = tiny("eva02")
    eva.lock_image_tower(3)
    assert {n.split(".")[1] for n, p in eva.visual.named_parameters() if p.requires_grad} == {"blocks"}
    with pytest.raises(ValueError, match="unlocked_groups is -1"):
        eva.lock_image_tower(-1)


def test_regions_of_one_pass_and_empty_lists(tiny):
    model = tiny("eva02")
    image = torch.randn(2, 3, 32, 48)
    boxes = [torch.tensor([[0.0, 0.0, 0.5, 1.0]]), torch.zeros(0, 4)]
    masks = [torch.zeros(0, 4, 6, dtype=torch.bool), torch.rand(2, 4, 6) > 0.5]
    with torch.no_grad():
        a, b = model.encode_regions(image, boxes, masks, normalize=True)
        torch.testing.assert_close(a, model.encode_pseudo_boxes(image, boxes, normalize=True))
        torch.testing.assert_close(b, model.encode_masks(image, masks, normalize=True))
        assert model.encode_pseudo_boxes(image, [boxes[1], boxes[1]]).shape == (0, 24)
    with pytest.raises(ValueError, match="1 lists of boxes for 2 images"):
        model.encode_pseudo_boxes(image, boxes[:1])
    with pytest.raises(ValueError, match="needs a CLIP ViT"):
        model.encode_pseudo_boxes(image, boxes, extract_type="v1")
    with pytest.raises(ValueError, match="multiples of the patch size 8"):
        model.encode_dense(torch.randn(1, 3, 30, 32))


def test_defaults_are_the_published_ones(tiny):
    model = tiny("eva02")
    image, masks = torch.randn(1, 3, 32, 48), [torch.rand(2, 4, 6) > 0.5]
    with torch.no_grad():
        dense = model.encode_dense(image)
        assert dense.shape == (1, 24, model.embed_dim)  # cells [B, h*w, D]
        torch.testing.assert_close(dense.norm(dim=-1), torch.ones(1, 24))
        torch.testing.assert_close(model.encode_masks(image, masks).norm(dim=-1), torch.ones(2))
        torch.testing.assert_close(
            model.encode_dense(image, keep_shape=True).flatten(2).transpose(1, 2), dense, rtol=0, atol=0
        )


def test_a_temperature_or_bias_written_as_a_whole_number_trains(tiny):
    text, visual = tiny("vit").text, tiny("vit").visual
    model = open_clip.CLIP(visual, text, init_logit_scale=2, init_logit_bias=-10)
    (model.logit_scale.exp() + model.logit_bias).backward()
    assert model.logit_bias.item() == -10 and model.logit_bias.grad.item() == 1


def test_positions_resize_without_antialias():
    positions = torch.randn(1, 16, 5)
    same = resize_positions(positions, (4, 4), (4, 4))
    assert same is positions
    down = resize_positions(positions, (4, 4), (2, 2))
    expected = torch.nn.functional.interpolate(
        positions.reshape(1, 4, 4, 5).permute(0, 3, 1, 2), (2, 2), mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(down.reshape(1, 2, 2, 5).permute(0, 3, 1, 2), expected)


def test_intermediate_maps_for_a_detector(tiny):
    model = tiny("eva02")
    image = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        tokens, levels = model.visual.dense_tokens(image, take=(0, 2))
        x, rope = model.visual.embed(image)
        x = model.visual.run_block(0, x, rope)
    assert [tuple(v.shape) for v in levels] == [(2, 48, 4, 6)] * 2
    torch.testing.assert_close(levels[0].flatten(2).transpose(1, 2), x[:, 1:])
    torch.testing.assert_close(levels[1].flatten(2).transpose(1, 2), tokens)
    with pytest.raises(ValueError, match=r"blocks \[7\] do not exist"):
        model.visual.dense_tokens(image, take=(7,))


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-B-16-SigLIP2-256"])
def test_dense_and_region_calls_of_built_in_models(name):
    """The families beside EVA, whose tiny relatives the other tests use: small inputs, random weights."""
    config = open_clip.get_model_config(name)
    config["text_cfg"].update(layers=1, vocab_size=100)
    model = open_clip.factory.build_model(config).eval()
    patch = model.visual.patch_size
    with torch.no_grad():
        image = torch.randn(1, 3, 2 * patch, 3 * patch)
        dense = model.encode_dense(image, keep_shape=True)
        boxes = model.encode_pseudo_boxes(image, [torch.tensor([[0.0, 0.0, 1.0, 1.0]])], normalize=True)
    assert dense.shape == (1, model.embed_dim, 2, 3) and boxes.shape == (1, model.embed_dim)
    torch.testing.assert_close(dense.norm(dim=1), torch.ones(1, 2, 3))


TRUNKS = {
    "eva02": {"rope": True, "naiveswiglu": True, "subln": True, "eva_model_name": "tiny"},
    "eva01": {"eva_model_name": "tiny"},
    "post-norm": {"rope": True, "postnorm": True, "eva_model_name": "tiny"},
    "openai": {},
}


@pytest.mark.parametrize("kind", TRUNKS)
def test_the_last_block_for_the_class_token_alone(kind):
    """Equal to the ordinary block, in values and gradients; images are not square."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, **TRUNKS[kind]}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    visual = build_model({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}).visual.double()
    with torch.no_grad():
        for parameter in visual.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    block = visual.trunk.blocks[-1]
    assert has_prefix_reading(block)
    image = torch.randn(3, 3, 24, 40, dtype=torch.float64)
    x, rope = visual.embed(image)
    x = visual.run_block(0, x, rope).detach()
    gradients = []
    for output in (visual.run_block(1, x, rope)[:, :1], prefix_block(block, x, rope, 1)):
        visual.zero_grad()
        output.pow(2).sum().backward()
        gradients.append([output.detach(), *(p.grad for p in block.parameters())])
    for ordinary, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(alone, ordinary, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        tokens = visual.run_block(1, visual.run_block(0, *visual.embed(image)), rope)
        expected = visual.trunk.forward_head(visual.trunk.norm(tokens))
        torch.testing.assert_close(visual(image), expected, rtol=1e-10, atol=1e-12)


def test_random_drops_keep_the_ordinary_block():
    visual = open_clip.create_model("ViT-Ti-8-64").visual
    assert has_prefix_reading(visual.trunk.blocks[-1])
    visual.trunk.blocks[-1].attn.attn_drop.p = 0.1
    assert not has_prefix_reading(visual.trunk.blocks[-1])
    visual.trunk.blocks[0].attn.fused_attn = False
    assert not has_prefix_reading(visual.trunk.blocks[0])


@torch.no_grad()
def test_a_model_can_be_pickled(tiny):
    """As ``torch.save(model)`` and loaders that start anew (spawn) do."""
    model, image = tiny("vit"), torch.randn(1, 3, 32, 32)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.encode_dense(image, sizes=[(32, 16)]), model.encode_dense(image, sizes=[(32, 16)]))
