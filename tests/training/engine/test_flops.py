"""Counted operations against arithmetic, and that counting changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.engine import flops
from training.engine.flops import FlopMeter, peak_flops

B, N, W, H = 2, 12, 16, 4


def forward(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return block(x).square().mean()


@pytest.fixture
def block():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(W, H, 4 * W, dropout=0.0, batch_first=True, norm_first=True)


# Projections to q, k and v, back, and the two of the MLP; products of queries with keys, and weights with values.
FORWARD = 2 * B * N * W * W * (3 + 1 + 4 + 4) + 2 * 2 * B * N * N * W


def test_forward_and_backward_count_as_arithmetic_says(block):
    """A backward pass of a linear layer costs two products; fused attention's computes the scores once more."""
    x, meter = torch.randn(B, N, W, requires_grad=True), FlopMeter(None, 1)
    with meter.step(B):
        loss = forward(block, x)
    assert meter.operations == FORWARD
    with meter.step(B):
        loss.backward()
    assert meter.operations == 3 * FORWARD + 2 * B * N * N * W


def test_passes_without_gradients_count_the_same(block):
    """In inference mode operators arrive whole."""
    with torch.inference_mode():
        inputs, meter = torch.randn(B, N, W), FlopMeter(None, 1)
        with meter.step(B):
            nn.functional.scaled_dot_product_attention(*inputs.view(B, N, H, -1).transpose(1, 2)[None]
                                                                    .expand(3, -1, -1, -1, -1))  # fmt: skip
            nn.functional.linear(inputs, block.linear1.weight)
    assert meter.operations == 2 * 2 * B * N * N * W + 2 * B * N * W * 4 * W


def test_counting_changes_no_bit(block):
    gradients = []
    for counted in (0, 1, 2):
        block.zero_grad()
        meter = FlopMeter(None, 1, compiled=counted == 2)
        meter.left = min(counted, 1)
        with meter.step(B):
            forward(block, torch.linspace(-1, 1, B * N * W).view(B, N, W)).backward()
        assert bool(meter.operations) == bool(counted) and meter.left == 0
        gradients.append([p.grad.clone() for p in block.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))


def test_utilisation(monkeypatch):
    meter = FlopMeter(peak=1e12, devices=4)
    assert meter.scalars(10.0) == {}
    meter.operations, meter.samples = 8e11, 8.0  # of this process
    assert meter.scalars(20.0) == {"train/tflops": pytest.approx(0.5), "train/mfu": pytest.approx(0.5)}
    meter.peak = None
    assert list(meter.scalars(20.0)) == ["train/tflops"]
    assert peak_flops(torch.device("cpu"), torch.float32) is None
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12,
             "NVIDIA A10G": 125e12, "X": None}  # fmt: skip
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(torch.device("cuda", 0), torch.bfloat16) == peak


def test_operators_that_recur_are_taken_apart_once(monkeypatch):
    """And count each time; other shapes, or the same with another option, count for themselves."""
    taken, original = [], flops.FlopCounterMode
    monkeypatch.setattr(flops, "FlopCounterMode", lambda **k: taken.append(1) or original(**k))
    monkeypatch.setattr(flops._Counter, "_known", {})
    with torch.inference_mode():
        weight, meter = torch.randn(5, 4), FlopMeter(None, 1)
        with meter.step(1):
            for rows in (3, 3, 7, 3):
                nn.functional.linear(torch.randn(rows, 4), weight)
    assert meter.operations == 2 * 5 * 4 * (3 + 3 + 7 + 3) and len(taken) == 2
