"""Fixed AP, phrase recall and averages, against numbers recorded from the reference and by hand."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ovdet.evaluation.arrays import Detections, Truth
from ovdet.glip import testing
from ovdet.glip.config import GlipConfig
from ovdet.glip.evaluation import flickr, wild
from ovdet.glip.evaluation.fixed_ap import best_per_class, fixed_ap
from training.engine.errors import UserError

_LINE = re.compile(r"\((AP|AR)\) @\[ IoU=(\S+)\s*\| area=\s*(\w+) .* catIds=\s*(\w+)\] = (\S+)")


def printed(lines: list[str]) -> dict[str, float]:
    """Metrics by our names from the lines of the LVIS toolkit."""
    values = {}
    for line in lines:
        kind, iou, area, group, value = _LINE.search(line).groups()
        suffix = {"0.50": "50", "0.75": "75"}.get(iou, "")
        values[kind + suffix + area.replace("all", "") + group.replace("all", "")] = float(value)
    return values


def test_fixed_ap_matches_the_recorded_one(glip_golden: Path):
    content = json.loads((glip_golden / "lvis_fixed_ap.json").read_text())
    detections = [
        {"image_id": int(image), "category_id": label, "score": score, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for image, found in content["dets"].items()
        for (x1, y1, x2, y2), score, label in zip(found["boxes"], found["scores"], found["labels"], strict=True)
    ]
    for name, lines in content["results"].items():
        wanted = printed(lines)
        truth = Truth.from_json(content["gt"])
        got = fixed_ap(truth, Detections.from_results(detections, truth), most=int(name.removeprefix("topk")))
        assert got.keys() == wanted.keys()
        assert {k: round(v, 3) for k, v in got.items()} == wanted


def test_the_best_of_each_class_count_over_the_whole_set():
    rng = np.random.default_rng(0)
    found = Detections(label=rng.integers(0, 3, 60).astype(np.int32), scores=rng.random(60))
    kept = best_per_class(found, 5)
    for c in range(3):
        best = np.sort(found.scores[found.label == c])[::-1][:5]
        assert np.array_equal(np.sort(found.scores[kept][found.label[kept] == c])[::-1], best)


def test_recall_matches_the_recorded_one(glip_golden: Path):
    content = json.loads((glip_golden / "flickr.json").read_text())
    answers = {(p["image_id"], p["sentence_id"]): p["boxes"] for p in content["predictions"]}
    ranks = {"1": "R@1", "5": "R@5", "10": "R@10", "-1": "upper bound"}
    for name, wanted in content["reports"].items():
        got = flickr.recall(content["sentences"], content["annotations"], answers, merged=name == "merged")
        for rank, kinds in wanted.items():
            assert got[ranks[rank]] == pytest.approx(kinds)


def test_answers_match_the_recorded_ones(glip_golden: Path):
    post = json.loads((glip_golden / "flickr.json").read_text())["post"]
    given = post["input"]
    (width, height), (original_height, original_width) = given["size"], given["orig_hw"]
    factor = np.array([original_width / width, original_height / height] * 2)
    labels, scores = np.array(given["labels"]) - 1, np.array(given["scores"])
    found = flickr.boxes_by_phrase(np.array(given["boxes"]) * factor, scores, labels, len(post["boxes"]))
    for got, wanted in zip(found, post["boxes"], strict=True):
        assert np.allclose(got, wanted, atol=1e-3)


@pytest.mark.parametrize(("box", "expected"), [([10, 10, 20, 20], 1.0), ([10, 10, 17, 17], 0.0)])
def test_phrases_are_judged_by_last_pixels(monkeypatch, box: list[int], expected: float):
    """Detections end behind their last pixel, recall counts it: 7 of 10 pixels a side are 49 %, a miss."""
    one = torch.ones(1)
    result = {"boxes": torch.tensor([box]).float(), "scores": one, "labels": torch.zeros_like(one, dtype=torch.int64)}
    monkeypatch.setattr(testing, "find_own", lambda *args: [result])
    test = testing.PhraseTest.__new__(testing.PhraseTest)
    test.config, test.prompts, test.keys = GlipConfig(), [SimpleNamespace(tokens=[[1]])], [("7", 0)]
    test.images = [{"index": [0], "images": None, "sizes": [(64, 64)], "original": [(64, 64)]}]
    test.sentences, test.boxes = {"7": ["[/EN#5/people A hand] waves ."]}, {"7": {"5": [[10, 10, 19, 19]]}}
    precision = SimpleNamespace(autocast=contextlib.nullcontext)
    assert test(None, precision)["R@1"] == expected


def test_marked_sentences_and_their_files(tmp_path: Path):
    text, phrases = flickr.parse_sentence("[/EN#5/people/bodyparts A hand] touches [/EN#6/vehicles the car] .")
    assert text == "A hand touches the car ." and [text[b:e] for b, e in (p.span for p in phrases)] == [
        "A hand",
        "the car",
    ]
    assert phrases[0].kinds == ("people", "bodyparts") and [p.entity for p in phrases] == ["5", "6"]
    (tmp_path / "Sentences").mkdir()
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Sentences" / "7.txt").write_text("[/EN#5/people A hand] there\n\n")
    (tmp_path / "Annotations" / "7.xml").write_text(
        "<annotation><object><name>5</name><name>8</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>11</xmax><ymax>12"
        "</ymax></bndbox></object><object><name>9</name><nobndbox>1</nobndbox></object></annotation>"
    )
    sentences, boxes = flickr.read_entities(tmp_path, ["7"])
    assert sentences == {"7": ["[/EN#5/people A hand] there"]}
    assert boxes == {"7": {"5": [[0, 1, 10, 11]], "8": [[0, 1, 10, 11]]}}
    assert flickr.recall(sentences, boxes, {})["R@1"] == {"all": 0.0, "people": 0.0}
    with pytest.raises(UserError, match="2 phrases answered, but 1 have boxes"):
        flickr.recall(sentences, boxes, {("7", 0): [[], []]})
    with pytest.raises(UserError, match="8.txt cannot be read"):
        flickr.read_entities(tmp_path, ["8"])


def test_averages_and_the_leader_board(tmp_path: Path):
    results = {name: {"AP": i / 100} for i, name in enumerate([*wild.ODINW13, "other"])}
    assert wild.averages(results) == pytest.approx({"AP of 14 sets": 0.065, "AP of 13 sets": 0.06})
    assert wild.averages({"a": {"AP": 0.5}}) == {"AP of 1 sets": 0.5}
    assert wild.format_averages({"a": {"AP": 0.5}}).splitlines() == ["a              50.00", "AP of 1 sets   50.00"]
    wild.write_leader_board(tmp_path / "a.json", {"x": [{"score": 1}]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [{"score": 1}]}
    wild.write_leader_board(tmp_path / "b.json", {"x": {3: [], 30: [{"score": 1}]}}, seeds=[3, 30])
    assert json.loads((tmp_path / "b.json").read_text()) == {"x": {"3": [], "30": [{"score": 1}]}}
    with pytest.raises(UserError, match="x has no results of seed 300"):
        wild.write_leader_board(tmp_path / "c.json", {"x": {3: []}}, seeds=[3, 300])
    with pytest.raises(UserError, match="no result"):
        wild.averages({})
