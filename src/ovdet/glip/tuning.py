"""What trains in each mode, in which groups and at which rate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ovdet.glip.config import TrainConfig
from ovdet.glip.model import GLIP
from training.engine.errors import UserError

#: The linear probe: last layers and the temperature of the dot product.
_PROBE = re.compile(r"head\.((bbox_pred|centerness|text_projection)\.|(log_scale|bias_lang|bias0)$)")
_TEXT = re.compile(r"text\.")
_PROMPT = re.compile(r"prompt$")


def trained_in(mode: str, behaviour: str = "fixed") -> list[re.Pattern[str]]:
    """Patterns of the names that train in a mode; empty for ``"full"``, where everything does.

    Args:
        behaviour: ``language_prompt_v3`` and ``v4`` are meant as v1 and v2 with the linear probe (``"fixed"``); the
            published code freezes the probe once more and trains what v1 and v2 do (``"reference"``).
    """
    if mode == "full":
        return []
    if mode == "linear_prob":
        return [_PROBE]
    patterns = [_TEXT if mode in ("language_prompt_v1", "language_prompt_v3") else _PROMPT]
    if mode in ("language_prompt_v3", "language_prompt_v4") and behaviour == "fixed":
        patterns.append(_PROBE)
    return patterns


def apply_mode(model: GLIP, mode: str, behaviour: str = "fixed") -> None:
    """Freeze what a mode does not train. What is frozen already stays so.

    Raises:
        UserError: nothing is left to train.
    """
    patterns = trained_in(mode, behaviour)
    for name, parameter in model.named_parameters():
        if patterns and not any(pattern.match(name) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"train.mode {mode} leaves nothing to train: the text encoder is frozen (text.frozen)")


def set_training(model: GLIP) -> None:
    """Training mode for what trains; eval mode (no dropout, no dropped paths) for what is frozen as a whole."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def parameter_groups(model: GLIP, config: TrainConfig) -> list[dict]:
    """Optimizer groups with ``lr_factor`` and ``weight_decay``.

    Names with "bias" learn at twice the rate and do not decay, as published: also Swin's tables of relative positions,
    and the biases of the dot product. The text encoder has a rate of its own. Norms decay.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(group_of(name, config), []).append(parameter)
    return [
        {"params": parameters, "lr_factor": factor, "weight_decay": decay}
        for (factor, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def group_of(name: str, config: TrainConfig) -> tuple[float, float]:
    """(factor on the rate, weight decay) of a parameter."""
    factor = config.text_lr / config.lr if name.startswith("text.") else 1.0
    return (2 * factor, 0.0) if "bias" in name else (factor, config.weight_decay)


# -- rates ------------------------------------------------------------------------------------------------------------


def decayed(step: int, total: int, shares: Sequence[float], factor: float) -> float:
    """``factor`` to the number of shares of the run that are over."""
    return factor ** sum(step >= int(share * total) for share in shares)


def warmed(step: int, steps: int, start: float) -> float:
    """Linear from ``start`` to 1 over the first steps."""
    return 1.0 if step >= steps else start + (1 - start) * step / steps


@dataclass
class Patience:
    """What the evaluations so far say about the rate and about going on.

    A gain is a value greater than all before it: an equal one is none, and a first value of 0 is one.

    Args:
        patience: evaluations without gain after which the rate falls, counted anew each time; 0: never.
        stop: evaluations without gain after which the run ends; 0: never.
        factor: on the rate.
        values: all so far.
    """

    patience: int
    stop: int
    factor: float
    values: list[float] = field(default_factory=list)

    def add(self, value: float) -> bool:
        """Note an evaluation; True when it is the best so far."""
        best = max(self.values, default=-torch.inf)
        self.values.append(value)
        return value > best

    @property
    def without_gain(self) -> int:
        """Evaluations since the best one."""
        return len(self.values) - 1 - self.values.index(max(self.values)) if self.values else 0

    @property
    def rate(self) -> float:
        """Factor on the rate from now on."""
        if not self.patience:
            return 1.0
        falls, waited, best = 0, 0, -torch.inf
        for value in self.values:
            waited = 0 if value > best else waited + 1
            best = max(best, value)
            if waited >= self.patience:
                falls, waited = falls + 1, 0
        return self.factor**falls

    @property
    def ended(self) -> bool:
        """Whether nothing has been gained for too long."""
        return self.stop > 0 and self.without_gain >= self.stop


# -- averaged weights -------------------------------------------------------------------------------------------------


class Average:
    """Exponential moving average of what trains.

    Args:
        decay: share of the old average in the new one.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After an optimizer step."""
        mine, theirs = [], []
        for name, parameter in model.named_parameters():
            if name in self.values:
                mine.append(self.values[name])
                theirs.append(parameter.detach())
        torch._foreach_lerp_(mine, theirs, 1 - self.decay)
