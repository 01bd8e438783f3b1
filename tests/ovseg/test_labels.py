"""Labels from scores: the published rules written out over whole maps, and bands that change nothing."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import ovseg.labels
from ovseg.labels import LabelRule, ScoreMap, Smoothing, label_pixels
from ovseg.pamr import pamr
from ovseg.windows import plan_windows

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from host_waits import HostWaits  # noqa: E402

WORDS = torch.tensor([0, 0, 0, 1, 2, 2, 3])
SIZE = (37, 53)


def score_map(windows=plan_windows(32, 48, 8, 16, 8)):  # noqa: B008 (never changed)
    generator = torch.Generator().manual_seed(3)
    h, w = windows.rows.cells, windows.columns.cells
    maps = torch.randn(windows.count, len(WORDS), h, w, generator=generator) * 0.05
    return ScoreMap.of(maps, windows, *SIZE)


def published(scores, rule):
    """Softmax over words, the best word of each class, area rule, threshold: on maps of the full size."""
    p = (rule.scale * scores).softmax(0)
    classes = torch.stack([p[c == WORDS].amax(0) for c in range(4)])
    if rule.area is not None:
        areas = F.one_hot(classes.argmax(0), 4).sum((0, 1))[1:]
        classes[1:] *= (areas > rule.area * areas.sum())[:, None, None]
    labels, best = classes.argmax(0), classes.amax(0)
    if rule.threshold:
        labels[best < rule.threshold] = 0
    return labels, best


RULES = [
    LabelRule(40),
    LabelRule(100, background=0, threshold=0.4),
    LabelRule(40, background=0, area=0.3),
    LabelRule(65, background=0, threshold=0.6, area=0.2),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("budget", [2**25, 20000, 1])
def test_bands_give_the_labels_of_the_published_rule(rule, budget):
    scores = score_map()
    labels, best = published(scores.band(0, SIZE[0]), rule)
    found = label_pixels(scores, WORDS, 4, rule, confidence=True, budget=budget)
    assert found.labels.dtype == torch.uint8 and torch.equal(found.labels.long(), labels)
    torch.testing.assert_close(found.confidence, best, atol=1e-5, rtol=1e-5)
    assert labels.flatten().bincount(minlength=4).count_nonzero() > 1


def test_refined_by_pamr_in_bands():
    scores, rule = score_map(), LabelRule(40, background=0, threshold=0.35)
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
    resized = F.interpolate(image[None], SIZE, mode="bilinear")
    refined = pamr(resized, scores.band(0, SIZE[0])[None], steps=3, dilations=(1, 2))[0]
    labels, _ = published(refined, rule)
    smoothing = Smoothing(image, 3, (1, 2))
    found = label_pixels(scores, WORDS, 4, rule, smoothing=smoothing)
    assert torch.equal(found.labels.long(), labels)
    assert not torch.equal(found.labels, label_pixels(scores, WORDS, 4, rule).labels)


def test_probabilities_are_divided_by_their_sum():
    windows = plan_windows(8, 16, 8)
    maps = torch.tensor([[3.0, 0.0], [1.0, 2.0]]).view(1, 2, 1, 2)
    scores = ScoreMap.of(maps, windows, 8, 16, probability=True)
    found = label_pixels(scores, torch.tensor([0, 1]), 2, LabelRule(1, background=1, threshold=0.8), confidence=True)
    assert found.confidence[0, 0] == pytest.approx(0.75) and found.labels[0, 0] == 1
    assert found.confidence[0, -1] == pytest.approx(1.0) and found.labels[0, -1] == 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("smoothed", [False, True])
def test_no_band_waits_for_the_device(rule, smoothed, monkeypatch):
    """What is read, of the words' classes and of matrices on the host, is read as often for few bands as for many."""
    monkeypatch.setattr(ovseg.labels, "PAMR_BUDGET", 0)  # bands as small as the budget says
    scores = score_map()
    smoothing = Smoothing(torch.rand(3, 32, 48), 1, (1, 2)) if smoothed else None
    read, bands = [], Counter()
    original = ScoreMap.band
    monkeypatch.setattr(ScoreMap, "band", lambda *args: bands.update([len(read)]) or original(*args))
    for budget in (2**25, 1):
        with HostWaits() as waits:
            label_pixels(scores, WORDS, 4, rule, smoothing=smoothing, confidence=True, budget=budget)
        read.append(waits.places)
    assert bands[0] in (1, 2) and bands[1] > 4 * bands[0]  # twice for the area rule
    assert read[0] == read[1] and sum(read[0].values()) <= 9, read


def test_wrong_arguments():
    with pytest.raises(ValueError, match="need a background class"):
        LabelRule(40, threshold=0.1)
    with pytest.raises(ValueError, match="order of their classes"):
        label_pixels(score_map(), torch.tensor([1, 0, 0, 1, 2, 2, 3]), 4, LabelRule())
    with pytest.raises(ValueError, match="order of their classes"):
        label_pixels(score_map(), WORDS, 5, LabelRule())
