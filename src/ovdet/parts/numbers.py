"""Number formats."""

from __future__ import annotations

from torch import Tensor


def widened(values: Tensor) -> Tensor:
    """At least float32: half precision becomes float32, float64 stays."""
    return values if values.itemsize >= 8 else values.float()
