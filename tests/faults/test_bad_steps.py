"""Losses and gradients that are not finite, float16 overflow, and what a seed fixes."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from training.engine.checkpoint import find_latest
from training.engine.step import Stepper

SHORT = {"epochs": 1, "log_every": 1}


def spoil(monkeypatch, steps: set[int], what: str) -> None:
    """Make the loss, or one number of the gradient, infinite or NaN in some steps (counted from 1)."""
    original, count = Stepper._forward_backward, 0

    def forward_backward(stepper, batch, *, last):
        nonlocal count
        count += 1
        output = original(stepper, batch, last=last)
        if count in steps:
            if what == "loss":
                output["loss"] = output["loss"] * float("nan")
            else:
                spoilt = [p for p in stepper.parameters if p.grad is not None][-1]
                spoilt.grad.view(-1)[0] = float("inf")
        return output

    monkeypatch.setattr(Stepper, "_forward_backward", forward_backward)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_step_is_skipped_and_counted(program, monkeypatch, what):
    with monkeypatch.context() as patch:
        spoil(patch, {3, 4, 7, 8, 11}, what)  # never three in a row
        assert program("run", *program.bad[0], **SHORT) == 0
    log = program.text("run")
    named = re.findall(rf"step (\d+): the {what} is not finite .* the step is skipped \(images \[(\d+), (\d+)\]\)", log)
    assert [int(step) for step, *_ in named] == [3, 4, 7, 8, 11]
    checkpoint = program.last("run", 1)
    assert checkpoint["step"] == 12  # the schedule goes on
    assert {float(state["step"]) for state in checkpoint["optimizer"]["state"].values()} == {7.0}  # the weights do not
    assert all(torch.isfinite(v).all() for v in checkpoint["state_dict"].values())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_bad_steps_in_a_row_stop_the_run(program, monkeypatch, capsys, what):
    """With the ids of the images and the last good checkpoint, which is one indeed."""
    with monkeypatch.context() as patch:
        spoil(patch, {2, *range(5, 25)}, what)
        assert program("run", *program.bad[0], save_every=4, **{**SHORT, "epochs": 2}) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    said = rf"the {what} was not finite in {program.bad[1]} steps in a row, lastly of images (\[.+\])"
    found = re.search(said, errors[0])
    assert len(errors) == 1 and len(eval(found[1])) == 2
    path, content = find_latest(program.folder("run") / "checkpoints")
    assert f"last good checkpoint is {path}" in errors[0] and content["step"] >= 4
    assert all(torch.isfinite(v).all() for v in content["state_dict"].values())
    assert program("run", resume=True, **SHORT) == 0


def test_float16_overflow_is_the_scalers_business():
    """Gradients that overflow under a scale that is too large: dropped, the scale halved, no bad step."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.25)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)

    def stepper(limit: float | None) -> Stepper:
        precision = SimpleNamespace(scaler=scaler)
        return Stepper(None, None, optimizer, precision=precision, dist=None, clip_norm=limit)

    loss = torch.tensor(1.0)
    for limit in (None, 1.0):
        before, scale = weight.detach().clone(), scaler.get_scale()
        scaler.scale((weight * 64).sum()).backward()
        assert weight.grad.isinf().all()
        _, good = stepper(limit)._update(loss)
        assert good and torch.equal(weight, before) and scaler.get_scale() == scale / 2
    scaler.load_state_dict({**scaler.state_dict(), "scale": 1024.0})
    scaler.scale((weight * 2).sum()).backward()
    norm, good = stepper(None)._update(loss)
    assert good and norm.item() == pytest.approx(2 * 3**0.5) and torch.equal(weight, before - 0.5)


def test_a_seed_fixes_the_run_whatever_the_workers(program):
    """Weights, order of the data and regions: the same with 0 and 2 workers, others with another seed."""
    seed = "--seed=1" if program.name == "clipself" else "train.seed=1"
    for run, workers, more in (("a", 0, []), ("b", 2, []), ("c", 0, [seed])):
        assert program(run, *more, workers=workers, **SHORT) == 0
    program.check_equal(1, "a", "b")
    a, c = (program.last(run, 1)["state_dict"] for run in "ac")
    assert any(not torch.equal(a[k], c[k]) for k in a)
