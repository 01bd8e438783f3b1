"""Model configs: those that are built in, how others are added, and what their keys may say."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class CLIPVisionCfg:
    """Keys of a ``vision_cfg`` in the OpenCLIP schemas, with OpenCLIP's defaults.

    A trunk is OpenCLIP's own ViT (``layers``, ``width``, ...) or one of timm (``timm_model_name``). Keys in the second
    half choose things that no ViT read densely here has; they may be given only with the value that they have here
    (:func:`check_vision_cfg`).

    Attributes:
        layers, width, head_width, mlp_ratio: size of the transformer.
        patch_size, image_size: pixels; ``image_size`` may be (height, width).
        ls_init_value: initial LayerScale, None for none.
        no_ln_pre: no norm in front of the first block (CLIPA).
        pool_type: what the embedding is read from: ``"tok"``, the class token, or ``"avg"``, the mean of the patches.
        final_ln_after_pool: the final norm comes after pooling.
        act_kwargs, norm_kwargs: ``approximate`` of the GELU, ``eps`` of the norms.
        timm_model_name: a Vision Transformer of timm.
        timm_pool: its pooling: ``"token"``, ``"avg"``, ``"map"``, or ``""`` for the trunk's own.
        timm_proj: ``""``, the trunk's classifier is the projection; ``"linear"``, a projection of its own; ``"none"``.
        timm_proj_bias: whether a ``"linear"`` projection has a bias.
        timm_drop_path: stochastic depth.
    """

    layers: int = 12
    width: int = 768
    head_width: int = 64
    mlp_ratio: float = 4.0
    patch_size: int = 16
    image_size: int | tuple[int, int] = 224
    ls_init_value: float | None = None
    no_ln_pre: bool = False
    pool_type: str = "tok"
    final_ln_after_pool: bool = False
    act_kwargs: dict | None = None
    norm_kwargs: dict | None = None
    timm_model_name: str | None = None
    timm_pool: str = "avg"
    timm_proj: str | None = "linear"
    timm_proj_bias: bool = False
    timm_drop_path: float | None = None
    # Only with these values:
    timm_model_pretrained: bool = False
    timm_drop: float = 0.0
    patch_dropout: float = 0.0
    attentional_pool: bool = False
    attn_pooler_queries: int = 256
    attn_pooler_heads: int = 8
    pos_embed_type: str = "learnable"
    output_tokens: bool = False
    block_type: str | None = None
    qk_norm: bool = False
    scaled_cosine_attn: bool = False
    scale_heads: bool = False
    scale_attn_inner: bool = False
    scale_attn: bool = False
    scale_fc: bool = False


@dataclass
class CLIPTextCfg:
    """Keys of a ``text_cfg`` in the OpenCLIP schemas, with OpenCLIP's defaults.

    As in :class:`CLIPVisionCfg`, those of the second half may be given only with the value that they have here.

    Attributes:
        context_length: tokens a text.
        vocab_size: number of token ids.
        hf_tokenizer_name: tokenizer of the hub; CLIP's own byte-pair encoding when None.
        tokenizer_kwargs: its options, e.g. ``clean``.
        width, heads, layers, mlp_ratio: size of the transformer.
        no_causal_mask: a token sees those behind it too.
        pool_type: token that is read: ``"argmax"`` (the largest id is the end), ``"eos"`` (the first ``eos_id``),
            ``"last"`` or ``"first"``.
        eos_id: id of the end token for ``"eos"``.
        proj_type: ``"linear"`` or ``"none"``.
        proj_bias: whether the projection has a bias.
        act_kwargs, norm_kwargs: ``approximate`` of the GELU, ``eps`` of the norms.
    """

    context_length: int = 77
    vocab_size: int = 49408
    hf_tokenizer_name: str | None = None
    tokenizer_kwargs: dict | None = None
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    no_causal_mask: bool = False
    pool_type: str = "argmax"
    pad_id: int = 0
    eos_id: int = 2
    proj_type: str | None = "linear"
    proj_bias: bool = False
    act_kwargs: dict | None = None
    norm_kwargs: dict | None = None
    # Only with these values:
    tokenizer_mode: str | None = None
    ls_init_value: float | None = None
    embed_cls: bool = False
    final_ln_after_pool: bool = False
    output_tokens: bool = False
    block_type: str | None = None
    qk_norm: bool = False
    scaled_cosine_attn: bool = False
    scale_heads: bool = False
    scale_attn_inner: bool = False
    scale_attn: bool = False
    scale_fc: bool = False
    hf_model_name: str | None = None
    hf_model_pretrained: bool = True
    hf_proj_type: str = "mlp"
    hf_pooler_type: str = "mean_pooler"


# Why a key may not be set to something else than its default.
_BELONGS_ELSEWHERE = {
    "attentional_pool": "the pooler of CoCa, whose captioner is not part of this package",
    "embed_cls": "the text tower of CoCa, whose captioner is not part of this package",
    "patch_dropout": "dense maps need every patch",
    "output_tokens": "ask forward_intermediates for tokens",
    "hf_model_name": "text models of the hub are not supported, only CLIP's and SigLIP's own text towers",
    "timm_model_pretrained": "pass pretrained_image=True to create_model",
}
# What the EVA-CLIP schema has beside the sizes; the first group has an effect, the second chooses kernels or repeats
# what the first says.
_EVA_KEYS = {
    "eva_model_name", "image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "qkv_bias", "subln",
    "naiveswiglu", "global_average_pool", "drop_path_rate", "ls_init_value", "rope", "pt_hw_seq_len", "postnorm",
    "xattn", "fusedLN", "intp_freq",
}  # fmt: skip
_EVA_ONLY_OFF = {"patch_dropout": 0, "pretrained_image": ""}
_TEXT_WITHOUT_EFFECT = {"xattn", "fusedLN", "masked_language_modeling", "attn_mask", "head_width"}


def check_vision_cfg(cfg: dict) -> None:
    """Refuse a ``vision_cfg`` with keys that nothing here reads, so that no model is built otherwise than described.

    Raises:
        ValueError: an unknown key, or one whose value asks for something that is not there.
    """
    if "eva_model_name" in cfg:
        allowed, fixed = _EVA_KEYS | set(_EVA_ONLY_OFF), dict(_EVA_ONLY_OFF)
    else:
        allowed, fixed = _keys_and_fixed(CLIPVisionCfg, first_fixed="timm_model_pretrained")
    _check("vision_cfg", cfg, allowed, fixed)
    if "timm_model_name" not in cfg and isinstance(cfg.get("layers"), (list, tuple)):
        raise ValueError(
            "vision_cfg gives a list of layers, which is a ResNet: only Vision Transformers are read densely"
        )


def check_text_cfg(cfg: dict) -> None:
    """As :func:`check_vision_cfg`, for a ``text_cfg`` of any schema."""
    allowed, fixed = _keys_and_fixed(CLIPTextCfg, first_fixed="tokenizer_mode")
    for key in [k for k in fixed if k.startswith("hf_") and k != "hf_model_name"]:
        del fixed[key]  # without a hub model they say nothing
    _check("text_cfg", cfg, allowed | _TEXT_WITHOUT_EFFECT, fixed)


def _keys_and_fixed(kind: type, first_fixed: str) -> tuple[set[str], dict[str, Any]]:
    fields = dataclasses.fields(kind)
    start = next(i for i, f in enumerate(fields) if f.name == first_fixed)
    return {f.name for f in fields}, {f.name: f.default for f in fields[start:]}


def _check(where: str, cfg: dict, allowed: set[str], fixed: dict[str, Any]) -> None:
    for key in sorted(set(cfg) - allowed):
        near = difflib.get_close_matches(key, allowed, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(allowed - set(fixed)))}"
        raise ValueError(f"{where} has the unknown key {key}: {hint}")
    for key, default in fixed.items():
        if key in cfg and cfg[key] != default and not (not cfg[key] and not default):
            reason = _BELONGS_ELSEWHERE.get(key, "no published ViT needs it, and it is not supported")
            raise ValueError(f"{where} sets {key} to {cfg[key]!r}: {reason}")


# -- models by name ---------------------------------------------------------------------------------------------------

_configs: dict[str, dict] = {}

# OpenCLIP's models that have no dense reading here, by the beginning of their names.
_HUB_TEXT = "its text tower is a model of the hub (hf_model_name), and only CLIP's and SigLIP's own are supported"
_REFUSED = {
    r"RN\d": "a ResNet has no patch tokens to read densely; use a ViT of the same source, such as ViT-B-16",
    r"convnext": "a ConvNeXt has no patch tokens to read densely; use a ViT, such as ViT-B-16",
    r"swin": "a Swin transformer has no tokens of one grid through all its blocks; use a ViT, such as ViT-B-16",
    r"ViTamin": "its trunk mixes convolution stages with a transformer; use a ViT, such as ViT-L-14",
    r"MobileCLIP2?-S": "its trunk is a FastViT, convolutions with a few attention stages; use MobileCLIP2-L-14",
    r"MobileCLIP2?-B": "its patches come from convolutions that reach over patch borders; use MobileCLIP2-L-14",
    r"vit_relpos": "its positions are biases inside attention, which the dense reading removes; use ViT-M-16",
    r"coca": "CoCa is a captioner with a pooler of its own; use the ViT of the same source, such as ViT-L-14",
    r"(mt5|nllb|roberta|xlm)": _HUB_TEXT,
}  # fmt: skip


def why_refused(name: str) -> str | None:
    """Why a model of OpenCLIP is not offered here, in one phrase; None for other names."""
    return next((reason for pattern, reason in _REFUSED.items() if re.match(pattern, name)), None)


def canonical(name: str) -> str:
    """A model's name as it is registered; OpenAI writes ViT-B/16."""
    return name.replace("/", "-")


