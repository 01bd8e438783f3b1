"""Models by name: configs, construction, weights and image preparation, with OpenCLIP's calls."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from timm.layers import LayerNorm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from . import pretrained as pretrained_weights
from .image_tower import OPENAI_MEAN, OPENAI_STD, ImageTower
from .model import CLIP
from .text_tower import QuickGELU, text_tower_from_config
from .tokenizer import HFTokenizer, SimpleTokenizer
from .transform import image_transform
from .weights import load_weights

log = logging.getLogger(__name__)

_PRECISIONS = {
    "fp32": torch.float32, "amp": torch.float32, "amp_bf16": torch.float32, "amp_bfloat16": torch.float32,
    "fp16": torch.float16, "pure_fp16": torch.float16, "bf16": torch.bfloat16, "pure_bf16": torch.bfloat16,
}  # fmt: skip

# -- configs ----------------------------------------------------------------------------------------------------------

_configs: dict[str, dict] = {}


def add_model_config(path: str | Path, name: str | None = None) -> None:
    """Register a model config file, or every ``*.json`` of a folder.

    Args:
        path: json in the EVA-CLIP, OpenCLIP ViT or OpenCLIP-timm schema; or OpenCLIP's hub form with ``model_cfg``.
        name: name of the model; the file's stem when None (a file called ``config.json`` takes its folder's name).

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: not json, or without ``embed_dim``, ``vision_cfg`` and ``text_cfg``.
    """
    path = Path(path)
    if path.is_dir():
        for file in sorted(path.glob("*.json")):
            add_model_config(file)
        return
    if not path.is_file():
        raise FileNotFoundError(f"model config {path} does not exist: check the path")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"model config {path} is not json: {error}") from error
    if isinstance(config, dict) and isinstance(config.get("model_cfg"), dict):
        config = {**config["model_cfg"], "preprocess_cfg": config.get("preprocess_cfg", {})}
    missing = [k for k in ("embed_dim", "vision_cfg", "text_cfg") if not isinstance(config, dict) or k not in config]
    if missing:
        raise ValueError(
            f"model config {path} lacks {', '.join(missing)}: see src/open_clip/model_configs for examples"
        )
    _configs[name or (path.parent.name if path.stem == "config" else path.stem)] = config


add_model_config(Path(__file__).parent / "model_configs")


def list_models() -> list[str]:
    """Names of all known models, sorted."""
    return sorted(_configs)


def get_model_config(name: str) -> dict | None:
    """A copy of the config of a model, or None when there is no such model."""
    config = _configs.get(_canonical(name))
    return None if config is None else json.loads(json.dumps(config))


def _canonical(name: str) -> str:
    return name.replace("/", "-")  # OpenAI writes ViT-B/16


def _known_config(name: str) -> dict:
    config = get_model_config(name)
    if config is None:
        near = difflib.get_close_matches(_canonical(name), list_models(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known models: {', '.join(list_models())}"
        raise ValueError(f'model "{name}" is unknown: {hint} (open_clip.add_model_config adds one)')
    return config


# -- construction -----------------------------------------------------------------------------------------------------


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
    width = cfg["width"]
    trunk = VisionTransformer(
        img_size=cfg["image_size"],
        patch_size=cfg["patch_size"],
        num_classes=embed_dim,
        global_pool="token",
        embed_dim=width,
        depth=cfg["layers"],
        num_heads=width // cfg.get("head_width", 64),
        mlp_ratio=cfg.get("mlp_ratio", 4.0),
        init_values=cfg.get("ls_init_value"),
        pre_norm=True,
        norm_layer=partial(LayerNorm, eps=1e-5),
        act_layer=QuickGELU if quick_gelu else nn.GELU,
        dynamic_img_size=True,
    )
    trunk.head = nn.Linear(width, embed_dim, bias=False)
    return trunk


def _timm_trunk(cfg: dict, embed_dim: int) -> nn.Module:
    """OpenCLIP-timm schema, told by ``timm_model_name``."""
    name, proj = cfg["timm_model_name"], cfg.get("timm_proj") or ""
    if proj not in ("", "none"):
        raise ValueError(f'timm_proj is "{proj}": only the trunk\'s own head ("") or none ("none") is supported')
    if not timm.is_model(name):
        raise ValueError(
            f'timm has no model "{name}" (timm {timm.__version__}): upgrade timm or correct timm_model_name'
        )
    kwargs = {"global_pool": cfg["timm_pool"]} if cfg.get("timm_pool") else {}
    return timm.create_model(
        name,
        num_classes=0 if proj == "none" else embed_dim,
        img_size=cfg["image_size"],
        dynamic_img_size=True,
        drop_path_rate=cfg.get("timm_drop_path") or 0.0,
        **kwargs,
    )


def build_image_tower(config: dict) -> ImageTower:
    """Image tower of a config; its keys tell the schema. ValueError when a key is missing or the trunk unknown."""
    cfg, embed_dim = config["vision_cfg"], config["embed_dim"]
    cfg.setdefault("image_size", 224)
    try:
        if "timm_model_name" in cfg:
            trunk = _timm_trunk(cfg, embed_dim)
        elif "eva_model_name" in cfg:
            trunk = _eva_trunk(cfg, embed_dim)
        else:
            trunk = _vit_trunk(cfg, embed_dim, bool(config.get("quick_gelu", False)))
    except KeyError as error:
        raise ValueError(f"vision_cfg lacks {error}: see src/open_clip/model_configs for the three schemas") from error
    if isinstance(trunk.head, nn.Linear):
        # The projection of CLIP starts at width^-1/2; timm's would start at a classifier's scale.
        nn.init.normal_(trunk.head.weight, std=trunk.head.in_features**-0.5)
    prep = config.get("preprocess_cfg", {})
    return ImageTower(
        trunk,
        image_size=cfg["image_size"],
        image_mean=prep.get("mean", OPENAI_MEAN),
        image_std=prep.get("std", OPENAI_STD),
        interpolation=prep.get("interpolation", "bicubic"),
        resize_mode=prep.get("resize_mode", "shortest"),
    )


def build_model(config: dict, *, output_dict: bool = False) -> CLIP:
    """A :class:`~open_clip.model.CLIP` with random weights from a config (see :func:`add_model_config`)."""
    text = text_tower_from_config(config["text_cfg"], config["embed_dim"], bool(config.get("quick_gelu", False)))
    kwargs = {k: config[k] for k in ("init_logit_scale", "init_logit_bias") if config.get(k) is not None}
    return CLIP(build_image_tower(config), text, output_dict=output_dict, **kwargs)


# -- public calls -----------------------------------------------------------------------------------------------------


def create_model(
    name: str,
    pretrained: str | Path | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
    force_image_size: int | None = None,
    force_quick_gelu: bool = False,
    output_dict: bool = False,
) -> CLIP:
    """Build a model and load its weights.

    Args:
        name: one of :func:`list_models`.
        pretrained: a tag of :func:`list_pretrained` (downloaded), a checkpoint file in any layout, ``"eva"`` with
            ``cache_dir`` naming the file, or None / ``""`` for random weights.
        precision: ``"fp32"``; ``"fp16"`` / ``"bf16"`` (or ``pure_*``) store the weights so; ``amp*`` keep float32.
        device: where the model is put.
        cache_dir: folder of the download cache; with ``pretrained="eva"`` the checkpoint file.
        force_image_size: another native size; position embeddings are resized.
        force_quick_gelu: use QuickGELU although the config does not say so (OpenAI's weights need it).
        output_dict: whether the model's ``forward`` returns a dict.

    Raises:
        ValueError: unknown model, tag or precision, or weights of another architecture.
        FileNotFoundError, RuntimeError: weights that are missing, damaged or cannot be fetched.
    """
    if precision not in _PRECISIONS:
        raise ValueError(f'precision is "{precision}": use one of {", ".join(_PRECISIONS)}')
    config = _known_config(name)
    if force_image_size is not None:
        config["vision_cfg"]["image_size"] = force_image_size
    config["quick_gelu"] = bool(config.get("quick_gelu", False)) or force_quick_gelu
    file = _weights_file(_canonical(name), pretrained, cache_dir, config)
    model = build_model(config, output_dict=output_dict)
    if file is not None:
        load_weights(model, file, resize=force_image_size is not None)
    return model.to(device=device, dtype=_PRECISIONS[precision])


def _weights_file(name: str, pretrained: str | Path | None, cache_dir: str | Path | None, config: dict) -> Path | None:
    """The checkpoint file that ``pretrained`` means, downloaded if need be; None for random weights.

    A tag whose weights were trained with QuickGELU or with another pixel normalisation changes ``config`` accordingly.
    """
    if not pretrained:
        return None
    if str(pretrained) == "eva":
        if cache_dir is None:
            raise ValueError('pretrained="eva" takes the checkpoint file in cache_dir: give cache_dir=FILE')
        if not Path(cache_dir).is_file():
            raise FileNotFoundError(f'checkpoint {cache_dir} (cache_dir of pretrained="eva") does not exist')
        return Path(cache_dir)
    if pretrained in pretrained_weights.list_pretrained_tags(name):
        info = pretrained_weights.pretrained_info(name, pretrained)
        if getattr(info, "quick_gelu", None):
            config["quick_gelu"] = True
        prep = {k: getattr(info, k, None) for k in ("mean", "std", "interpolation", "resize_mode")}
        config.setdefault("preprocess_cfg", {}).update({k: v for k, v in prep.items() if v is not None})
        return Path(pretrained_weights.download(name, pretrained, cache_dir=cache_dir))
    if Path(pretrained).is_file():
        return Path(pretrained)
    tags = ", ".join(pretrained_weights.list_pretrained_tags(name)) or "none"
    raise ValueError(f'pretrained "{pretrained}" is neither a file nor a tag of {name}: its tags are {tags}')


def create_model_and_transforms(
    name: str, pretrained: str | Path | None = None, **kwargs
) -> tuple[CLIP, Callable, Callable]:
    """(model, preprocess_train, preprocess_val), as OpenCLIP. Keyword arguments are those of :func:`create_model`.

    Both transforms turn a PIL image (or uint8 ``[3, H, W]``) into a normalised float ``[3, n, n]`` of native size n;
    the training one crops at random (90 to 100 % of the area).
    """
    model = create_model(name, pretrained, **kwargs)
    visual = model.visual
    make = partial(
        image_transform, visual.image_size, mean=visual.image_mean, std=visual.image_std,
        interpolation=visual.interpolation,
    )  # fmt: skip
    return model, make(mode="random"), make(mode=visual.resize_mode)


def create_model_from_pretrained(name: str, pretrained: str | Path, **kwargs) -> tuple[CLIP, Callable]:
    """(model in eval mode, preprocess), requiring weights. Keyword arguments are those of :func:`create_model`."""
    if not pretrained:
        raise ValueError(f"create_model_from_pretrained({name!r}) needs weights: give a tag or a file as pretrained")
    model, _, preprocess = create_model_and_transforms(name, pretrained, **kwargs)
    return model.eval(), preprocess


def get_tokenizer(name: str, context_length: int | None = None, cache_dir: str | None = None) -> Callable:
    """Tokenizer of a model: a callable from a text or list of texts to ids ``[N, L]`` (int64)."""
    text_cfg = _known_config(name)["text_cfg"]
    length = context_length or text_cfg.get("context_length", 77)
    if hf_name := text_cfg.get("hf_tokenizer_name"):
        return HFTokenizer(hf_name, context_length=length, cache_dir=cache_dir, **text_cfg.get("tokenizer_kwargs", {}))
    return SimpleTokenizer(context_length=length)


def list_pretrained() -> list[tuple[str, str]]:
    """All (model, tag) pairs whose weights can be fetched."""
    return pretrained_weights.list_pretrained()
