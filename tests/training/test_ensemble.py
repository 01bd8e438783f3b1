"""Weight ensemble against the recorded one and exact arithmetic."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from training.ensemble import ensemble_state


def test_ensemble_is_the_recorded_one(golden):
    student = load_file(golden / "train" / "weights_after_3_steps.safetensors")
    start = load_file(golden / "eva" / "weights.safetensors")
    recorded = load_file(golden / "train" / "ensemble.safetensors")
    alpha = json.loads((golden / "train" / "train.json").read_text())["ensemble"]["alpha"]
    mixed = ensemble_state(student, {n: start[n] for n in student}, alpha)
    assert set(mixed) == set(recorded)
    for name, value in recorded.items():
        assert (mixed[name] - value).abs().max() <= 1e-6, name
    assert not all(torch.equal(mixed[n], student[n]) for n in mixed)


def test_half_precision_rounds_once_and_integers_are_the_students():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1000, generator=generator).bfloat16() for _ in range(2))
    state = ensemble_state({"w": a, "n": torch.tensor(3)}, {"w": b, "n": torch.tensor(5)}, 0.7)
    exact = 0.7 * a.double() + 0.3 * b.double()
    assert state["w"].dtype == torch.bfloat16 and state["n"].item() == 3
    # One rounding to 8 significant bits, and float32's own.
    assert ((state["w"].double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_ends_are_one_of_the_two(alpha):
    a, b = {"w": torch.randn(5)}, {"w": torch.randn(5)}
    assert torch.equal(ensemble_state(a, b, alpha)["w"], (b, a)[int(alpha)]["w"])


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="--alpha is 1.5"):
        ensemble_state({}, {}, 1.5)
    with pytest.raises(ValueError, match="differ in x"):
        ensemble_state({"w": torch.zeros(1)}, {"w": torch.zeros(1), "x": torch.zeros(1)}, 0.5)
