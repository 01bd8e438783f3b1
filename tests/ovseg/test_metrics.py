"""Segmentation scores: published numbers, closed forms, and processes."""

from __future__ import annotations

import json
import math

import pytest
import torch

from ovseg.metrics import Confusion


def reduce_zero(labels):
    """Label 0 becomes 255, the others one less."""
    lower = labels.int() - 1
    return torch.where((labels == 0) | (labels == 255), 255, lower).to(torch.uint8)


def test_golden(golden, recorded):
    arrays = recorded("metrics.npz")
    cases = json.loads((golden / "dense_labels" / "metrics.json").read_text())
    for name, case in cases.items():
        labels = arrays["labels_ignore_255"] if name != "reduce_zero" else reduce_zero(arrays["labels_reduce_zero"])
        prediction = arrays["prediction_without_last_class" if name == "absent_class" else "prediction"]
        confusion = Confusion(case["num_classes"])
        for image, truth in zip(prediction, labels, strict=True):
            confusion.update(image, truth)
        scores, classes = confusion.compute(), confusion.per_class()
        for key in ("mIoU", "mAcc", "aAcc"):
            assert abs(scores[key] - case[key]) < 1e-12
        for key, recorded_key in [("intersection", "intersect"), ("union",) * 2, ("predicted",) * 2, ("labelled",) * 2]:
            assert classes[key].tolist() == case[recorded_key]
        for key in ("IoU", "Acc"):
            expected = torch.tensor([math.nan if v is None else v for v in case[key]], dtype=torch.float64)
            torch.testing.assert_close(classes[key], expected, atol=1e-12, rtol=0, equal_nan=True)


def test_seen_unseen_and_their_harmonic_mean():
    """Class 0: 3 of 4 pixels found, one taken by class 2; class 1 never labelled; class 2: all found, union 2."""
    confusion = Confusion(3)
    confusion.update(torch.tensor([[0, 0, 0, 2, 2, 1]]), torch.tensor([[0, 0, 0, 0, 2, 255]], dtype=torch.uint8))
    scores = confusion.compute(unseen=[2])
    assert scores["mIoU"] == pytest.approx((3 / 4 + 1 / 2) / 2)  # class 1 is predicted on an ignored pixel only
    assert scores["mAcc"] == pytest.approx((3 / 4 + 1) / 2) and scores["aAcc"] == pytest.approx(4 / 5)
    assert scores["mIoU_seen"] == pytest.approx(3 / 4) and scores["mIoU_unseen"] == pytest.approx(1 / 2)
    assert scores["hIoU"] == pytest.approx(2 * 0.75 * 0.5 / 1.25)


def test_counts_stay_whole_where_float32_does_not():
    """2^24 + 1 pixels of one kind: the published counters lose the last."""
    confusion = Confusion(2)
    confusion.counts[0, 0] = 2**24
    confusion.update(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.uint8))
    assert confusion.counts[0, 0] == 2**24 + 1


def test_values_outside_the_range_and_empty_scores():
    confusion = Confusion(2)
    with pytest.raises(ValueError, match="outside 0..1"):
        confusion.update(torch.tensor([0]), torch.tensor([2], dtype=torch.uint8))
    with pytest.raises(ValueError, match="outside 0..1"):
        confusion.update(torch.tensor([2]), torch.tensor([0], dtype=torch.uint8))
    with pytest.raises(ValueError, match="differ in shape"):
        confusion.update(torch.zeros(2), torch.zeros(3))
    assert all(math.isnan(v) for v in confusion.compute().values())
