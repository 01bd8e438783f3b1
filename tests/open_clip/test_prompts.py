"""Prompts and their average against recorded ones, and class embeddings against the definition."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from open_clip.prompts import PROMPT_TEMPLATES, article, average_prompts, class_embeddings, class_prompts, process_name
from open_clip.text_tower import TextTower


def test_golden_prompts(golden):
    recorded = json.loads((golden / "prompts" / "prompts.json").read_text(encoding="utf-8"))
    assert recorded
    for name, expected in recorded.items():
        assert class_prompts(name) == expected["prompts"] and len(expected["prompts"]) == expected["n"]
        assert article(name) == expected["article"]
        assert process_name(name) == expected["processed_rm_dot"]
        assert process_name(name, remove_dot=False) == expected["processed_keep_dot"]


def test_golden_average(golden):
    data = np.load(golden / "prompts" / "averaging.npz")
    average = average_prompts(torch.from_numpy(data["per_prompt_raw"]))
    torch.testing.assert_close(average, torch.from_numpy(data["class_embeddings"]), rtol=0, atol=1e-6)


class Model(torch.nn.Module):
    """A text tower alone, which notes how many prompts it is given at a time, and how long."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text = TextTower(
            width=32,
            heads=2,
            layers=2,
            output_dim=8,
            vocab_size=300,
            causal=causal,
            pool="argmax" if causal else "last",
        )
        self.shapes: list[tuple[int, ...]] = []

    def encode_text(self, tokens):
        self.shapes.append(tuple(tokens.shape))
        assert not torch.is_grad_enabled()
        return self.text(tokens)


def letters(texts: list[str]) -> torch.Tensor:
    """One id a character, 299 at the end, padded to 77."""
    rows = torch.zeros(len(texts), 77, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        ids = [ord(c) for c in text[:75]] + [299]
        row[: len(ids)] = torch.tensor(ids)
    return rows


@pytest.mark.parametrize("causal", [True, False])
def test_class_embeddings(causal):
    """Row by row the definition: normalise each prompt's embedding, average, normalise."""
    model, names = Model(causal), ["apple", "Traffic_light"]
    result = class_embeddings(model, letters, names, batch_size=50)
    assert [n for n, _ in model.shapes] == [50, 50, 26]
    assert all(length < 77 if causal else length == 77 for _, length in model.shapes)
    for row, name in zip(result, names, strict=True):
        with torch.no_grad():
            each = [model.text(letters([p]))[0] for p in class_prompts(name)]
        total = sum(e.double() / e.double().norm() for e in each)
        torch.testing.assert_close(row, (total / total.norm()).float(), rtol=0, atol=1e-6)
    assert result.dtype == torch.float32 and result.shape == (2, 8)


def test_own_templates_and_nothing_to_embed():
    model = Model(True)
    with torch.no_grad():
        expected = F.normalize(model.text(letters(["dog"])), dim=-1)
    torch.testing.assert_close(class_embeddings(model, letters, ["dog"], templates=["{}"]), expected)
    with pytest.raises(ValueError, match="0 names"):
        class_embeddings(model, letters, [])
    assert len(PROMPT_TEMPLATES) == 63


class Mover(nn.Module):
    """A text tower whose parameters are new ones wherever it is moved to, as between a CPU and a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(300, 8, mode="sum")
        self.moves = 0

    def forward(self, tokens):
        return self.embedding(tokens)

    def to(self, device):
        self.moves += 1
        return self.double() if self.embedding.weight.dtype == torch.float32 else self.float()


@pytest.mark.parametrize("inference", [False, True])
def test_a_text_tower_that_is_moved_can_still_be_trained(inference):
    """Whatever mode the caller is in: parameters made in inference mode get no gradient, and nothing says so."""
    model = Model(False)
    model.text = Mover()
    with torch.inference_mode(inference):
        class_embeddings(model, letters, ["dog", "cat"])
        assert torch.is_inference_mode_enabled() is inference
    weight = model.text.embedding.weight
    assert model.text.moves == 2 and not weight.is_inference() and weight.requires_grad
    model.text(letters(["dog"])).sum().backward()
    assert weight.grad.count_nonzero() > 0
