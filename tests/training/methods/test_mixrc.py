"""MixRC's parts, each alone, against the methods that they come from."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from open_clip.factory import build_model
from training.methods import Setting, find_method, make_method
from training.methods.synclip import SynCLIP

CLASSES, DIM = 12, 24
SIZES = {"image_size": 32, "layers": 3, "width": 48, "head_width": 12, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}


def embed(names, *, teacher: str | None = None, plain: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3 if teacher else 2)
    return F.normalize(torch.randn(CLASSES, DIM, generator=generator), dim=-1)


def setting(readout: str | None = None) -> Setting:
    torch.manual_seed(0)
    student = build_model({"embed_dim": DIM, "vision_cfg": SIZES, "text_cfg": TEXT})
    return Setting(student, {}, readout, [str(i) for i in range(CLASSES)], embed)


@pytest.fixture
def names(tmp_path) -> str:
    (tmp_path / "names.json").write_text(json.dumps([{"name": str(i), "isthing": int(i < 7)} for i in range(CLASSES)]))
    return str(tmp_path / "names.json")


def batch() -> dict:
    generator = torch.Generator().manual_seed(1)
    boxes = [torch.tensor([[0.0, 0.0, 0.5, 0.6], [0.2, 0.3, 1.0, 1.0]]), torch.tensor([[0.1, 0.1, 0.9, 0.4]])]
    shapes = {"crops": (3, DIM), "vfm": (2, 64, 10), "dense": (2, 25, DIM), "start": (2, 64, DIM)}
    answers = {n: F.normalize(torch.randn(*s, generator=generator), dim=-1) for n, s in shapes.items()}
    return {"images": torch.randn(2, 3, 64, 64, generator=generator), "boxes": boxes, "samples": 2, "answers": answers}


def loss(method) -> float:
    method.begin_step([given := batch()], seed=0)
    out = method(given)
    return out["loss"].item()


def test_each_part_is_that_of_its_method(names):
    own = {"names": names, "threshold": 0.05, "logit_temperature": 0.1}
    off = {"cosine_weight": 0.0, "coherence_weight": 0.0}
    assert loss(make_method("mixrc", setting())) == pytest.approx(loss(make_method("denserc", setting())), rel=1e-6)
    aligned = loss(make_method("mixrc", setting(), **off, **own, alignment_weight=2.0))
    assert aligned == pytest.approx(2 * loss(make_method("densevlm", setting("gated:3"), **own)), rel=1e-5) and aligned
    named = loss(make_method("mixrc", setting(), **off, **own, semantic_weight=1.0))
    made = setting("qq")  # SynCLIP's terms, on MixRC's reading
    synclip = SynCLIP(
        **made.common(), labels=embed(None), rich=embed(None), choose=True, cosine_weight=0.0, context_weight=0.0,
        semantic={"weight": 1.0, "share": (0.7, 0.3), "neighbours": 7, "kind": "l2"},
    )  # fmt: skip
    made.student.visual.set_readout("gated:3")
    synclip.projections = ()
    assert named == pytest.approx(loss(synclip), rel=1e-5) and named
    everything = loss(make_method("mixrc", setting(), **own, alignment_weight=2.0, semantic_weight=1.0))
    assert everything == pytest.approx(loss(make_method("denserc", setting())) + aligned + named, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {"crops", "vfm"}),
        ({"coherence_weight": 0.0}, {"crops"}),
        ({"alignment_weight": 1.0, "coherence_weight": 0.0}, {"crops", "dense"}),
        ({"semantic_weight": 1.0, "cosine_weight": 0.0}, {"crops", "vfm", "start"}),
    ],
)
def test_parts_that_are_left_out_have_no_teacher(flags, expected):
    entry = find_method("mixrc")
    assert {t.name for t in entry.teachers(entry.options(**flags))} == expected
