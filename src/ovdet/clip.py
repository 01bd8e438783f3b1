"""CLIP models that configs name: the ViT of one detector, the teacher of another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import open_clip
from open_clip.identity import architecture_hash
from ovdet.config import Config
from ovdet.files import vit_hash
from training.engine.checkpoint import warn_of_student
from training.engine.errors import as_user_error


@dataclass
class Clip:
    """A CLIP model, its tokenizer, and what identifies its image tower in detector files.

    Attributes:
        identity: ``name`` (of the model), ``weights`` (where they come from) and ``hash`` (of the image tower).
    """

    model: open_clip.CLIP
    tokenizer: Callable[[list[str]], Tensor]
    identity: dict[str, str]


def load_clip(config: Config, name: str, pretrained: str, cache_dir: str, *, seed: int) -> Clip:
    """A CLIP model on the CPU, in eval mode; random weights follow ``seed``.

    Args:
        config: relative paths are those of its file.
        name: of the model, or its config file (``.json``).
        pretrained: a tag, a checkpoint file, "eva" with the file in ``cache_dir``, or "" for random weights.
        cache_dir: checkpoint file when ``pretrained`` is "eva", else the download cache.

    Raises:
        UserError: unknown model, or weights that are missing or of another architecture.
    """
    with as_user_error():
        if name.endswith(".json"):
            path = Path(config.locate(name))
            name = path.parent.name if path.stem == "config" else path.stem
            open_clip.add_model_config(path, name)
        torch.manual_seed(seed)
        if Path(config.locate(pretrained)).is_file():
            pretrained = config.locate(pretrained)
        folder = config.locate(cache_dir) if cache_dir and pretrained == "eva" else cache_dir or None
        clip = open_clip.create_model(name, pretrained=pretrained or None, cache_dir=folder).eval()
        warn_of_student((folder if pretrained == "eva" else pretrained) or "")
        tokenizer = open_clip.get_tokenizer(name)
    weights = str(folder) if pretrained == "eva" else str(pretrained) or f"random, seed {seed}"
    return Clip(
        clip, tokenizer,
        {"name": name, "weights": weights, "hash": vit_hash(clip), "architecture": architecture_hash(clip.visual)}
    )
