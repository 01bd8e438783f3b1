"""Learning rate per optimizer step: pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
) -> Callable[[int, int], float]:
    """Function (step, epoch) -> rate; the epoch plays no part.

    Args:
        kind: ``"cosine"``, ``"const"`` or ``"const-cooldown"``; ValueError otherwise.
        base, warmup, total, cooldown, power, end: see the functions above.
    """
    if kind == "cosine":
        return lambda step, epoch=0: cosine_lr(step, base=base, warmup=warmup, total=total)
    if kind == "const":
        return lambda step, epoch=0: const_lr(step, base=base, warmup=warmup)
    if kind == "const-cooldown":
        return lambda step, epoch=0: const_cooldown_lr(
            step, base=base, warmup=warmup, total=total, cooldown=cooldown, power=power, end=end
        )
    raise ValueError(f'learning-rate schedule "{kind}" is unknown: use cosine, const or const-cooldown')


def step_decay_lr(
    step: int,
    epoch: int,
    *,
    base: float,
    decay_epochs: Sequence[int],
    decay_factor: float = 0.1,
    decay_steps: Sequence[int] = (),
    warmup: int = 0,
    warmup_factor: float = 0.001,
) -> float:
    """Rate of a step in an epoch (both from 0), as detectors train.

    ``base * decay_factor^(decay epochs and decay steps that are over) * warm-up``; the warm-up rises linearly from
    ``warmup_factor`` to 1 over ``warmup`` steps.
    """
    over = sum(epoch >= e for e in decay_epochs) + sum(step >= s for s in decay_steps)
    rate = base * decay_factor**over
    if step < warmup:
        rate *= warmup_factor + (1 - warmup_factor) * step / warmup
    return rate


def scaled_lr(lr: float, images: int, base_images: int) -> float:
    """Rate for ``images`` a step of a rate that was chosen for ``base_images``: linear (Goyal et al. 2017)."""
    return lr * images / base_images


def set_lr(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the rate, times its own ``lr_factor`` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)


def step_seed(seed: int, step: int) -> int:
    """Seed of a step's random choices: the same on every process, another one each step."""
    return (seed * 1_000_003 + step) % 2**31


def process_seed(seed: int, step: int, rank: int) -> int:
    """Seed of what one process draws in a step: another one for each process and step."""
    return ((seed * 1_000_003 + step) * 1_009 + rank) % 2**63
