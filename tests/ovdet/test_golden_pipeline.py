"""Views of a photograph, and VOC's measure, against numbers recorded from the published detector's pipelines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ovdet.data.images import read_image
from ovdet.data.masks import MaskWindows, run_lengths, unpack, view_of_mask
from ovdet.data.transforms import View, apply_view, apply_view_to_boxes, scaled_size, test_view
from ovdet.evaluation.coco import evaluate_detections
from ovdet.evaluation.voc import area, eleven_points, precision_recall
from ovdet.parts.pixels import normalize_padded

JITTER = (0.1, 2.0)


@pytest.fixture(scope="module")
def pipeline(golden: Path) -> dict[str, Any]:
    """The recorded numbers, the photograph and its objects."""
    file = golden / "fvit" / "pipeline.json"
    if not file.is_file():
        pytest.skip("recorded numbers of the detector are not there: set CLIPSELF_GOLDEN")
    content = json.loads(file.read_text())
    root = Path(os.environ.get("CLIPSELF_PHOTOS", golden.parent / "data" / "coco_tiny"))
    photos = sorted(root.rglob(content["file"]))
    if not photos:
        pytest.skip(f"the photograph {content['file']} is not there: set CLIPSELF_PHOTOS to the folder it is in")
    found: dict[int, Any] = {}
    for source in sorted(root.rglob("instances_*.json")):
        found |= {a["id"]: a for a in json.loads(source.read_text())["annotations"]}
    with np.load(golden / "fvit" / "pipeline.npz") as arrays:
        content["arrays"] = {key: torch.from_numpy(arrays[key].astype(np.int64) if arrays[key].dtype == np.uint64
                                                   else arrays[key]) for key in arrays.files}  # fmt: skip
    content["image"] = read_image(str(photos[0]))
    content["objects"] = [found[i] for i in content["annotations"]]
    return content


def view_of(case: dict[str, Any], original: tuple[int, int]) -> View:
    """The view that the recorded random numbers give."""
    ratio, _, _, top, left, flip = (draw[2] for draw in case["draws"])
    target = int(case["size"] * (ratio * (JITTER[1] - JITTER[0]) + JITTER[0]))
    scaled = scaled_size(*original, target)
    return View(scaled, top, left, (min(scaled[0], case["size"]), min(scaled[1], case["size"])), flip is not None)


def levels_apart(found: Tensor, wanted: Tensor) -> Tensor:
    """Difference of normalised images in grey levels."""
    std = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
    return (found - wanted).abs() * std


def thinned(image: Tensor, wanted: Tensor) -> Tensor:
    step = -(-image.shape[-1] // wanted.shape[-1])
    return image[:, ::step, ::step]


def test_decoding_and_test_view(pipeline: dict[str, Any]):
    image, arrays = pipeline["image"], pipeline["arrays"]
    assert tuple(image.shape[-2:]) == (pipeline["height"], pipeline["width"])
    assert torch.allclose(image.float().mean((1, 2)), arrays["decoded_mean"], atol=1e-3)
    for case in (c for c in pipeline["cases"] if c["name"].startswith("test")):
        pixels, size = test_view(image, case["size"])
        assert list(size) == case["img_shape"][:2] and list(pixels.shape[1:]) == case["pad_shape"][:2]
        found = normalize_padded(pixels[None], [size])[0]
        wanted = arrays[f"{case['name']}_image"]
        assert levels_apart(thinned(found, wanted), wanted).max() <= 2.001
        assert not found[:, size[0] :].any() and not found[:, :, size[1] :].any()
        factors = [size[1] / image.shape[2], size[0] / image.shape[1]] * 2
        assert factors == pytest.approx(case["scale_factor"], abs=1e-6)


def test_training_views(pipeline: dict[str, Any]):
    image, arrays, objects = pipeline["image"], pipeline["arrays"], pipeline["objects"]
    original = tuple(image.shape[-2:])
    own = torch.tensor([o["bbox"] for o in objects])
    own[:, 2:] += own[:, :2]
    cases = [c for c in pipeline["cases"] if c["name"].startswith("train")]
    assert cases
    pixels_off = 0
    for case in cases:
        name, view = case["name"], view_of(case, original)
        assert list(view.size) == case["img_shape"][:2] and view.flip == case["flip"]
        found = normalize_padded(apply_view(image, view, case["size"])[None], [view.size])[0]
        if f"{name}_image" in arrays:
            wanted = arrays[f"{name}_image"]
            assert levels_apart(thinned(found, wanted), wanted).max() <= 2.001
        mean, std = arrays[f"{name}_stats"][:2]  # rounding differs by a tenth of a grey level, always to one side
        assert torch.allclose(found.mean(), mean, atol=3e-3) and torch.allclose(found.std(), std, atol=1e-3)
        boxes = apply_view_to_boxes(own, view, original)
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        if f"{name}_masks" in arrays:
            rles = [run_lengths(o["segmentation"], *original) for o in objects]
            windows = [view_of_mask(rle, view) for rle in rles]
            boxes = torch.tensor([(x, y, x + m.shape[1], y + m.shape[0]) for m, (x, y) in windows]).float()
            keep &= (boxes[:, 2:] - boxes[:, :2] >= 0.01).all(1)
            kept = [w for w, good in zip(windows, keep.tolist(), strict=True) if good]
            masks = unpack(MaskWindows.of([m for m, _ in kept], [c for _, c in kept]), case["size"])
            wanted = torch.from_numpy(np.unpackbits(arrays[f"{name}_masks"].numpy(), axis=-1)[..., : case["size"]])
            pixels_off += int((masks != wanted.bool()).sum())
            assert (masks.flatten(1).sum(1) - arrays[f"{name}_mask_areas"]).abs().max() <= 1
        assert torch.allclose(boxes[keep], arrays[f"{name}_boxes"], atol=1e-4)
    assert pixels_off <= 1  # a source index that is a whole number up to rounding


# -- AP ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded_evaluation(golden: Path) -> dict[str, Any]:
    file = golden / "fvit" / "evaluation.json"
    if not file.is_file():
        pytest.skip("recorded numbers of the detector are not there: set CLIPSELF_GOLDEN")
    return json.loads(file.read_text())


def detections_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """COCO results of MMDetection's: for each image, for each class, rows of x1 y1 x2 y2 score."""
    classes = sorted(c["id"] for c in content["truth"]["categories"])
    images = [image["id"] for image in content["truth"]["images"]]
    return [
        {"image_id": image, "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        for image, by_class in zip(images, content["results"], strict=True)
        for category, rows in zip(classes, by_class, strict=True)
        for x1, y1, x2, y2, score in rows
    ]


def test_open_vocabulary_ap(recorded_evaluation: dict[str, Any]):
    content, wanted = recorded_evaluation, recorded_evaluation["coco"]
    names = [c["name"] for c in sorted(content["truth"]["categories"], key=lambda c: c["id"])]
    novel = content["novel"] if isinstance(content["novel"], list) else names[-content["novel"] :]
    novel = [names[n] if isinstance(n, int) else n for n in novel]
    found = evaluate_detections(content["truth"], detections_of(content), novel=novel)
    percent = {"base_ap50": "AP50_base", "novel_ap50": "AP50_novel", "all_ap50": "AP50"}
    assert {k: 100 * found[v] for k, v in percent.items()} == pytest.approx({k: wanted[k] for k in percent}, abs=2e-3)
    same = {"bbox_mAP": "AP", "bbox_mAP_50": "AP50", "bbox_mAP_75": "AP75", "bbox_mAP_s": "APs", "bbox_mAP_m": "APm"}
    assert {k: found[v] for k, v in same.items()} == pytest.approx({k: wanted[k] for k in same}, abs=6e-4)


@pytest.mark.parametrize(("iou", "kind"), [(0.5, "voc07"), (0.5, "other"), (0.75, "voc07"), (0.75, "other")])
def test_voc_ap_of_the_development_kit(recorded_evaluation: dict[str, Any], iou: float, kind: str):
    content = recorded_evaluation
    values = []
    for label in range(len(content["truth"]["categories"])):
        objects, object_image, difficult, boxes, image, scores = [], [], [], [], [], []
        for number, (truth, by_class) in enumerate(zip(content["voc_truth"], content["results"], strict=True)):
            for key, hard in (("", False), ("_ignore", True)):
                for box, own in zip(truth[f"bboxes{key}"], truth[f"labels{key}"], strict=True):
                    if own == label:
                        objects.append(box), object_image.append(number), difficult.append(hard)
            for *box, score in by_class[label]:
                boxes.append(box), image.append(number), scores.append(score)
        curve = precision_recall(
            np.array(objects).reshape(-1, 4), np.array(object_image, int), np.array(difficult, bool),
            np.array(boxes).reshape(-1, 4), np.array(image, int), np.array(scores), iou,
        )  # fmt: skip
        values.append({"voc07": eleven_points, "other": area}[kind](*curve))
    wanted = content["voc"][f"{kind} iou {iou} legacy True"]
    assert values == pytest.approx(wanted["classes"], abs=1e-5)
    assert np.mean(values) == pytest.approx(wanted["mean"], abs=1e-5)
