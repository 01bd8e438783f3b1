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

from ovdet.errors import UserError
from ovdet.evaluation.coco import evaluate_detections, format_table


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
def test_equals_lvis_package(golden: Path, kind: str):
    file = golden / "fvit" / "lvis.json.gz"
    if not file.is_file():
        pytest.skip("golden file is not there")
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
    assert nothing["AP50"] == 0 and format_table({"bbox": nothing}, "voc").split()[:3] == ["AP50", "AP75", "AP"]
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
