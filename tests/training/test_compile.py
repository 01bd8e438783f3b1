"""``--compile``: the same numbers, and no compilation for every new number of regions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.torch_version import TorchVersion

from open_clip.factory import build_model
from training.models import compile_blocks, report_compiling


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
    function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: function(f, **{**k, "backend": counter}))
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
    assert 0 < counter.frame_count <= 12


@pytest.mark.parametrize("extra", [[], ["--drop-padding"]])
def test_two_sizes_multiscale_and_odd_batches_need_few_graphs(program, counter, caplog, extra):
    """24 images in batches of 5 leave an odd one of the evaluation's 6; PyTorch's limit is far away."""
    flags = {"epochs": 2, "max_boxes": 9, "batch_size": 5, "val": True, "zeroshot_frequency": 1}
    assert program("--multiscale", "--compile", "--eval-image-sizes", "64", "32", *extra, name="many", **flags) == 0
    assert 0 < counter.frame_count <= 12
    assert "limit of compilations" not in caplog.text


@pytest.mark.parametrize(("version", "parts"), [("2.11.0", 1), ("2.12.0", 5)])
def test_parts_whose_tokens_change_wait_for_a_compiler_that_can(tiny_config, monkeypatch, version, parts):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    model = build_model(json.loads(tiny_config.read_text()))
    compile_blocks(model)
    assert len(model.visual.compiled) == parts


@pytest.mark.parametrize("changing", [False, True])
def test_the_number_of_crops_may_change_and_that_of_tokens_only_where_asked(tiny_config, changing):
    """Student and teacher share their blocks' code, and not its shapes."""
    torch._dynamo.reset()
    shapes: list[torch.Size] = []

    def backend(graph, inputs):
        given = [n.meta["example_value"] for n in graph.graph.nodes if n.op == "placeholder"]
        shapes.extend(x.shape for x in given if isinstance(x, torch.Tensor) and x.ndim == 3)
        return graph.forward

    model = build_model(json.loads(tiny_config.read_text())).eval()
    compile_blocks(model, sides_change=changing, backend=backend)
    size = model.visual.image_size
    for crops, side in ((3, size), (5, size), (2, 2 * size), (4, 2 * size)):
        model.encode_dense(torch.zeros(crops, 3, side, side)) if side > size else model.encode_image(
            torch.zeros(crops, 3, side, side)
        )
    assert any(isinstance(s[0], torch.SymInt) for s in shapes), "images and crops come in changing numbers"
    assert any(isinstance(n, torch.SymInt) for s in shapes for n in s[1:]) == changing
    torch._dynamo.reset()


def test_a_limit_that_is_reached_is_said(caplog):
    torch._dynamo.reset()
    report_compiling()
    double = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1):  # monkeypatch would delete it in the end
        for size in (3, 4, 5):
            double(torch.ones(size))
    assert "runs a part of the blocks uncompiled" in caplog.text
    torch._dynamo.reset()
