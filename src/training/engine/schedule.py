"""Learning rate per optimizer step: pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def _warmup(base: float, warmup: int, step: int) -> float:
    return base * (step + 1) / warmup


def cosine_lr(step: int, *, base: float, warmup: int, total: int) -> float:
    """Linear warm-up over ``warmup`` steps, then half a cosine towards 0 (small but not 0 at the last step)."""
    if step < warmup:
        return _warmup(base, warmup, step)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))) * base


def const_lr(step: int, *, base: float, warmup: int) -> float:
    """Linear warm-up, then constant."""
    return _warmup(base, warmup, step) if step < warmup else base


def const_cooldown_lr(
    step: int, *, base: float, warmup: int, total: int, cooldown: int, power: float = 1.0, end: float = 0.0
) -> float:
    """Linear warm-up, constant, then a polynomial of ``power`` down to ``end`` over the last ``cooldown`` steps."""
    start = total - cooldown
    if step < warmup:
        return _warmup(base, warmup, step)
    if step < start:
        return base
    return (base - end) * (1 - (step - start) / cooldown) ** power + end


def make_schedule(
    kind: str,
    *,
    base: float,
    warmup: int,
    total: int,
    cooldown: int = 0,
    power: float = 1.0,
    end: float = 0.0,
) -> Callable[[int], float]:
    """Function step -> rate. ``kind`` is ``"cosine"``, ``"const"`` or ``"const-cooldown"``; ValueError otherwise."""
    if kind == "cosine":
        return lambda step: cosine_lr(step, base=base, warmup=warmup, total=total)
    if kind == "const":
        return lambda step: const_lr(step, base=base, warmup=warmup)
    if kind == "const-cooldown":
        return lambda step: const_cooldown_lr(
            step, base=base, warmup=warmup, total=total, cooldown=cooldown, power=power, end=end
        )
    raise ValueError(f'learning-rate schedule "{kind}" is unknown: use cosine, const or const-cooldown')


def set_lr(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
