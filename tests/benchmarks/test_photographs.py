"""The bench on photographs: its statistics by closed forms, its head on features with a known answer, its rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import photo_head  # noqa: E402
import photographs  # noqa: E402
import segments  # noqa: E402

from open_clip.transform import normalize  # noqa: E402

BASE = {"image_id": [4, 4, 7, 7, 9, 9], "label": [0, 1, 0, 0, 1, 2], "rois.top1": [1, 0, 0, 1, 0, 1]}


def test_accuracy_is_a_mean_over_classes():
    # Class 0: 2 of 3; class 1: 0 of 2; class 2: 1 of 1.
    assert photographs.accuracy(BASE, "rois.top1") == pytest.approx(100 * (2 / 3 + 0 + 1) / 3)
    assert photographs.accuracy(BASE, "rois.top1", least=2) == pytest.approx(100 * (2 / 3 + 0) / 2)
    twice = np.array([2.0, 2, 1, 1, 0, 0])  # the first photograph twice, the last not at all
    assert photographs.accuracy(BASE, "rois.top1", twice) == pytest.approx(100 * (3 / 4 + 0) / 2)


def test_errors_by_drawing_photographs_anew():
    """Against the error of a mean in closed form: one class, one segment on each photograph."""
    rng = np.random.default_rng(1)
    count = 400
    base = {"image_id": list(range(count)), "label": [0] * count, "x": rng.integers(0, 2, count).tolist()}
    run = {**base, "x": rng.integers(0, 2, count).tolist()}
    gains = 100 * (np.array(run["x"]) - np.array(base["x"]))
    expected = gains.std(ddof=1) / count**0.5
    assert photographs.bootstrap(base, [run], "x") == pytest.approx(expected, rel=0.1)
    assert photographs.bootstrap(base, [base, base], "x") == 0


def test_the_head_finds_what_can_be_found():
    """Noisy copies of class embeddings in another basis; the weight decay is chosen on photographs left out."""
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(6, 12, generator=generator), dim=1)
    labels = torch.arange(6).repeat(40)
    basis = torch.randn(12, 16, generator=generator)
    features = 3 + embeddings[labels] @ basis + 0.1 * torch.randn(240, 16, generator=generator)
    crops = photo_head.Crops(torch.zeros(240, 3, 1, 1), labels, torch.arange(240) // 6)
    decay, accuracy = photo_head.choose_decay(features, crops, embeddings)
    assert decay in photo_head.DECAYS and accuracy[decay] > 0.95
    weight, bias = photo_head.fit(features, labels, embeddings, decay)
    assert (((features @ weight.T + bias) @ embeddings.T).argmax(1) == labels).float().mean() > 0.97


def test_crops_of_known_classes_in_three_sizes_and_mirrored(tmp_path):
    picture = np.zeros((60, 80, 3), np.uint8)
    picture[20:40, 30:50] = 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    boxes = [([30, 20, 20, 20], 1, 0), ([30, 20, 20, 20], 2, 0), ([0, 0, 8, 50], 1, 0), ([0, 0, 40, 40], 1, 1)]
    content = {
        "images": [{"id": 5, "file_name": "a.png", "width": 80, "height": 60}],
        "categories": [{"id": 1, "name": "box"}, {"id": 2, "name": "unknown"}],
        "annotations": [
            {"id": i, "image_id": 5, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": crowd}
            for i, (b, c, crowd) in enumerate(boxes)
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    crops = photo_head.labelled_crops(str(tmp_path / "a.json"), str(tmp_path), ["sky", "box"], 28)
    # The unknown class, the thin object and the crowd are left out.
    assert crops.pixels.shape == (6, 3, 28, 28)
    assert crops.labels.tolist() == [1] * 6 and crops.images.tolist() == [0] * 6
    white = (crops.pixels > 127).float().mean((1, 2, 3))
    assert white[0] == 1 and white[2] == pytest.approx(1 / 1.5**2, abs=0.05)
    assert torch.equal(crops.pixels[2].flip(-1), crops.pixels[3])


def test_cells_of_no_segment_do_not_count():
    ids = np.kron(np.array([[0, 3], [3, 5]]), np.ones((4, 4), int))
    found = segments.pure_cells(ids, 2)
    assert found[0] == -1 and found[1] == found[2] and found[3] not in (-1, found[1])


def test_rows_are_command_lines_of_the_program():
    from training.params import parse_args

    for row, flags in photographs.ROWS.items():
        filled = [f.format(trunk="t", data="d") for f in flags]
        assert row.startswith(parse_args(filled, check=False).entry.name)
    assert set(photographs.READING) <= set(photographs.ROWS)
    assert set(photographs.READING.values()) <= set(photographs.UNTRAINED)


def test_the_model_is_an_ordinary_one(tmp_path):
    """The config is read, has one projection, and takes a trunk whose grid of positions has another size."""
    import open_clip

    photo_head.write_config(tmp_path / "photographs.json", 112, 512)
    open_clip.add_model_config(tmp_path / "photographs.json", "photographs")
    model = open_clip.create_model("photographs", pretrained=None)
    assert photo_head.projection(model).out_features == 512 and model.visual.image_mean == photo_head.IMAGENET[0]
    trunk = model.visual.trunk
    state = {"pos_embed": torch.randn(1, 1 + 37 * 37, 384)}
    assert photo_head.fitting(state, trunk)["pos_embed"].shape == trunk.state_dict()["pos_embed"].shape
    crops = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # what the head is learned on is what the model projects
        projected = photo_head.projection(model.eval())(photo_head.class_tokens(trunk, crops))
        torch.testing.assert_close(model.encode_image(normalize(crops, *photo_head.IMAGENET)), projected)


@pytest.mark.slow
def test_smoke(tmp_path):
    """From pictures to the table on a trunk of random weights; the second time everything is there."""
    import timm
    from safetensors.torch import save_file

    scenes = tmp_path / "scenes"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    made = ["-m", "training.scenes", "--out", str(scenes), "--train", "6", "--val", "4", "--size", "112"]
    subprocess.run([sys.executable, *made], check=True, env=environment, capture_output=True)
    trunk = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    save_file(trunk.state_dict(), str(tmp_path / "trunk.safetensors"))
    panoptic = scenes / "annotations/panoptic_val2017.json"
    classes = len(json.loads(panoptic.read_text())["categories"])
    np.save(tmp_path / "classes.npy", np.random.default_rng(0).standard_normal((classes, 32)))
    command = [
        sys.executable, str(ROOT / "benchmarks/photographs.py"), "--out", str(tmp_path / "out"), "--train-annotations",
        str(scenes / "annotations/instances_train2017.json"), "--train-images", str(scenes / "train2017"),
        "--val-annotations", str(panoptic), "--val-images", str(scenes / "val2017"), "--embeddings",
        str(tmp_path / "classes.npy"), "--trunk", str(tmp_path / "trunk.safetensors"), "--methods", "clipself",
        "declip", "--seeds", "2", "--steps", "2", "--size", "56", "--larger", "84", "--crop", "56",
    ]  # fmt: skip
    for _ in range(2):
        done = subprocess.run(command, text=True, capture_output=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "| **declip** | 2 |" in done.stdout and "after context distillation" in done.stdout
    record = json.loads((tmp_path / "out/results.json").read_text())
    assert len(record["rows"]["clipself"]["56 masks"]["values"]) == 2 and 0 < record["auc"]["before"] < 1
    np.save(tmp_path / "classes.npy", np.zeros((3, 32)))
    done = subprocess.run(command, text=True, capture_output=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and "give one row for each" in done.stderr
