"""Weight-decay groups against the recorded ones, and AdamW against its equations in float64."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import open_clip
from open_clip.factory import build_model
from open_clip.weights import export_state_dict
from training.engine.errors import UserError
from training.methods import Setting, make_method
from training.models import adam_defaults, build_optimizer, is_undecayed, parameter_groups, undecayed_names
from training.options import OptimOptions


def published_names(model, parameters) -> list[str]:
    names = {id(p): n for n, p in model.named_parameters()}
    return list(export_state_dict(model, state={names[id(p)]: p for p in parameters}))


def test_groups_are_the_recorded_ones(golden):
    expected = json.loads((golden / "train" / "train.json").read_text())["three_steps"]
    model = build_model(json.loads((golden / "eva" / "config.json").read_text()))
    model.lock_text_tower()
    model.lock_image_tower(expected["unlocked_groups"])  # the reference also lets the temperature train
    decay = expected["weight_decay"]
    undecayed, decayed = parameter_groups(model, decay)
    assert published_names(model, decayed["params"]) == expected["decay"] and decayed["weight_decay"] == decay
    assert sorted(published_names(model, undecayed["params"])) == sorted(expected["no_decay"])
    assert undecayed["weight_decay"] == 0


@pytest.mark.parametrize("kind", ["eva", "vit_quickgelu"])
def test_rule_holds_for_the_names_and_shapes_of_the_published_files(golden, kind):
    """Both towers: the published state dict's own names and dimensions decide."""
    model = build_model(json.loads((golden / kind / "config.json").read_text()))
    published = export_state_dict(model)
    own = [n for n, _ in model.named_parameters()]
    ours = undecayed_names(model)
    theirs = {n for n, v in published.items() if is_undecayed(n, v) and "rope" not in n}
    assert set(published_names(model, [dict(model.named_parameters())[n] for n in ours])) == theirs
    # The class token is a vector in OpenAI's layout only.
    assert ("visual.trunk.cls_token" in ours) == (kind == "vit_quickgelu")
    assert "visual.trunk.pos_embed" in set(own) - ours and "logit_scale" in ours


def test_rule():
    vector, matrix = torch.zeros(3), torch.zeros(3, 3)
    assert is_undecayed("x", vector) and is_undecayed("logit_scale", torch.zeros(()))
    assert is_undecayed("a.ln_1.weight", matrix) and is_undecayed("q_bias", matrix) and is_undecayed("bn", matrix)
    assert not is_undecayed("visual.proj", matrix)


@pytest.mark.parametrize("name", open_clip.list_models())
def test_defaults_follow_the_name(name):
    assert adam_defaults(name) == ((0.9, 0.98, 1e-6) if "vit" in name.lower() else (0.9, 0.999, 1e-8))


class Student(nn.Module):
    """Just parameters; no CLIP is needed to check the update."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64))


def test_updates_are_those_of_adamw(monkeypatch):
    """Decoupled decay and bias correction (Loshchilov & Hutter, 2019), with given betas and eps, over four steps."""
    monkeypatch.setattr("training.models.undecayed_names", lambda model: {"bias"})
    method = nn.Module()
    method.student = student = Student()
    optimizer = build_optimizer(OptimOptions(lr=0.1, wd=0.2, beta1=0.8, eps=1e-3), "x", method.student)
    values = {n: p.detach().numpy().copy() for n, p in student.named_parameters()}
    moments = {n: (np.zeros_like(v), np.zeros_like(v)) for n, v in values.items()}
    rng = np.random.default_rng(0)
    for step in range(1, 5):
        for name, parameter in student.named_parameters():
            grad = rng.standard_normal(parameter.shape)
            parameter.grad = torch.from_numpy(grad.copy())
            m, v = moments[name]
            m, v = 0.8 * m + 0.2 * grad, 0.999 * v + 0.001 * grad**2
            moments[name] = m, v
            values[name] *= 1 - 0.1 * (0.2 if name == "weight" else 0)
            values[name] -= 0.1 * (m / (1 - 0.8**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-3)
        optimizer.step()
    for name, parameter in student.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), values[name], rtol=1e-12)


def test_nothing_to_train_is_said(golden):
    model = build_model(json.loads((golden / "eva" / "config.json").read_text()))
    model.lock_image_tower(0)
    method = make_method("regionclip", Setting(model, embed=lambda names: torch.randn(5, model.embed_dim)))
    with pytest.raises(UserError, match="--lock-image-unlocked-groups"):
        build_optimizer(OptimOptions(), "x", method.student)
