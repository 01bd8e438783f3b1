"""What a model says of its images and texts, and a traced copy of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .model import CLIP
from .upstream_api import ImageSize
from .whole_images import PreprocessCfg


def get_model_preprocess_cfg(model: CLIP) -> dict[str, Any]:
    """How a model's images are prepared; see :class:`open_clip.whole_images.PreprocessCfg`."""
    return dict(model.visual.preprocess_cfg)


def set_model_preprocess_cfg(model: CLIP, preprocess_cfg: dict[str, Any]) -> None:
    """Change how a model's images are prepared. ``size`` is that of the weights and may not be changed.

    Raises:
        ValueError: unknown keys or values, or another size.
    """
    visual = model.visual
    cfg = PreprocessCfg.of({**visual.preprocess_cfg, **preprocess_cfg})
    if tuple(ImageSize.of(cfg.size)) != tuple(ImageSize.of(visual.image_size)):
        raise ValueError(f"size is {cfg.size}, the model's {visual.image_size}: build it with force_image_size")
    visual.image_mean, visual.image_std, visual.fill_color = cfg.mean, cfg.std, cfg.fill_color
    visual.interpolation, visual.resize_mode = cfg.interpolation, cfg.resize_mode


def get_model_tokenize_cfg(model: CLIP) -> dict[str, Any]:
    """``context_length`` and ``vocab_size`` of a model's texts."""
    return {"context_length": model.context_length, "vocab_size": model.vocab_size}


def trace_model(
    model: CLIP, batch_size: int = 256, device: str | torch.device = "cpu"
) -> torch.jit.ScriptModule | nn.Module:
    """The calls ``forward``, ``encode_image`` and ``encode_text`` as a TorchScript module, for whole images of the
    native size.

    Args:
        batch_size: of the examples that are traced; others may be given later.
        device: where the examples are made; the model must be there.
    """
    model.eval()
    height, width = ImageSize.of(model.visual.image_size)
    dtype = next(model.visual.parameters()).dtype
    image = torch.zeros(batch_size, 3, height, width, device=device, dtype=dtype)
    text = torch.zeros(batch_size, model.context_length, dtype=torch.long, device=device)
    inputs = {"forward": (image, text), "encode_text": (text,), "encode_image": (image,)}
    as_dict, model.output_dict = model.output_dict, False  # a traced function returns tensors
    try:
        with torch.no_grad():
            traced = torch.jit.trace_module(model, inputs=inputs)
    finally:
        model.output_dict = as_dict
    traced.visual.image_size = (height, width)
    return traced
