"""MaskCLIP's refinements against the released code's numbers, and against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from ovseg.refine import key_smoothing, prompt_denoising

SUFFIX = {"released": "", "paper": ".channel_norm"}


@pytest.mark.recorded("dense_labels/maskclip_head.npz", r"(\w+)\.cosine", argument="source")
def test_golden(recorded, source):
    arrays = recorded("maskclip_head.npz")
    cosine, keys = arrays[f"{source}.cosine"], arrays[f"{source}.keys"]
    checked = 0
    for name, expected in arrays.items():
        parts = name.removeprefix(f"{source}.").split(".")
        steps = parts[0].split("_")
        if not name.startswith(f"{source}.") or not all(s[:2] in ("pd", "ks") for s in steps):
            continue
        scores, form = cosine, "paper" if parts[1:] else "released"
        for step in steps:
            threshold = int(step[2:]) / 100
            if step.startswith("pd"):
                scores = prompt_denoising(scores, threshold)
            else:
                scores = key_smoothing(scores, keys, threshold, form)
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-6)
        checked += 1
    assert checked


@pytest.mark.parametrize("form", ["paper", "released"])
def test_smoothing_against_loops_in_float64(form):
    """Q_i = sum_j (k_i . k_j) P_j of the unit keys, for the cells that are not sure."""
    generator = torch.Generator().manual_seed(1)
    cosine = torch.randn(2, 3, 2, 4, generator=generator, dtype=torch.float64) * 0.02
    keys = torch.randn(2, 8, 5, generator=generator, dtype=torch.float64)
    out = key_smoothing(cosine, keys, 0.7, form)
    for image in range(2):
        p = (100 * cosine[image].flatten(1)).softmax(0)
        axis = 1 if form == "paper" else 0
        k = keys[image] / keys[image].norm(dim=axis, keepdim=True)
        for i in range(8):
            expected = p[:, i]
            if expected.max() < 0.7:
                expected = sum(float(k[i] @ k[j]) * p[:, j] for j in range(8))
            torch.testing.assert_close(out[image].flatten(1)[:, i].double(), expected, atol=1e-5, rtol=1e-5)


def test_denoising_keeps_the_best_of_names_that_all_fall():
    """The published code scores every name -100 then, and the label is the first class, whatever the image shows."""
    cosine = torch.zeros(1, 3, 2, 2)
    cosine[0, 2, 0, 0] = 1e-4  # P barely above a third
    kept = prompt_denoising(cosine, 0.5)
    assert (kept[0, :2] == -100).all() and torch.equal(kept[0, 2], cosine[0, 2])
    assert (kept.argmax(1) == 2).all()


def test_denoising_drops_classes_not_words():
    """P of a class is the sum over its words: three equal words have a third each, and their class stays."""
    one = torch.tensor([0.05, 0.0, 0.02]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    words = torch.tensor([0, 0, 0, 1, 2])
    p = (100 * one[0, :, 0, 0]).softmax(0)
    assert p[0] > 0.9 and (100 * one[0, words, 0, 0]).softmax(0).max() < 0.5
    kept = prompt_denoising(one[:, words], 0.5, words)
    assert torch.equal(kept[:, :3], one[:, words[:3]]) and (kept[:, 3:] == -100).all()
    assert torch.equal(prompt_denoising(one, 0.5, torch.arange(3)), prompt_denoising(one, 0.5))
    low = prompt_denoising(one[:, words] * 0, 0.7, words)  # all fall: the class of three words is the best, whole
    assert (low[:, :3] == 0).all() and (low[:, 3:] == -100).all()


def test_a_cell_that_is_certain_in_float32_is_not_smoothed():
    """ "Below 1" is asked of a float32 softmax: with a distance of 0.3 in cosine, P is exactly 1 there."""
    cosine = torch.tensor([[[[0.3, 0.0]], [[0.0, 0.001]]]], dtype=torch.float64)
    keys = torch.ones(1, 2, 4)
    out = key_smoothing(cosine, keys)
    assert torch.equal(out[0, :, 0, 0], torch.tensor([1.0, float((100 * torch.tensor([0.3, 0.0])).softmax(0)[1])]))
    p = 1 / (1 + math.exp(-0.1))
    torch.testing.assert_close(out[0, :, 0, 1], torch.tensor([2 - p, p]), atol=1e-6, rtol=0)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="paper or released"):
        key_smoothing(torch.zeros(1, 2, 2, 2), torch.zeros(1, 4, 3), form="rows")
    with pytest.raises(ValueError, match="9 cells for scores of 4"):
        key_smoothing(torch.zeros(1, 2, 2, 2), torch.zeros(1, 9, 3))
