"""Numeric precision of training and evaluation."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from training.engine.errors import UserError

PRECISIONS = ("fp32", "amp", "amp_bf16", "amp_bfloat16", "bf16", "pure_bf16", "fp16", "pure_fp16")


@dataclass
class Precision:
    """How to compute.

    Attributes:
        name: the resolved name.
        device: device type, ``"cuda"`` or ``"cpu"``.
        autocast_dtype: dtype of autocast regions, None without autocast.
        param_dtype: dtype in which weights are stored; also that of prepared images.
        scaler: gradient scaler for float16 gradients, else None.
    """

    name: str
    device: str
    autocast_dtype: torch.dtype | None
    param_dtype: torch.dtype
    scaler: torch.amp.GradScaler | None

    @property
    def input_dtype(self) -> torch.dtype:
        """dtype of prepared images: what the first layer computes in."""
        return self.autocast_dtype or self.param_dtype

    def autocast(self) -> contextlib.AbstractContextManager:
        """Context in which forward passes run."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=self.autocast_dtype)


def make_precision(name: str | None, device: torch.device) -> Precision:
    """Precision by name; None chooses bfloat16 autocast on a GPU that has it, else float32.

    Raises:
        UserError: an unknown name, or float16 training on a CPU.
    """
    on_gpu = device.type == "cuda"
    if name is None:
        name = "amp_bf16" if on_gpu and torch.cuda.is_bf16_supported() else "fp32"
    if name not in PRECISIONS:
        raise UserError(f"--precision {name}: use one of {', '.join(PRECISIONS)}")
    if name in ("amp", "fp16", "pure_fp16") and not on_gpu:
        raise UserError(f"--precision {name} needs a GPU: use fp32 or amp_bf16 on {device.type}")
    autocast = {"amp": torch.float16, "amp_bf16": torch.bfloat16, "amp_bfloat16": torch.bfloat16}.get(name)
    params = torch.float32
    if name in ("bf16", "pure_bf16"):
        params = torch.bfloat16
    elif name in ("fp16", "pure_fp16"):
        params = torch.float16
    scaler = torch.amp.GradScaler(device.type) if name == "amp" else None
    return Precision(name, device.type, autocast, params, scaler)
