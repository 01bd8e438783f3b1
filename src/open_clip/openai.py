"""OpenAI's published CLIP models by name, or by a file of theirs."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch
from torch import Tensor

from .build import build_model
from .factory import create_model
from .model import CLIP
from .precision import DTYPES
from .pretrained import list_pretrained_models_by_tag
from .weight_files import load_state_dict_file
from .weights import detect_layout, load_state

log = logging.getLogger(__name__)


def list_openai_models() -> list[str]:
    """Names of the models that have OpenAI's weights; its ResNets are not among them."""
    return list_pretrained_models_by_tag("openai")


def openai_config(state: dict[str, Tensor]) -> dict:
    """Model config of a state dict in OpenAI's layout, read from its shapes; QuickGELU and heads of 64 channels.

    Raises:
        ValueError: tensors of another layout.
    """
    if detect_layout(state) != "openai":
        raise ValueError("the tensors have not OpenAI's names: load them into a model by name")
    width, _, patch, _ = state["visual.conv1.weight"].shape
    cells = len(state["visual.positional_embedding"]) - 1
    text_width = len(state["ln_final.weight"])
    layers = lambda start: len({m[1] for k in state if (m := re.match(rf"{start}resblocks\.(\d+)\.", k))})  # noqa: E731
    return {
        "embed_dim": state["text_projection"].shape[1],
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": round(cells**0.5) * patch, "layers": layers(r"visual\.transformer\."), "width": width,
            "patch_size": patch,
        },
        "text_cfg": {
            "context_length": len(state["positional_embedding"]), "vocab_size": len(state["token_embedding.weight"]),
            "width": text_width, "heads": text_width // 64, "layers": layers(r"transformer\."),
        },
    }  # fmt: skip


def load_openai_model(
    name: str | Path,
    precision: str | None = None,
    device: str | torch.device | None = None,
    cache_dir: str | Path | None = None,
) -> CLIP:
    """One of OpenAI's models, in eval mode.

    Args:
        name: one of :func:`list_openai_models`, or a file: OpenAI's TorchScript archives too, whose code does not run.
        precision: see :func:`create_model`; ``"fp32"`` when None.
        device: the GPU where there is one, else the CPU, when None.
        cache_dir: folder of the download cache.

    Raises:
        ValueError: neither a name nor a file; or a file that is no CLIP ViT.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = precision or "fp32"
    if not Path(name).is_file():
        if str(name).replace("/", "-") not in list_openai_models():
            raise ValueError(f"{name} is neither a file nor one of OpenAI's models: {', '.join(list_openai_models())}")
        return create_model(str(name), "openai", precision=precision, device=device, cache_dir=cache_dir).eval()
    if precision not in DTYPES:
        raise ValueError(f'precision is "{precision}": use one of {", ".join(DTYPES)}')
    state = load_state_dict_file(name)
    try:
        model = build_model(openai_config(state))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{name} is no CLIP ViT of OpenAI: {error}") from error
    load_state(model, state, source=str(name))
    return model.to(device=device, dtype=DTYPES[precision]).eval()
