"""AP against pycocotools and the lvis package."""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ovdet.data.annotations import load_annotations
from ovdet.evaluation.arrays import Detections, Truth
from ovdet.evaluation.coco import evaluate, evaluate_detections, format_table, write_results
from ovdet.evaluation.lvis import best_per_image
from ovdet.testing import read_truth
from training.engine.errors import UserError


def rectangle(box: list[float], height: int, width: int) -> dict:
    mask = np.zeros((height, width), np.uint8, order="F")
    x, y, w, h = (int(v) for v in box)
    mask[max(y, 0) : y + h, max(x, 0) : x + w] = 1
    rle = coco_mask.encode(mask)
    return {"size": [height, width], "counts": rle["counts"].decode()}


def scene(seed: int = 0) -> tuple[dict, list[dict]]:
    """Objects of all sizes in 12 images, some of them crowds, and detections near and far with equal scores."""
    rng = np.random.default_rng(seed)
    images = [{"id": 7 * i + 3, "height": 300, "width": 400, "file_name": f"{i}.jpg"} for i in range(12)]
    categories = [{"id": i, "name": f"class {i}"} for i in (2, 5, 6, 11, 40)]
    annotations, detections = [], []
    for image in images[:-1]:  # the last image has no object
        for _ in range(rng.integers(1, 9)):
            w, h = np.exp(rng.uniform(np.log(8), np.log(250), 2))
            x, y = rng.uniform(0, max(400 - w, 1)), rng.uniform(0, max(300 - h, 1))
            category = int(rng.choice([2, 5, 6, 11]))  # 40 has no objects at all
            crowd = int(rng.random() < 0.1)
            box = [float(v) for v in (x, y, w, h)]
            polygon = [[x, y, x + w, y, x + w, y + h * 0.8, x, y + h]]
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": image["id"], "category_id": category, "bbox": box,
                    "area": float(w * h * 0.9), "iscrowd": crowd,
                    "segmentation": rectangle(box, 300, 400) if crowd else polygon,
                }
            )  # fmt: skip
            for _ in range(rng.integers(0, 4)):
                shift = rng.normal(0, 0.12, 4)
                near = [x + shift[0] * w, y + shift[1] * h, w * np.exp(shift[2]), h * np.exp(shift[3])]
                detections.append((image["id"], category if rng.random() < 0.8 else 40, near))
    for image in images:
        for _ in range(6):
            detections.append((image["id"], int(rng.choice([2, 5, 6, 11, 40])), [*rng.uniform(0, 150, 4)]))
    found = [
        {
            "image_id": i, "category_id": c, "score": round(float(rng.random()), 1), "bbox": [float(v) for v in box],
            "segmentation": rectangle(box, 300, 400),
        }
        for i, c, box in detections
    ]  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": categories}, found


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_equals_pycocotools(kind: str):
    truth, found = scene()
    # Crowds have the ids of no detection's best match here and there: 1e-6 asks for the same treatment of all of them.
    novel = ["class 5", "class 40"]
    result = evaluate_detections(truth, copy.deepcopy(found), kind=kind, novel=novel)
    field = "bbox" if kind == "bbox" else "segmentation"
    plain = [{k: d[k] for k in ("image_id", "category_id", "score", field)} for d in found]
    with contextlib.redirect_stdout(io.StringIO()):
        gold = COCO()
        gold.dataset = copy.deepcopy(truth)
        gold.createIndex()
        evaluator = COCOeval(gold, gold.loadRes(plain), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    assert [result[k] for k in ("AP", "AP50", "AP75", "APs", "APm", "APl")] == pytest.approx(
        evaluator.stats[:6].tolist(), abs=1e-6
    )
    # Groups, from pycocotools' own table: classes in the order of their ids, those without objects left out.
    precision = evaluator.eval["precision"][:, :, :, 0, -1]
    assert result["AP50_base"] == pytest.approx(np.mean(precision[0][:, [0, 2, 3]]), abs=1e-6)
    assert result["AP50_novel"] == pytest.approx(np.mean(precision[0][:, [1]]), abs=1e-6)
    assert result["AP_base"] == pytest.approx(np.mean(precision[:, :, [0, 2, 3]]), abs=1e-6)
    assert 0.01 < result["AP"] < 0.9


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_equals_lvis_package(kind: str):
    file = Path(__file__).parents[1] / "golden" / "fvit" / "lvis.json.gz"
    content = json.loads(gzip.decompress(file.read_bytes()))
    truth, found, expected = content["truth"], content[kind]["detections"], content[kind]["expected"]
    result = evaluate_detections(truth, found, kind=kind, protocol="lvis")
    assert {k: result[k] for k in expected} == pytest.approx(expected, abs=1e-6)
    assert len(found) > 300 and expected["APf"] > 0 and (kind == "segm" or expected["APr"] > 0)
    # The federated protocol matters here: counted as COCO's, the same detections score otherwise.
    assert abs(evaluate_detections(truth, found, kind=kind)["AP"] - expected["AP"]) > 1e-3


def test_perfect_none_and_odd_input(caplog: pytest.LogCaptureFixture):
    truth, _ = scene()
    truth["annotations"] = [a for a in truth["annotations"] if not a["iscrowd"]]
    perfect = []
    for a in truth["annotations"]:
        rle = coco_mask.frPyObjects(a["segmentation"], 300, 400)[0]
        rle = {"size": [300, 400], "counts": rle["counts"].decode()}
        perfect.append({**a, "score": 0.9, "segmentation": rle})
    assert evaluate_detections(truth, perfect)["AP"] == pytest.approx(1)
    assert evaluate_detections(truth, perfect, kind="segm")["AP50"] == pytest.approx(1)
    nothing = evaluate_detections(truth, [], protocol="voc")
    assert nothing["AP50"] == nothing["VOC_AP50"] == nothing["VOC_AP75_area"] == 0
    assert format_table({"bbox": nothing}, "voc").split()[:5] == ["VOC", "AP50", "VOC", "AP75", "AP50"]
    # Fields that other files lack, and bad entries, do not matter.
    bare = copy.deepcopy(truth)
    for a in bare["annotations"]:
        del a["area"], a["iscrowd"], a["id"]
    bare["annotations"] += [{"bbox": [1, 2, 3]}, None, {"image_id": 3, "category_id": 2, "bbox": [0, 0, -1, 5]}]
    assert evaluate_detections(bare, perfect)["AP"] == pytest.approx(1)
    assert "not evaluated" in caplog.text
    for a in bare["annotations"][:-3]:
        a["segmentation"] = {"size": [300, 400], "counts": [5, 10]}  # runs that end too early
    with pytest.raises(UserError, match="no object has a mask"):
        evaluate_detections(bare, perfect, kind="segm")
    with pytest.raises(UserError, match="neg_category_ids"):
        evaluate_detections(truth, perfect, protocol="lvis")


def test_voc_difficult_objects():
    """Four wrong boxes inside a difficult object cost what they cost anywhere; ones that cover it cost nothing."""
    truth = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [300, 300, 50, 50]},
            {"id": 2, "image_id": 1, "category_id": 1, "bbox": [0, 0, 200, 200], "difficult": 1},
        ],
    }
    right = {"image_id": 1, "category_id": 1, "bbox": [300, 300, 50, 50], "score": 0.1}
    inside = [{**right, "bbox": [10 * i, 10, 60, 60], "score": 0.9} for i in range(1, 5)]
    covering = [{**right, "bbox": [0, 0, 200, 200 - i], "score": 0.9} for i in range(4)]
    values = evaluate_detections(truth, [*inside, right], protocol="voc")
    assert values["VOC_AP50"] == values["VOC_AP50_area"] == pytest.approx(0.2) and values["AP50"] == pytest.approx(1)
    assert evaluate_detections(truth, [*covering, right], protocol="voc")["VOC_AP50"] == pytest.approx(1)
    twice = evaluate_detections(truth, [{**right, "score": 0.9}, right], protocol="voc")
    assert twice["VOC_AP50"] == pytest.approx(1)  # the second one comes after full recall
    assert evaluate_detections(truth, [{**right, "bbox": [300, 300, 50, 24]}], protocol="voc")["VOC_AP50"] == 0


