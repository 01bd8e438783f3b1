"""Counted operations against arithmetic, and that counting changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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


class Several(nn.Module):
    """Operators whose derivatives torch computes otherwise while a dispatch mode is active, beside attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.TransformerEncoderLayer(W, H, 4 * W, dropout=0.0, batch_first=True, norm_first=True)
        self.conv = nn.Conv1d(N, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(x)
        y = self.conv(x).sigmoid()
        return x.square().mean() + y.prod(-1).sum() + y.cumprod(1).sum() + x.std(1).sum()


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_counting_changes_no_bit(backend):
    """Nor what compiled code computes, whose own trials on tensors without data do not count."""
    torch._dynamo.reset()
    module, results, counted = Several(), [], []
    if backend is not None:
        module.compile(backend=backend)
    for left in (1, 0, 1):
        module.zero_grad()
        meter = FlopMeter(None, 1)
        meter.left = left
        with meter.step(B):
            loss = module(torch.linspace(-1, 1, B * N * W).view(B, N, W))
            loss.backward()
        assert meter.left == 0
        counted.append(meter.operations)
        results.append([loss, *(p.grad.clone() for p in module.parameters())])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))
    convolution = 3 * 2 * B * 6 * (W - 2) * 3 * N
    block = 3 * FORWARD + 2 * B * N * N * W
    assert counted == [block + convolution, 0, block + convolution]
    torch._dynamo.reset()


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


def test_float32_is_not_tf32_unless_asked_for(monkeypatch):
    names = {"NVIDIA H200": (67e12, 494e12), "NVIDIA A100-SXM4-80GB": (19.5e12, 156e12), "NVIDIA B200": (None, 1125e12),
             "Tesla V100-SXM2-16GB": (15.7e12, 15.7e12), "X": (None, None)}  # fmt: skip
    for name, (plain, tf32) in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        for precision, peak in (("highest", plain), ("high", tf32), ("highest", plain)):
            torch.set_float32_matmul_precision(precision)
            assert peak_flops(torch.device("cuda", 0), torch.float32) == peak
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # beside which the older switch cannot be read
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            assert peak_flops(torch.device("cuda", 0), torch.float32) == 494e12
        finally:
            torch.set_float32_matmul_precision("highest")
    assert not torch.backends.cuda.matmul.allow_tf32
