"""Learning rate of each step, and which parameters decay."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ovdet.sections import TrainConfig


def scaled_lr(config: TrainConfig, world_size: int) -> float:
    """Base rate for the batch at hand: linear in images per step (Goyal et al. 2017)."""
    if not config.scale_lr:
        return config.lr
    return config.lr * config.batch_size * world_size / config.base_batch


def lr_at(step: int, epoch: int, *, base: float, config: TrainConfig) -> float:
    """Rate of a step (counted from 0 over the whole run) in an epoch (from 0).

    ``base * decay_factor^(decay epochs that are over) * warm-up``; the warm-up rises linearly from ``warmup_factor`` to
    1 over ``warmup_steps``.
    """
    rate = base * config.decay_factor ** sum(epoch >= e for e in config.decay_epochs)
    if step < config.warmup_steps:
        rate *= config.warmup_factor + (1 - config.warmup_factor) * step / config.warmup_steps
    return rate


def make_optimizer(parameters: Iterable[tuple[str, nn.Parameter]], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; norms, biases and the temperature (fewer than 2 dimensions) do not decay."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for _, parameter in parameters:
        if parameter.requires_grad:
            groups[parameter.ndim >= 2].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": config.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=config.lr,
    )