def test_arrays_and_files(tmp_path: Path):
    truth, found = scene()
    arrays = Truth.from_json(truth)
    detections = Detections.from_results(found, arrays)
    assert len(detections) == len(found)
    write_results(tmp_path / "r.json", arrays, detections, kind="bbox")
    again = json.loads((tmp_path / "r.json").read_text())
    assert again == [{k: d[k] for k in ("image_id", "category_id", "score", "bbox")} for d in found]
    write_results(tmp_path / "n.json", arrays, Detections(), kind="segm")
    assert json.loads((tmp_path / "n.json").read_text()) == []
    best = best_per_image(detections, 3)
    for image in range(len(arrays.image_ids)):
        mine = np.flatnonzero(detections.image == image)
        wanted = sorted(mine[np.argsort(-detections.scores[mine], kind="stable")][:3])
        assert [r for r in best if detections.image[r] == image] == wanted


def test_lvis_from_annotations_that_were_read_before(tmp_path: Path):
    """The arrays at hand, with the lists that the file alone has, score as the file itself; it is read once."""
    file = Path(__file__).parents[1] / "golden" / "fvit" / "lvis.json.gz"
    content = json.loads(gzip.decompress(file.read_bytes()))
    for image in content["truth"]["images"]:
        image.setdefault("file_name", f"{image['id']}.jpg")
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(content["truth"]))
    annotations = load_annotations(str(path), key="k", masks=True)
    for kind in ("bbox", "segm"):
        truth = read_truth(str(path), "lvis", annotations)
        found = Detections.from_results(content[kind]["detections"], truth)
        result = evaluate(truth, found, kind=kind, protocol="lvis")
        expected = content[kind]["expected"]
        assert {k: result[k] for k in expected} == pytest.approx(expected, abs=1e-6)
