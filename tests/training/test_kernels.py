"""Kernels: attention's by ``--attention``, refused where they cannot be had; what is said at the start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile

from open_clip.factory import build_model
from training import kernels
from training.engine.attention import ATTENTIONS, attention_for_crops, prefer_attention
from training.engine.distributed import Dist
from training.engine.errors import UserError
from training.engine.precision import make_precision
from training.kernels import Reader, attention_kernel, check_attention, report_kernels
from training.models import load_model, prepare_teachers
from training.params import parse_args
from training.teachers.build import build_teacher
from training.teachers.describe import TeacherSpec

CPU = torch.device("cpu")


@pytest.fixture
def reader() -> Reader:
    vision = {"image_size": 32, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8, "mlp_ratio": 4.1}
    text = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    model = build_model({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text})
    return Reader(model.visual, 64, torch.float32)


def losses(program, name: str) -> list[float]:
    lines = (program.logs / name / "out.log").read_text().splitlines()
    return [float(line.split("loss ")[1].split()[0]) for line in lines if "loss " in line]


def test_what_is_chosen_is_said_and_trains_alike(program, caplog):
    caplog.set_level("INFO")
    for name in ("auto", "flash", "math"):
        caplog.clear()
        assert program("--attention", name, name=name, epochs=1, max_steps=4, log_every_n_steps=1) == 0
        kernel = "math" if name == "math" else "flash"
        assert f"attention kernels: student {kernel}, teacher crops {kernel}" in caplog.text
    auto, flash, math = (losses(program, name) for name in ("auto", "flash", "math"))
    assert auto == flash and len(math) == 4
    np.testing.assert_allclose(math, auto, atol=1e-4)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("name", ["efficient", "cudnn"])
def test_what_the_machine_has_not_is_refused_in_one_line(program, capsys, trains, name):
    extra = {} if trains else {"val": True, "train_data": ""}
    assert program("--attention", name, name="run", epochs=1, **extra) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    who = "student" if trains else "model at 64"
    assert (
        len(error) == 1
        and f"--attention {name}: PyTorch has no such kernel for the {who} in float32 on cpu" in error[0]
    )
    assert not (program.logs / "run").exists()


def test_an_evaluation_says_its_kernels(program, caplog):
    caplog.set_level("INFO")
    assert program("--attention", "math", name="run", val=True, train_data="") == 0
    assert "attention kernels: model at 64 math, model at 32 math" in caplog.text


def ran(mask: torch.Tensor | None = None) -> set[str]:
    """Kernels of attention that run."""
    q = torch.randn(1, 2, 16, 8)
    with profile() as seen:
        F.scaled_dot_product_attention(q, q, q, mask)
    return {e.key for e in seen.key_averages() if e.key.startswith("aten::_scaled_dot_product")}


def test_the_choice_holds_inside_and_ends(reader):
    before = torch._C._get_sdp_priority_order()
    with prefer_attention("math"):
        assert ran() == {"aten::_scaled_dot_product_attention_math"}
        check_attention("math", {"student": reader}, CPU)
        with pytest.raises(UserError, match=r"would take math: use --attention auto or math"):
            check_attention("flash", {"student": reader}, CPU)
    with prefer_attention("cudnn"):  # what it cannot do goes to another
        assert ran() == {"aten::_scaled_dot_product_flash_attention_for_cpu"}
        assert ran(torch.zeros(16, 16)) and attention_kernel(reader, CPU) == "flash"
        assert torch._C._get_sdp_priority_order()[0] == int(torch.nn.attention.SDPBackend.CUDNN_ATTENTION)
    assert torch._C._get_sdp_priority_order() == before
    assert ran() == {"aten::_scaled_dot_product_flash_attention_for_cpu"}
    for name in ATTENTIONS:
        with prefer_attention(name):
            pass
    assert torch._C._get_sdp_priority_order() == before


def test_a_teacher_has_a_kernel_of_its_own(reader, caplog):
    """Crops, whose number changes, are left to flash attention unless another kernel is asked for."""
    assert (attention_for_crops("auto"), attention_for_crops("cudnn")) == ("flash", "auto")
    vision = {"image_size": 32, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    start = build_model({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text})
    for asked, expected in (("auto", "flash"), ("math", "auto")):  # SC's cells are of crops, too
        flags = ["--model", "ViT-Ti-8-64", "--method", "sc", "--det-image-size", "64", "--attention", asked]
        options, dist = parse_args(flags, check=False), Dist(0, 1, 0, CPU, False)
        teachers = prepare_teachers(options, load_model(options), dist, make_precision("fp32", CPU))
        assert {name: t.attention for name, t in teachers.items()} == {"crops": expected, "cells": expected}
    teacher = build_teacher(TeacherSpec("crops"), start, image_size=32)
    teacher.attention = "math"
    with profile() as seen:
        teacher(torch.zeros(2, 3, 32, 32))
    keys = {e.key for e in seen.key_averages() if e.key.startswith("aten::_scaled_dot_product")}
    assert keys == {"aten::_scaled_dot_product_attention_math"}
    caplog.set_level("INFO")
    report_kernels({"student": reader, "teacher crops": reader._replace(attention="math")}, CPU)
    assert "attention kernels: student flash, teacher crops math" in caplog.text


def test_padded_mlps_and_slow_attention_are_said_on_a_gpu(reader, caplog, monkeypatch):
    caplog.set_level("INFO")
    report_kernels({"student": reader}, CPU)
    assert "MLPs" not in caplog.text
    monkeypatch.setattr(kernels, "attention_kernel", lambda *_: "math")
    half = reader._replace(dtype=torch.bfloat16)
    report_kernels({"student": half, "teacher crops": reader}, torch.device("cuda"))
    said = [r.getMessage() for r in caplog.records if "MLPs" in r.getMessage()]
    assert said == ["MLPs of the student: 196 units are computed as 256, in aligned rows"]
    assert "attention of the student and the teacher crops is not fused" in caplog.text
