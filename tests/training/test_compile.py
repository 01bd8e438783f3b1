"""``--compile``: the same numbers, and no compilation for every new number of regions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter


def losses(program, name: str) -> list[float]:
    lines = (program.logs / name / "out.log").read_text().splitlines()
    return [float(line.split("loss ")[1].split()[0]) for line in lines if "loss " in line]


@pytest.fixture
def counter(monkeypatch) -> CompileCounter:
    """Counts the graphs that are traced. They run as they are: a C++ compiler is not needed, nor its minutes."""
    torch._dynamo.reset()
    counter = CompileCounter()
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *a, **k: original(self, *a, backend=counter, **k))
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("extra", [[], ["--grad-checkpointing"]])
def test_losses_are_equal_and_compilations_few(program, counter, extra):
    flags = {"train": "proposals_distill", "epochs": 3, "max_boxes": 9, "log_every_n_steps": 1, "val": True,
             "zeroshot_frequency": 1}  # fmt: skip
    assert program(*extra, name="eager", **flags) == 0
    assert counter.frame_count == 0
    assert program(*extra, "--compile", name="compiled", **flags) == 0
    eager, compiled = losses(program, "eager"), losses(program, "compiled")
    assert len(eager) == len(compiled) == 36
    np.testing.assert_allclose(compiled, eager, atol=2e-4)
    # Student in training, teacher, and the two readings in evaluation, each perhaps once more for a changing count.
    assert 0 < counter.frame_count <= 10
