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
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=fusable)
    if fusable and momentum:
        optimizer.register_step_pre_hook(_begin_momentum)
    return optimizer


def _begin_momentum(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Zeros as the momentum of what has none yet; the first step with them is the published one (0 + gradient).

    PyTorch's fused step makes it of memory as it is found, and leaves it so where the kernel skips the step; and it
    fails where parameters get their first gradients in different steps.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
