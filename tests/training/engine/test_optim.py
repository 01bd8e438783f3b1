"""Fused SGD against its equations, where steps are skipped and where gradients come late."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from training.engine.optim import sgd
from training.engine.step import Stepper

RATE, MOMENTUM, DECAY = 0.1, 0.9, 0.05
START = (torch.tensor([1.0, -2.0, 3.0]), torch.tensor([[0.5, -0.25]]))


@pytest.fixture(autouse=True)
def memory_as_it_is_found(monkeypatch):
    """What is not initialised holds NaN."""
    original = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: original(*args, **kwargs).fill_(float("nan")))


def made(*, nesterov: bool = False) -> tuple[list[nn.Parameter], torch.optim.SGD]:
    parameters = [nn.Parameter(value.clone()) for value in START]
    groups = [{"params": parameters, "weight_decay": DECAY}]
    return parameters, sgd(groups, lr=RATE, momentum=MOMENTUM, nesterov=nesterov)


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(value.shape, generator=generator) for value in START]


def expected(weight: torch.Tensor, steps: list[torch.Tensor], *, nesterov: bool = False) -> torch.Tensor:
    """Sutskever et al. (2013) as PyTorch writes it, in float64: the first momentum is the first gradient."""
    weight, velocity = weight.double(), None
    for gradient in steps:
        gradient = gradient.double() + DECAY * weight
        velocity = gradient if velocity is None else MOMENTUM * velocity + gradient
        weight = weight - RATE * (gradient + MOMENTUM * velocity if nesterov else velocity)
    return weight.float()


def step(parameters, optimizer, number: int, *, skipped: bool = False) -> None:
    """A step as the engine takes it where the CPU waits for nothing."""
    stepper = Stepper(None, None, optimizer, precision=SimpleNamespace(scaler=None), dist=None, clip_norm=None)
    assert stepper.deferred
    for parameter, gradient in zip(parameters, gradients(number), strict=True):
        parameter.grad = gradient
    _, good = stepper._update(torch.tensor(float("inf") if skipped else 1.0))
    assert bool(good) is not skipped


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("skipped", [(), (0,), (0, 1), (0, 2)])
def test_skipped_steps_leave_nothing_behind(nesterov, skipped):
    """Above all the very first, in which a fused step would keep a momentum that nothing was written to."""
    parameters, optimizer = made(nesterov=nesterov)
    for number in range(5):
        step(parameters, optimizer, number, skipped=number in skipped)
    taken = [gradients(number) for number in range(5) if number not in skipped]
    for index, parameter in enumerate(parameters):
        wanted = expected(START[index], [step[index] for step in taken], nesterov=nesterov)
        torch.testing.assert_close(parameter.detach(), wanted)


def test_overflow_in_the_first_step_of_a_gradient_scaler():
    """The scaler tells a fused optimizer of it in the same way."""
    parameters, optimizer = made()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for infinite in (True, False):
        for parameter, gradient in zip(parameters, gradients(1), strict=True):
            parameter.grad = gradient * scaler.scale(torch.ones(()))
        if infinite:
            parameters[0].grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    for index, parameter in enumerate(parameters):
        torch.testing.assert_close(parameter.detach(), expected(START[index], [gradients(1)[index]]))


def test_a_parameter_may_get_its_first_gradient_late():
    parameters, optimizer = made()
    for number, share in enumerate((1, 2)):
        for parameter, gradient in zip(parameters[:share], gradients(number), strict=False):
            parameter.grad = gradient
        optimizer.step()
        assert len(optimizer.state) == share  # checkpoints hold no momentum of what has had no gradient
    first, second = ([gradients(number)[index] for number in range(index, 2)] for index in range(2))
    torch.testing.assert_close(parameters[0].detach(), expected(START[0], first))
    torch.testing.assert_close(parameters[1].detach(), expected(START[1], second))


@pytest.mark.parametrize("saved", [0, 1, 2])
def test_a_resumed_run_goes_on_with_the_same_numbers(saved):
    """Also from before the first step, where there is no momentum to save, and from after a skipped one."""
    parameters, optimizer = made()
    resumed = None
    for number in range(4):
        if number == saved:
            copies, resumed = made()
            for own, parameter in zip(copies, parameters, strict=True):
                own.data.copy_(parameter.data)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for run in [(parameters, optimizer)] + ([(copies, resumed)] if resumed else []):
            step(*run, number, skipped=number == 0)
    for own, parameter in zip(copies, parameters, strict=True):
        assert torch.equal(own, parameter) and parameter.isfinite().all()
