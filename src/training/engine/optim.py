"""Optimizers and parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def decay_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    undecayed: Callable[[str, Tensor], bool] | None = None,
) -> list[dict]:
    """Optimizer groups of what trains: [without weight decay, with it]. Empty ones are kept, so that resuming fits.

    Args:
        parameters: names and parameters; frozen ones are left out.
        undecayed: (name, parameter) -> whether it does not decay; by default norms, biases and scalars: all of fewer
            than 2 dimensions.
    """
    free = undecayed or (lambda _, parameter: parameter.ndim < 2)
    groups: tuple[list, list] = [], []
    for name, parameter in parameters:
        if parameter.requires_grad:
            groups[not free(name, parameter)].append(parameter)
    return [{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1], "weight_decay": weight_decay}]


def adamw(
    groups: list[dict], *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.optim.AdamW:
    """AdamW in one fused pass over all parameters, where their devices have it."""
    fusable = all(p.device.type in ("cuda", "cpu") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fusable)


def sgd(groups: list[dict], *, lr: float, momentum: float = 0.9, nesterov: bool = False) -> torch.optim.SGD:
    """SGD with momentum, in one fused pass where the devices have it."""
    fusable = all(p.device.type in ("cuda", "cpu") for group in groups for p in group["params"])
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=fusable)
