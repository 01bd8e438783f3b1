"""Small models of every kind of trunk, with weights that are nowhere zero."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from timm.models.eva import Eva
from torch import nn

from open_clip import CLIP, ImageTower
from open_clip.factory import build_model

TEXT = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
SIZES = {"image_size": 32, "layers": 3, "width": 48, "head_width": 12, "patch_size": 8}
VISION = {
    "eva02": {"eva_model_name": "t", "rope": True, "naiveswiglu": True, "subln": True, "mlp_ratio": 2.6667},
    "eva01": {"eva_model_name": "t", "mlp_ratio": 4.3637},
    "eva_postnorm": {"eva_model_name": "t", "postnorm": True},
    "vit": {},
    "layerscale": {"ls_init_value": 0.5},
    "eva_layerscale": {"eva_model_name": "t", "rope": True, "ls_init_value": 0.5},
}
# Trunks of timm that no config of ours describes, which published models use: other attention and rotary embedding.
TRUNKS = {
    "attn_rope": {"attn_type": "rope", "qkv_fused": False, "use_rot_pos_emb": True},
    "rope_mixed": {"attn_type": "rope", "use_rot_pos_emb": True, "rope_type": "mixed", "rope_grid_indexing": "xy"},
}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., CLIP]:
    """A function of a kind of trunk (and of ``layers``) that makes a small model in eval mode."""

    def make(kind: str, layers: int = 3) -> CLIP:
        torch.manual_seed(0)
        vision, dim = {**SIZES, **VISION.get(kind, {}), "layers": layers}, 24
        if kind == "siglip":
            vision = {"timm_model_name": "test_vit4", "image_size": 32, "timm_pool": "map", "timm_proj": "none"}
            dim = 96
        model = build_model({"embed_dim": dim, "vision_cfg": vision, "text_cfg": TEXT}).eval()
        if kind in TRUNKS:
            if missing := set(TRUNKS[kind]) - set(inspect.signature(Eva).parameters):
                pytest.skip(f"this release of timm has no {', '.join(sorted(missing))}")
            trunk = Eva(
                img_size=32, patch_size=8, num_classes=dim, global_pool="token", embed_dim=48, depth=layers,
                num_heads=4, dynamic_img_size=True, **TRUNKS[kind],
            )  # fmt: skip
            model.visual = ImageTower(trunk, image_size=32).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2) if parameter.ndim else None
        return model

    return make
