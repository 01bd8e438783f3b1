"""Counts against arithmetic done by hand, and the table's promises."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import roofline  # noqa: E402
from counting import counting  # noqa: E402


def test_matrix_products_and_attention_are_counted_by_their_formulas():
    layer, x = nn.Linear(32, 48, device="meta"), torch.empty(5, 7, 32, device="meta", requires_grad=True)
    with counting() as forward:
        y = layer(x)
    with counting() as backward:
        y.sum().backward()
    assert forward.flop == 2 * 5 * 7 * 32 * 48 and backward.flop == 2 * forward.flop
    q = torch.empty(2, 3, 11, 16, device="meta", requires_grad=True)
    with counting() as forward:
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    with counting() as backward:
        y.sum().backward()
    assert forward.flop == 4 * 2 * 3 * 11 * 11 * 16 and backward.flop == 2.5 * forward.flop
    assert forward.bytes == 4 * 4 * q.numel()  # queries, keys, values read, output written, float32


def test_a_step_of_a_plain_vit_has_the_flop_of_its_layers():
    step = roofline.count_step("ViT-B-16", 224, 1, 4, teacher=True)
    width, tokens, blocks = 768, 197, 12
    linear, mixing = 2 * 12 * width**2, 4 * tokens * width  # a token's, in a block
    stem = 2 * 3 * 16**2 * width
    assert step.parts["student forward"].flop == pytest.approx(
        196 * (blocks * linear + (blocks - 1) * mixing + stem + 2 * width * 512), rel=0.02
    )
    # The teacher's last block is computed for the class token alone.
    whole = 4 * tokens * (blocks * linear + blocks * mixing + stem)
    assert 0.88 * whole < step.parts["teacher"].flop < whole
    assert step.trained == pytest.approx(86e6, rel=0.02)


def test_more_gpus_share_the_work_until_the_exchange_is_longer_than_the_backward():
    recipe = roofline.recipes()[0]
    step = roofline.count_step(recipe.model, 256, 2, 8, teacher=True)
    device = roofline.DEVICES["h100"]
    costs = [roofline.run_cost(recipe, step, device, n, fused=True, crop_on="worker") for n in (1, 8, 64)]
    assert costs[0]["hours"] > costs[1]["hours"] > costs[2]["hours"]
    assert costs[0]["efficiency"] == 1 and costs[2]["efficiency"] <= costs[1]["efficiency"] <= 1
    assert costs[0]["steps"] == 64 * costs[2]["steps"]


def test_program_prints_tables_and_json(capsys):
    roofline.main(["--model", "ViT-Ti-8-64", "--size", "128", "--regions", "4", "--no-recipes", "--device", "a100"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("student forward") for line in lines)
    assert json.loads(lines[-1])["seconds"]["eager"] > json.loads(lines[-1])["seconds"]["fused"]
