"""What makes two models the same: their weights, and what of the architecture no weight shows.

GELU and QuickGELU, or 8 heads and 12, have the same tensors and another function. Whatever is kept of a model (class
embeddings, teachers' answers, a run that is to be resumed) is to be kept under :func:`identity`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from .image_tower import ImageTower
from .text_tower import TextTower
from .timm_blocks import trunk_facts
from .weights import export_state_dict

# Attributes of the towers that change what they compute. One that comes later is to be left out where it has the value
# that stands for how it was before, so that fingerprints last.
IMAGE_FACTS = ("image_size", "image_mean", "image_std", "interpolation", "resize_mode", "fill_color")
TEXT_FACTS = ("context_length", "heads", "causal", "pool", "eos_id")


def architecture(module: nn.Module) -> dict[str, Any]:
    """Facts about a model, or one of its towers, that change its outputs and have no weights, as json has them.

    Activations, epsilons of norms, heads, pooling, masking, rotary embedding, position grid, and the preparation of
    images. They do not depend on the release of timm. The dense reading is not among them: it stands with the weights.
    """
    if isinstance(module, ImageTower):
        return {"image": {**_facts(module, IMAGE_FACTS), **trunk_facts(module.trunk), "leaves": _leaves(module.trunk)}}
    if isinstance(module, TextTower):
        return {"text": {**_facts(module, TEXT_FACTS), "leaves": _leaves(module)}}
    facts: dict[str, Any] = {}
    for name in ("visual", "text"):
        tower = getattr(module, name, None)
        if tower is not None:
            facts |= architecture(tower)
    if not facts:
        raise TypeError(f"a {type(module).__name__} has no identity here: give a CLIP, an ImageTower or a TextTower")
    return facts


def architecture_hash(module: nn.Module) -> str:
    """Fingerprint of :func:`architecture` alone, 16 hexadecimal digits: to stand beside a hash of weights."""
    return hashlib.sha256(json.dumps(architecture(module), sort_keys=True).encode()).hexdigest()[:16]


def identity(module: nn.Module) -> str:
    """Fingerprint of a CLIP or one of its towers, 32 hexadecimal digits: :func:`architecture` and all weights.

    Weights enter by the names, shapes and types of the published layout (:func:`open_clip.weights.export_state_dict`),
    so a module that is renamed here keeps its identity, and a tower has the same one in any model. A model cast to
    another type is another model.

    Raises:
        TypeError: another kind of module.
    """
    digest = hashlib.sha256(json.dumps(architecture(module), sort_keys=True).encode())
    for name, tensor in sorted(_published(module).items()):
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _published(module: nn.Module) -> dict[str, Tensor]:
    if isinstance(module, TextTower):  # its names are the published ones, and do not hang on the image tower's layout
        return module.state_dict()
    if isinstance(module, ImageTower):
        holder = nn.Module()
        holder.visual = module
        module = holder
    if getattr(module, "visual", None) is None:
        return module.state_dict()
    # Rotary tables that a layout repeats are computed, and their last digit is the machine's.
    return {n: t for n, t in export_state_dict(module).items() if ".rope.freqs_" not in n}


def _facts(module: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(module, name) for name in names}
    return {name: list(v) if isinstance(v, (tuple, list)) else v for name, v in values.items()}


def _leaves(module: nn.Module) -> dict[str, Any]:
    """By name: norms with their epsilon, convolutions with their stride, activations with their form."""
    facts: dict[str, Any] = {}
    for name, leaf in module.named_modules():
        eps = getattr(leaf, "eps", None)
        if isinstance(leaf, nn.Conv2d):
            facts[name] = [list(leaf.stride), list(leaf.padding) if leaf.padding != "same" else "same", leaf.groups]
        elif isinstance(eps, float):
            facts[name] = ["LayerNorm" if isinstance(leaf, nn.LayerNorm) else type(leaf).__name__, eps]
        elif isinstance(getattr(leaf, "num_heads", None), int):
            facts[name] = [leaf.num_heads, bool(getattr(leaf, "rotate_half", False))]
        elif _is_activation(leaf):
            facts[name] = [type(leaf).__name__, getattr(leaf, "approximate", "none")]
    return facts


def _is_activation(leaf: nn.Module) -> bool:
    """Whether a module has neither parts nor weights and changes values by itself."""
    if isinstance(leaf, (nn.Identity, nn.Dropout)) or "Drop" in type(leaf).__name__ or "Rotary" in type(leaf).__name__:
        return False
    return not any(True for _ in leaf.children()) and not any(True for _ in leaf.parameters())
