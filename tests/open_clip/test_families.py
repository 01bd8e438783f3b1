"""Every family of Vision Transformers, shrunk: all global, dense and region calls, and what their configs may say."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
import torch.nn.functional as F

import open_clip
from open_clip.factory import build_model

FAMILIES = [
    "ViT-B-16", "ViT-B-32-quickgelu", "ViT-H-14", "ViT-bigG-14", "ViT-M-16-alt", "ViT-L-14-CLIPA", "ViT-H-14-worldwide",
    "ViT-B-16-SigLIP", "ViT-SO400M-14-SigLIP-384", "ViT-SO400M-16-SigLIP-i18n-256", "ViT-gopt-16-SigLIP2-256",
    "PE-Core-B-16", "PE-Core-T-16-384", "PE-Core-L-14-336", "EVA01-g-14", "EVA02-B-16", "EVA02-E-14-plus",
    "EVA02-CLIP-L-14", "EVA02-CLIP-bigE-14", "MobileCLIP2-L-14", "vit_medium_patch16_gap_256",
]  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """A function from a name to that model with two blocks of 48 channels; everything else is the family's own."""
    create = timm.create_model
    shrunk = functools.partial(create, embed_dim=48, depth=2, num_heads=2)
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: shrunk(*args, **kwargs))

    def build(name: str) -> open_clip.CLIP:
        config = open_clip.get_model_config(name)
        vision, text = config["vision_cfg"], config["text_cfg"]
        if "timm_model_name" not in vision:
            vision.update(width=48, layers=2, head_width=24)
        else:
            patch = {"14": 14, "32": 32}.get(vision["timm_model_name"].split("patch")[1][:2], 16)
            vision["image_size"] = 4 * patch
        text.update(width=48, layers=1, heads=2, vocab_size=120)
        config["embed_dim"] = 48 if vision.get("timm_proj") == "none" else 40
        if text.get("proj_type") == "none":
            text["width"] = config["embed_dim"]
        torch.manual_seed(0)
        model = build_model(config).eval()
        for p in model.parameters():  # nowhere zero, so that nothing hides
            if p.ndim:
                torch.nn.init.normal_(p, std=0.2)
        return model

    return build


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_all_calls(small, name):
    model = small(name)
    patch, dim, grid = model.visual.patch_size, model.embed_dim, (3, 4)
    image = torch.randn(2, 3, grid[0] * patch, grid[1] * patch)
    boxes = [torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.25, 0.0, 0.5, 1.0]]), torch.zeros(0, 4)]
    masks = [torch.ones(1, *grid, dtype=torch.bool), torch.zeros(0, *grid, dtype=torch.bool)]
    dense = model.encode_dense(image, keep_shape=True)
    assert dense.shape == (2, dim, *grid)
    torch.testing.assert_close(dense.norm(dim=1), torch.ones(2, *grid))
    pooled, averaged = model.encode_regions(image, boxes, masks)
    torch.testing.assert_close(averaged[0], dense[0].flatten(1).mean(1))
    torch.testing.assert_close(pooled, model.encode_pseudo_boxes(image, boxes))
    assert pooled.shape == (2, dim) and model.encode_masks(image, masks).shape == (1, dim)
    rois, whole = model.encode_rois_and_image(image, boxes)
    torch.testing.assert_close(whole, model.encode_image(image, normalize=True))
    torch.testing.assert_close(rois, F.normalize(pooled, dim=-1))
    ids = torch.randint(3, 119, (2, min(8, model.context_length)))
    assert model.encode_text(ids).shape == (2, dim)
    features = model(image, ids)
    torch.testing.assert_close(features[0], whole)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_global_embedding_is_timms(small, name):
    """At the native size nothing is resized."""
    model = small(name).double()
    image = torch.randn(2, 3, *model.visual.image_size, dtype=torch.float64)
    expected = model.visual.trunk(image)
    torch.testing.assert_close(model.encode_image(image), expected)
    out = model.forward_intermediates(image, image_indices=1, normalize=False)
    torch.testing.assert_close(out["image_features"], expected)


def test_clipa_is_read_as_published(small):
    """No pre-norm, no bias of the patches, the mean of the patches, and the norm behind it."""
    trunk = small("ViT-L-14-CLIPA").visual.trunk
    assert isinstance(trunk.norm_pre, torch.nn.Identity) and isinstance(trunk.norm, torch.nn.Identity)
    assert trunk.patch_embed.proj.bias is None and isinstance(trunk.fc_norm, torch.nn.LayerNorm)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        x, _ = trunk_tokens(trunk, image)
        expected = trunk.head(trunk.fc_norm(x[:, 1:].mean(1)))
        torch.testing.assert_close(trunk(image), expected)


