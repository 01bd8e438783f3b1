"""AdamW with the published split into decayed and undecayed parameters."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from open_clip import CLIP
from open_clip.weights import export_state_dict
from training.methods import Method


def is_undecayed(name: str, parameter: Tensor) -> bool:
    """No weight decay for tensors of fewer than 2 dimensions or whose name contains bn, ln, bias or logit_scale.

    To be asked with the name and shape of the published layout.
    """
    return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))


def undecayed_names(model: CLIP) -> set[str]:
    """Names (this package's) of the parameters without weight decay.

    The rule is about names and dimensions, and those differ between layouts: OpenAI's class token is a vector, this
    package's is ``[1, 1, W]``. So it is asked in the layout in which the published code keeps this model.
    """
    own = {n: p.detach() for n, p in model.named_parameters()}
    # Exporting renames in order; what it may add (rotary tables) comes last.
    published = export_state_dict(model, state=own).items()
    return {ours for ours, (name, value) in zip(own, published, strict=False) if is_undecayed(name, value)}


def parameter_groups(model: CLIP, weight_decay: float) -> list[dict]:
    """Optimizer groups of the trainable parameters: [undecayed, decayed]; empty groups are kept, so resuming fits."""
    undecayed = undecayed_names(model)
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in trainable if n in undecayed], "weight_decay": 0.0},
        {"params": [p for n, p in trainable if n not in undecayed], "weight_decay": weight_decay},
    ]


def adam_defaults(model_name: str) -> tuple[float, float, float]:
    """(beta1, beta2, eps): those of CLIP when the model's name contains "vit", else AdamW's own."""
    return (0.9, 0.98, 1e-6) if "vit" in model_name.lower() else (0.9, 0.999, 1e-8)


def build_optimizer(args: argparse.Namespace, method: Method) -> torch.optim.AdamW:
    """AdamW over what trains in ``method.student``, in one fused pass.

    ``args`` gives ``model``, ``lr``, ``wd`` and ``beta1``, ``beta2``, ``eps`` (None: :func:`adam_defaults`).

    Raises:
        ValueError: nothing trains.
    """
    groups = parameter_groups(method.student, args.wd)
    if not any(group["params"] for group in groups):
        raise ValueError("nothing trains: every parameter is locked; raise --lock-image-unlocked-groups")
    given = (args.beta1, args.beta2, args.eps)
    beta1, beta2, eps = (d if g is None else g for g, d in zip(given, adam_defaults(args.model), strict=True))
    fusable = all(p.device.type in ("cuda", "cpu") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=args.lr, betas=(beta1, beta2), eps=eps, fused=fusable)
