"""Mean accuracy against the recorded numbers, and against exact fractions."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
import torch

from training.evaluation.metrics import MeanAccuracy, topk_correct


@pytest.mark.recorded("macc/macc_expected.json", r".+")
def test_mean_accuracy_is_the_recorded_one(golden, case):
    arrays = np.load(golden / "macc" / "macc_inputs.npz")
    expected = json.loads((golden / "macc" / "macc_expected.json").read_text())[case]
    ranks = torch.from_numpy(arrays[f"{case}.correct"])  # [N, 5]: is the class of rank r the true one
    correct = torch.stack([ranks[:, :1].any(1), ranks.any(1)], 1)
    labels, is_thing = torch.from_numpy(arrays[f"{case}.labels"]), torch.from_numpy(arrays[f"{case}.is_thing"]).bool()
    accuracy = MeanAccuracy(int(labels.max()) + 1)
    for part in torch.arange(len(labels)).chunk(7):  # in batches of unequal length
        accuracy.update(correct[part], labels[part], is_thing[part])
    result = accuracy.compute()
    assert set(result) == set(expected["exact_float64_mean_of_class_means"])
    for key, value in expected["exact_float64_mean_of_class_means"].items():
        assert result[key] == pytest.approx(value, abs=1e-12)
        assert result[key] == pytest.approx(expected[f"rois.{key}"], abs=5e-4)  # rounded to half precision there


def test_each_class_weighs_the_same_and_absent_kinds_have_no_number():
    accuracy = MeanAccuracy(4)
    labels = torch.tensor([0, 0, 0, 2])
    correct = torch.tensor([[True, True], [False, True], [False, False], [True, True]])
    accuracy.update(correct, labels, torch.ones(4, dtype=torch.bool))
    result = accuracy.compute()
    assert set(result) == {"thing.macc1", "thing.macc5"}  # no stuff: neither 0 nor NaN
    assert result["thing.macc1"] == pytest.approx(float((Fraction(1, 3) + 1) / 2), abs=1e-15)
    assert result["thing.macc5"] == pytest.approx(float((Fraction(2, 3) + 1) / 2), abs=1e-15)
    assert accuracy.num_segments() == {"thing": 4, "stuff": 0}
    assert accuracy.per_class(list("abcd")) == [
        {"class": "a", "kind": "thing", "segments": 3, "top1": 1 / 3, "top5": 2 / 3},
        {"class": "c", "kind": "thing", "segments": 1, "top1": 1.0, "top5": 1.0},
    ]
    json.dumps(result, allow_nan=False)


def test_topk_with_fewer_than_five_classes():
    similarity = torch.tensor([[0.1, 0.9, 0.3], [0.5, 0.2, 0.1]])
    assert topk_correct(similarity, torch.tensor([2, 0])).tolist() == [[False, True], [True, True]]
    assert topk_correct(similarity, torch.tensor([2, 2]), ks=(1, 2, 3)).tolist() == [
        [False, True, True],
        [False, False, True],
    ]
    assert topk_correct(torch.empty(0, 3), torch.empty(0, dtype=torch.int64)).shape == (0, 2)
