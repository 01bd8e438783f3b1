"""Weight ensemble of the student and the model it started from."""

from __future__ import annotations

from torch import Tensor


def ensemble_state(student: dict[str, Tensor], start: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """``alpha * student + (1 - alpha) * start``, entry by entry (WiSE-FT, CVPR 2022).

    Args:
        student, start: state dicts with the same names.
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
        name: alpha * value + (1 - alpha) * start[name].to(value.device) if value.is_floating_point() else value
        for name, value in student.items()
    }
