"""Names of precisions: what each one stores and computes in, and which are refused where."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.engine.errors import UserError
from training.engine.precision import make_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("name", "stored", "computed"),
    [("fp32", FULL, FULL), ("amp_bf16", FULL, BRAIN), ("amp_bfloat16", FULL, BRAIN), ("bf16", BRAIN, BRAIN),
     ("pure_bf16", BRAIN, BRAIN)],
)  # fmt: skip
def test_what_a_layer_computes_in(name, stored, computed):
    precision = make_precision(name, CPU)
    layer = nn.Linear(4, 4).to(precision.param_dtype)
    with precision.autocast():
        output = layer(torch.zeros(2, 4, dtype=precision.input_dtype))
    assert (layer.weight.dtype, output.dtype) == (stored, computed)
    assert precision.input_dtype == computed and precision.scaler is None and precision.name == name


@pytest.mark.parametrize("name", ["amp", "fp16", "pure_fp16"])
def test_float16_needs_a_gpu(name):
    with pytest.raises(UserError, match=f"--precision {name}.*fp32"):
        make_precision(name, CPU)


def test_unknown_names_and_the_default_on_a_cpu():
    with pytest.raises(UserError, match="int8.*amp_bf16"):
        make_precision("int8", CPU)
    assert make_precision(None, CPU).name == "fp32"


@pytest.mark.parametrize(("supported", "name"), [(True, "amp_bf16"), (False, "fp32")])
def test_default_on_a_gpu(monkeypatch, supported, name):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: supported)
    assert make_precision(None, GPU).name == name
