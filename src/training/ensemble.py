"""Weight ensemble of the student and the model it started from."""

from __future__ import annotations

import torch
from torch import Tensor


def _mix(value: Tensor, start: Tensor, alpha: float) -> Tensor:
    # In float32 at least: half precision would round three times.
    wide = torch.promote_types(value.dtype, torch.float32)
    return (alpha * value.to(wide) + (1 - alpha) * start.to(value.device, wide)).to(value.dtype)


def ensemble_state(student: dict[str, Tensor], start: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """``alpha * student + (1 - alpha) * start``, entry by entry (WiSE-FT, CVPR 2022).

    Args:
        student, start: state dicts with the same names. The result has the student's dtypes and devices; entries that
            are no floating-point numbers are the student's.
        alpha: 1 gives the student, 0 the start model.

    Raises:
        ValueError: alpha outside 0..1, or names that differ.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"--alpha is {alpha}: use a value from 0 to 1")
    if student.keys() != start.keys():
        differing = sorted(student.keys() ^ start.keys())[:4]
        raise ValueError(f"student and start model differ in {', '.join(differing)}: not models of one architecture")
    if alpha == 1:
        return dict(student)
    return {
        name: _mix(value, start[name], alpha) if value.is_floating_point() else value for name, value in student.items()
    }
