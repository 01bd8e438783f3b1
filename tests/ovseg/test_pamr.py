"""PAMR against the released code's numbers, and against loops over pixels."""

from __future__ import annotations

import re

import pytest
import torch

from ovseg.pamr import affinity, pamr


def test_golden(recorded):
    arrays = recorded("pamr.npz")
    checked = 0
    for name, expected in arrays.items():
        match = re.fullmatch(r"it(\d+)_d([\d_]+)\.(full|low)", name)
        if not match:
            continue
        steps, dilations = int(match[1]), tuple(map(int, match[2].split("_")))
        for budget in (2**28, 1):  # everything in one band; the narrowest bands, one class at a time
            scores = arrays[f"mask_{match[3]}"]
            refined = pamr(arrays["image"], scores, steps=steps, dilations=dilations, budget=budget)
            torch.testing.assert_close(refined, expected, atol=1e-5, rtol=1e-5)
        checked += 1
    assert checked


def test_weights_against_loops_in_float64():
    image = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dilations = (1, 3)
    weights = affinity(image, dilations)
    assert weights.shape == (16, 5, 6)

    def at(channel, y, x):
        return image[channel, min(max(y, 0), 4), min(max(x, 0), 5)]

    offsets = [(d * a, d * b) for d in dilations for a in (-1, 0, 1) for b in (-1, 0, 1)]
    for y, x in [(0, 0), (2, 3), (4, 5)]:
        logits = torch.zeros(16, dtype=torch.float64)
        for channel in range(3):
            around = torch.stack([at(channel, y + a, x + b) for a, b in offsets])
            deviation = (((around - around.mean()) ** 2).sum() / (len(around) - 1)).sqrt()
            others = torch.stack([at(channel, y + a, x + b) for a, b in offsets if a or b])
            logits -= (at(channel, y, x) - others).abs() / (1e-8 + 0.1 * deviation) / 3
        torch.testing.assert_close(weights[:, y, x], logits.softmax(0))


def test_an_even_image_spreads_scores_evenly():
    """Weights of 1/8 each: one step moves the score of a pixel to its neighbours and leaves nothing behind."""
    scores = torch.zeros(1, 1, 5, 5)
    scores[0, 0, 2, 2] = 8
    refined = pamr(torch.zeros(1, 3, 5, 5), scores, steps=1, dilations=(1,))
    expected = torch.zeros(5, 5)
    expected[1:4, 1:4] = 1
    expected[2, 2] = 0
    torch.testing.assert_close(refined[0, 0], expected)


def test_no_steps_only_resize_and_wrong_arguments():
    scores = torch.rand(1, 2, 3, 4)
    resized = pamr(torch.zeros(1, 3, 6, 8), scores, steps=0)
    assert resized.shape == (1, 2, 6, 8)
    torch.testing.assert_close(resized[..., ::5, ::7], scores[..., ::2, ::3])  # corners aligned
    with pytest.raises(ValueError, match="must be positive"):
        pamr(torch.zeros(1, 3, 6, 8), scores, dilations=())
