"""AdamW with the published split into decayed and undecayed parameters."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def is_undecayed(name: str, parameter: Tensor) -> bool:
    """No weight decay for vectors and scalars, nor for names that contain bn, ln, bias or logit_scale.

    Dimensions of size one do not count: a class token ``[1, 1, W]`` is the vector that OpenAI's layout has as ``[W]``.
    So the names and shapes of this package split as the published ones do; norms are vectors by whatever name.
    """
    return parameter.squeeze().ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Optimizer groups of the trainable parameters: [undecayed, decayed]; empty groups are kept, so resuming fits."""
    trainable = [(n, p) for n, p in named if p.requires_grad]
    return [
        {"params": [p for n, p in trainable if is_undecayed(n, p)], "weight_decay": 0.0},
        {"params": [p for n, p in trainable if not is_undecayed(n, p)], "weight_decay": weight_decay},
    ]


def adam_defaults(model_name: str) -> tuple[float, float, float]:
    """(beta1, beta2, eps): those of CLIP when the model's name contains "vit", else AdamW's own."""
    return (0.9, 0.98, 1e-6) if "vit" in model_name.lower() else (0.9, 0.999, 1e-8)


def build_optimizer(args: argparse.Namespace, method: nn.Module) -> torch.optim.AdamW:
    """AdamW over what trains in ``method.student``; fused on CUDA.

    ``args`` gives ``model``, ``lr``, ``wd`` and ``beta1``, ``beta2``, ``eps`` (None: :func:`adam_defaults`).

    Raises:
        ValueError: nothing trains.
    """
    groups = parameter_groups(method.student.named_parameters(), args.wd)
    if not any(group["params"] for group in groups):
        raise ValueError("nothing trains: every parameter is locked; raise --lock-image-unlocked-groups")
    given = (args.beta1, args.beta2, args.eps)
    beta1, beta2, eps = (d if g is None else g for g, d in zip(given, adam_defaults(args.model), strict=True))
    on_cuda = all(p.is_cuda for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=args.lr, betas=(beta1, beta2), eps=eps, fused=on_cuda)
