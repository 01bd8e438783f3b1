"""Numeric precision by the names that configs use."""

from __future__ import annotations

import logging

import torch

from ovdet.sections import TrainConfig
from training.engine.errors import UserError
from training.engine.precision import Precision, make_precision

log = logging.getLogger(__name__)


class StaticScaler(torch.amp.GradScaler):
    """Loss scaling by one value: steps whose float16 gradients overflow are left out, and the scale stays."""

    def __init__(self, device: str, scale: float) -> None:
        super().__init__(device, init_scale=scale, growth_interval=2**31 - 1)
        self.scale_value = scale

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Forget what overflowed; the scale is what it was."""
        super().update(self.scale_value)


def choose_precision(train: TrainConfig, device: torch.device, *, training: bool) -> Precision:
    """Precision of ``train.precision``: float16 has the loss scale ``train.loss_scale``.

    Testing on a CPU what was trained in float16 is done in float32, and the log says so.

    Raises:
        UserError: float16 training on a CPU.
    """
    name = train.precision or None
    if name == "amp_fp16":
        if device.type == "cpu":
            if training:
                raise UserError("train.precision=amp_fp16 needs a GPU: give train.precision=fp32 (or amp_bf16)")
            log.info("train.precision=amp_fp16 is for GPUs: this CPU computes in float32")
            return make_precision("fp32", device)
        precision = make_precision("amp", device)
        if training and train.loss_scale:
            precision.scaler = StaticScaler(device.type, train.loss_scale)
        return precision
    return make_precision(name, device)