def model_config_of(content: object, source: str | Path) -> dict:
    """A model config in one of its two forms, bare or with ``model_cfg`` (the hub's), as the bare one.

    Raises:
        ValueError: ``embed_dim``, ``vision_cfg`` or ``text_cfg`` is not there.
    """
    if isinstance(content, dict) and isinstance(content.get("model_cfg"), dict):
        content = {**content["model_cfg"], "preprocess_cfg": content.get("preprocess_cfg") or {}}
    missing = [k for k in ("embed_dim", "vision_cfg", "text_cfg") if not isinstance(content, dict) or k not in content]
    if missing:
        raise ValueError(
            f"model config {source} lacks {', '.join(missing)}: see src/open_clip/model_configs for examples"
        )
    return content


def read_config(path: str | Path) -> dict:
    """A model config file. FileNotFoundError or ValueError with the file's name when there is none in it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"model config {path} does not exist: check the path")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"model config {path} is not json: {error}") from error
    return model_config_of(content, path)


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
    config = read_config(path)
    _configs[name or (path.parent.name if path.stem == "config" else path.stem)] = config


add_model_config(Path(__file__).parent / "model_configs")


def list_models() -> list[str]:
    """Names of all known models, sorted."""
    return sorted(_configs)


def known_config(name: str) -> dict:
    """A copy of the config of a registered model. ValueError that names similar models, or says why there is none."""
    config = _configs.get(canonical(name))
    if config is not None:
        return json.loads(json.dumps(config))
    if reason := why_refused(canonical(name)):
        raise ValueError(f'model "{name}" of OpenCLIP has no dense reading: {reason}')
    near = difflib.get_close_matches(canonical(name), list_models(), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known models: {', '.join(list_models())}"
    raise ValueError(f'model "{name}" is unknown: {hint} (open_clip.add_model_config adds one)')


def as_dict(cfg: dict | CLIPVisionCfg | CLIPTextCfg) -> dict:
    """A config as a dict; of a dataclass without the keys of the schema that it does not choose."""
    if isinstance(cfg, dict):
        return dict(cfg)
    values = {f.name: v for f in dataclasses.fields(cfg) if (v := getattr(cfg, f.name)) is not None}
    if isinstance(cfg, CLIPVisionCfg):
        other = ("timm_",) if cfg.timm_model_name is None else ("layers", "width", "head_width", "mlp_ratio")
        values = {k: v for k, v in values.items() if not k.startswith(other)}
    return values
