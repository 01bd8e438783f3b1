"""From a model config to a model with random weights: image trunks in three schemas, and the towers around them."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
from timm.layers import LayerNorm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .configs import as_dict, check_vision_cfg
from .image_tower import ImageTower
from .model import CLIP
from .text_tower import QuickGELU, text_tower_from_config
from .transform import PreprocessCfg
from .upstream_api import ImageSize


def _eva_trunk(cfg: dict, embed_dim: int) -> nn.Module:
    """EVA-CLIP schema, told by ``eva_model_name``."""
    subln = bool(cfg.get("subln", False))
    width = cfg["width"]
    return Eva(
        img_size=cfg["image_size"],
        patch_size=cfg["patch_size"],
        num_classes=embed_dim,
        global_pool="avg" if cfg.get("global_average_pool") else "token",
        embed_dim=width,
        depth=cfg["layers"],
        num_heads=width // cfg.get("head_width", 64),
        qkv_bias=cfg.get("qkv_bias", True),
        qkv_fused=not subln,
        mlp_ratio=cfg.get("mlp_ratio", 4.0),
        swiglu_mlp=bool(cfg.get("naiveswiglu", False)),
        scale_mlp=subln,
        scale_attn_inner=subln,
        drop_path_rate=cfg.get("drop_path_rate", 0.0),
        norm_layer=partial(LayerNorm, eps=1e-6),
        init_values=cfg.get("ls_init_value"),
        use_rot_pos_emb=bool(cfg.get("rope", False)),
        ref_feat_shape=(cfg.get("pt_hw_seq_len", 16),) * 2 if cfg.get("rope") else None,
        use_post_norm=bool(cfg.get("postnorm", False)),
        dynamic_img_size=True,
        head_init_scale=1.0,
    )


def _vit_trunk(cfg: dict, embed_dim: int, quick_gelu: bool) -> nn.Module:
    """OpenCLIP ViT schema, told by ``layers`` and ``width`` without ``eva_model_name``."""
    width, pool = cfg["width"], cfg.get("pool_type", "tok")
    if pool not in ("tok", "avg"):
        raise ValueError(f'vision_cfg has pool_type "{pool}": use tok or avg')
    tanh = (cfg.get("act_kwargs") or {}).get("approximate") == "tanh"
    trunk = VisionTransformer(
        img_size=cfg["image_size"],
        patch_size=cfg["patch_size"],
        num_classes=embed_dim,
        global_pool="token" if pool == "tok" else "avg",
        # Of the class token alone the norm is the same before and after pooling.
        fc_norm=pool == "avg" and bool(cfg.get("final_ln_after_pool", False)),
        embed_dim=width,
        depth=cfg["layers"],
        num_heads=width // cfg.get("head_width", 64),
        mlp_ratio=cfg.get("mlp_ratio", 4.0),
        init_values=cfg.get("ls_init_value"),
        pre_norm=not cfg.get("no_ln_pre", False),
        norm_layer=partial(LayerNorm, eps=(cfg.get("norm_kwargs") or {}).get("eps", 1e-5)),
        act_layer=QuickGELU if quick_gelu else partial(nn.GELU, approximate="tanh") if tanh else nn.GELU,
        dynamic_img_size=True,
    )
    if trunk.patch_embed.proj.bias is not None:  # timm gives it one where there is no pre-norm
        trunk.patch_embed.proj = nn.Conv2d(3, width, cfg["patch_size"], cfg["patch_size"], bias=False)
    trunk.head = nn.Linear(width, embed_dim, bias=False)
    return trunk


def _timm_trunk(cfg: dict, embed_dim: int, pretrained: bool) -> nn.Module:
    """OpenCLIP-timm schema, told by ``timm_model_name``."""
    name, proj = cfg["timm_model_name"], cfg.get("timm_proj", "linear") or ""
    if proj not in ("", "none", "linear"):
        raise ValueError(
            f'timm_proj is "{proj}": use the trunk\'s own head (""), a linear projection ("linear") or none ("none")'
        )
    if not timm.is_model(name):
        raise ValueError(
            f'timm has no model "{name}" (timm {timm.__version__}): upgrade timm or correct timm_model_name'
        )
    pool = cfg.get("timm_pool", "avg")
    kwargs: dict[str, Any] = {"global_pool": pool} if pool and proj != "linear" else {}
    try:
        trunk = timm.create_model(
            name,
            pretrained=pretrained,
            num_classes=embed_dim if proj == "" else 0,
            img_size=cfg["image_size"],
            dynamic_img_size=True,
            drop_path_rate=cfg.get("timm_drop_path") or 0.0,
            **kwargs,
        )
    except TypeError as error:  # models of other families do not take these sizes
        raise ValueError(f'timm\'s "{name}" is no plain Vision Transformer ({error}): {_ONLY_VITS}') from error
    if not isinstance(trunk, (Eva, VisionTransformer)):
        raise ValueError(f'timm\'s "{name}" is a {type(trunk).__name__}: {_ONLY_VITS}')
    if type(getattr(trunk.patch_embed, "proj", None)) is not nn.Conv2d:
        raise ValueError(f'timm\'s "{name}" has no plain patch embedding: {_ONLY_VITS}')
    if proj == "linear":
        if pool:
            trunk.reset_classifier(0, global_pool=pool)
        trunk.head = nn.Linear(trunk.num_features, embed_dim, bias=bool(cfg.get("timm_proj_bias", False)))
    return trunk


_ONLY_VITS = "dense readings need a trunk of timm's Eva or VisionTransformer with one patch embedding"


def build_image_tower(config: dict, *, pretrained_image: bool = False) -> ImageTower:
    """Image tower of a config; its keys tell the schema.

    Args:
        pretrained_image: load timm's own weights of the trunk (downloaded), which is then no CLIP yet.

    Raises:
        ValueError: a key is missing, unknown or asks for what no dense ViT has, or the trunk is unknown to timm.
    """
    cfg, embed_dim = as_dict(config["vision_cfg"]), config["embed_dim"]
    cfg.setdefault("image_size", 224)
    check_vision_cfg(cfg)
    if pretrained_image and "timm_model_name" not in cfg:
        raise ValueError("pretrained_image loads timm's weights, and this vision_cfg names no timm_model_name")
    try:
        if "timm_model_name" in cfg:
            trunk = _timm_trunk(cfg, embed_dim, pretrained_image)
        elif "eva_model_name" in cfg:
            trunk = _eva_trunk(cfg, embed_dim)
        else:
            trunk = _vit_trunk(cfg, embed_dim, bool(config.get("quick_gelu", False)))
    except KeyError as error:
        raise ValueError(f"vision_cfg lacks {error}: see src/open_clip/model_configs for the three schemas") from error
    if isinstance(trunk.head, nn.Linear):
        # The projection of CLIP starts at width^-1/2; timm's would start at a classifier's scale.
        nn.init.normal_(trunk.head.weight, std=trunk.head.in_features**-0.5)
    size = ImageSize.of(cfg["image_size"])
    prep = PreprocessCfg.of({**(config.get("preprocess_cfg") or {}), "size": size})
    tower = ImageTower(
        trunk,
        image_size=size[0],
        image_mean=prep.mean,
        image_std=prep.std,
        interpolation=prep.interpolation,
        resize_mode=prep.resize_mode,
    )
    tower.image_size, tower.fill_color = size, prep.fill_color
    if tower.embed_dim != embed_dim:
        raise ValueError(
            f"embed_dim is {embed_dim}, but the image trunk without a projection gives {tower.embed_dim}: correct "
            'embed_dim, or choose a projection with timm_proj "linear"'
        )
    return tower


def build_model(config: dict, *, output_dict: bool = False, pretrained_image: bool = False) -> CLIP:
    """A :class:`~open_clip.model.CLIP` with random weights from a config (see :func:`add_model_config`).

    The config is kept as ``model.config``: with the weights, it is all that is needed to make the model again.

    Raises:
        ValueError: keys that are missing, unknown, or ask for what is not there.
    """
    quick_gelu = bool(config.get("quick_gelu", False))
    text = text_tower_from_config(as_dict(config["text_cfg"]), config["embed_dim"], quick_gelu)
    # Upstream's configs write whole numbers, and a parameter of integers has no gradient.
    kwargs = {k: float(config[k]) for k in ("init_logit_scale", "init_logit_bias") if config.get(k) is not None}
    visual = build_image_tower(config, pretrained_image=pretrained_image)
    model = CLIP(visual, text, output_dict=output_dict, **kwargs)
    model.config = {**config, "vision_cfg": as_dict(config["vision_cfg"]), "text_cfg": as_dict(config["text_cfg"])}
    return model