def trunk_tokens(trunk, image):
    x = trunk.patch_embed.proj(image).flatten(2).transpose(1, 2)
    x = torch.cat([trunk.cls_token, x], dim=1) + trunk.pos_embed
    for block in trunk.blocks:
        x = block(x)
    return x, trunk.blocks


def test_a_bias_of_the_logits_is_a_number_with_a_gradient(small):
    """Published configs write the whole number -10."""
    config = open_clip.get_model_config("ViT-Ti-8-64") | {"init_logit_bias": -10, "init_logit_scale": 2}
    model = build_model(config)
    assert model.logit_bias.dtype == model.logit_scale.dtype == torch.float32
    assert model.logit_bias.item() == -10 and model.logit_bias.requires_grad
    assert small("ViT-B-16-SigLIP").logit_bias.item() == -10


VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
EVA = {**VIT, "eva_model_name": "tiny"}
TIMM = {"timm_model_name": "test_vit4", "image_size": 32, "timm_pool": "map", "timm_proj": "none"}


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({**VIT, "head_widht": 16}, "unknown key head_widht: did you mean head_width"),
        ({**VIT, "attentional_pool": True}, "sets attentional_pool to True: the pooler of CoCa"),
        ({**VIT, "patch_dropout": 0.5}, "dense maps need every patch"),
        ({**VIT, "pos_embed_type": "sin_cos_2d"}, "pos_embed_type .* is not supported"),
        ({**VIT, "pool_type": "max"}, "use tok or avg"),
        ({**VIT, "qk_norm": True}, "qk_norm"),
        ({**VIT, "layers": [3, 4, 6, 3]}, "list of layers, which is a ResNet"),
        ({**EVA, "nosuch": 1}, "unknown key nosuch"),
        ({**EVA, "patch_dropout": 0.5}, "dense maps need every patch"),
        ({**TIMM, "timm_drop": 0.1}, "timm_drop"),
        ({**TIMM, "timm_proj": "mlp"}, 'timm_proj is "mlp"'),
        ({**TIMM, "timm_model_name": "resnet18"}, "resnet18.* is no|resnet18.* is a ResNet"),
        ({**TIMM, "timm_model_name": "vit_base_mci_224", "timm_proj": ""}, "has no plain patch embedding"),
        ({**TIMM, "timm_model_name": "vit_nosuch"}, 'timm has no model "vit_nosuch"'),
        (TIMM, "embed_dim is 40, but the image trunk without a projection gives 96"),
    ],
)
def test_vision_configs_that_are_refused(vision, message):
    text = {"width": 32, "heads": 2, "layers": 1}
    with pytest.raises(ValueError, match=message) as error:
        build_model({"embed_dim": 40, "vision_cfg": vision, "text_cfg": text})
    assert "\n" not in str(error.value)


def test_values_that_say_nothing_new_are_taken():
    vision = {**VIT, "patch_dropout": 0.0, "attentional_pool": False, "pool_type": "tok", "output_tokens": False}
    text = {"width": 32, "heads": 2, "layers": 1, "hf_pooler_type": "mean_pooler", "ls_init_value": None}
    build_model({"embed_dim": 40, "vision_cfg": vision, "text_cfg": text})
    cfg = open_clip.CLIPVisionCfg(**VIT), open_clip.CLIPTextCfg(width=32, heads=2, layers=1)
    model = build_model({"embed_dim": 40, "vision_cfg": cfg[0], "text_cfg": cfg[1]})
    assert model.visual.width == 32 and model.config["vision_cfg"]["width"] == 32


def test_a_linear_projection_beside_a_trunk():
    """OpenCLIP's default for trunks of timm: a matrix without bias, which its files call visual.head.proj."""
    vision = {"timm_model_name": "test_vit4", "image_size": 32, "timm_pool": ""}
    config = {"embed_dim": 40, "vision_cfg": vision, "text_cfg": {"width": 32, "heads": 2, "layers": 1}}
    source, target = build_model(config).eval(), build_model(config).eval()
    assert source.visual.trunk.head.bias is None
    state = {k.replace("visual.trunk.head.", "visual.head.proj."): v for k, v in source.state_dict().items()}
    open_clip.factory.load_state(target, state)
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(source.encode_image(image), target.encode_image(image))
