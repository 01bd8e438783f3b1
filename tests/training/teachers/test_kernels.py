"""Kernels of a teacher that is stored in bfloat16, counted on the meta device; and that autocast leaves it alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import open_clip
from training.teachers.build import build_teacher
from training.teachers.describe import TeacherSpec

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))
from counting import counting  # noqa: E402


@pytest.mark.parametrize(("name", "most"), [("ViT-B-16-quickgelu", 200), ("EVA02-CLIP-B-16", 400)])
def test_a_pass_of_the_teacher_takes_few_kernels(name, most):
    model = open_clip.create_model(name)
    teacher = build_teacher(TeacherSpec("crops"), model, image_size=224, device="meta", dtype=torch.bfloat16)
    crops = torch.empty(40, 3, 224, 224, device="meta", dtype=torch.bfloat16)
    for _ in range(2):  # the first makes the rotary table, which stays
        with counting() as count:
            answers = teacher(crops)
    assert answers.dtype == torch.bfloat16 and len(count.kernels) <= most


def test_embeddings_of_a_bfloat16_teacher_have_unit_length():
    torch.manual_seed(0)
    spec = TeacherSpec("crops", source="crops", emits="embedding")
    teacher = build_teacher(spec, open_clip.create_model("ViT-Ti-8-64"), image_size=64, dtype=torch.bfloat16)
    lengths = teacher(torch.randn(6, 3, 64, 64).bfloat16()).norm(dim=-1)
    assert (lengths - 1).abs().max() < 1e-6


def test_autocast_leaves_a_bfloat16_teacher_alone(monkeypatch):
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-Ti-8-64")
    crops = torch.randn(6, 3, 64, 64)
    full = build_teacher(TeacherSpec("crops"), model, image_size=64)(crops)
    teacher = build_teacher(TeacherSpec("crops"), model, image_size=64, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        answers = teacher(crops.bfloat16())
    assert torch.equal(answers, teacher(crops.bfloat16()))
    assert torch.cosine_similarity(answers.float(), full).min() > 0.999
    half = build_teacher(TeacherSpec("crops"), model, image_size=64)  # stored in float32: as autocast has it
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.cosine_similarity(half(crops).float(), full).min() > 0.999
