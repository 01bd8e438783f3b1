"""Number types by OpenCLIP's names of precisions."""

from __future__ import annotations

import torch
from torch import nn

#: Type in which weights are stored, by precision.
DTYPES = {
    "fp32": torch.float32, "amp": torch.float32, "amp_bf16": torch.float32, "amp_bfloat16": torch.float32,
    "fp16": torch.float16, "pure_fp16": torch.float16, "bf16": torch.bfloat16, "pure_bf16": torch.bfloat16,
}  # fmt: skip


def get_cast_dtype(precision: str) -> torch.dtype | None:
    """float16 or bfloat16 for ``"fp16"`` and ``"bf16"``, else None: computing goes on in the inputs' type."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def get_input_dtype(precision: str) -> torch.dtype | None:
    """Type that images should have for a model of a precision; None for float32."""
    dtype = DTYPES.get(precision)
    return None if dtype == torch.float32 else dtype


def convert_weights_to_lp(model: nn.Module, dtype: torch.dtype = torch.float16) -> None:
    """Store all weights of a model in a lower precision, in place; images must then have the same type.

    OpenCLIP leaves norms in float32, whose layers cast; the towers here compute in one type throughout.
    """
    model.to(dtype)


def convert_weights_to_fp16(model: nn.Module, dtype: torch.dtype = torch.float16) -> None:
    """As :func:`convert_weights_to_lp`."""
    convert_weights_to_lp(model, dtype)
