"""Training samples against those that the reference makes of the same six images."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from open_clip.transform import crop_region, pad_to, resize_longest
from training.data.datasets import RegionDataset
from training.data.grid import grid_choices, grid_regions, grid_template
from training.data.options import RegionOptions, SampleOptions
from training.data.proposals import draw_proposals, proposal_regions
from training.data.regions import Labelled
from training.data.resample import device_crops, device_image
from training.engine.data.annotations import load_annotations
from training.engine.data.images import read_image

# The reference pads CMYK with white and resizes palette images by nearest neighbour; only boxes compare for these.
OTHER_MODES = ("CMYK", "P")
# What the files do not hold, from the description of the draws.
CROP_SCALE, SMALLEST = 1.4, 12


def need(golden, name):
    if not (golden / "data" / name).exists():
        pytest.skip(f"{name} is not among the golden files kept in the repository")
    return golden / "data" / name


def check_pixels(actual: torch.Tensor, expected: np.ndarray) -> None:
    difference = (actual.to(torch.int16) - torch.from_numpy(expected).to(torch.int16)).abs().float()
    assert difference.max() <= 2 and difference.mean() <= 0.2


def sizes(golden) -> tuple[int, int]:
    """Sides of a recorded image and of a crop, pixels."""
    meta = json.loads(need(golden, "data.json").read_text())
    return meta["det"], meta["crop"]


def check_sample(golden, data, i: int, file: Path, boxes: np.ndarray, crops: np.ndarray) -> None:
    image, (size, crop_size) = read_image(str(file)), sizes(golden)
    expected = data[f"{i}.boxes"]
    slots = np.flatnonzero(expected[:, 4] > 0.5)
    assert len(slots) == len(boxes)
    np.testing.assert_allclose(boxes / max(image.shape[-2:]), expected[slots, :4], atol=1e-5)
    if Image.open(file).mode in OTHER_MODES:
        return
    if f"{i}.image" in data:
        check_pixels(pad_to(resize_longest(image, size), size), data[f"{i}.image"])
        check_pixels(device_image(image, size), data[f"{i}.image"])
    made = device_crops(image, torch.from_numpy(crops), crop_size)
    for slot, box, other in zip(slots, crops, made, strict=True):
        check_pixels(crop_region(image, box, crop_size), data[f"{i}.crops"][slot])
        check_pixels(other, data[f"{i}.crops"][slot])


@pytest.mark.parametrize(("name", "scale"), [("grid.npz", 1.0), ("grid_cs.npz", CROP_SCALE)])
def test_grid_samples(golden, name, scale):
    data = np.load(need(golden, name))
    annotations = load_annotations(str(need(golden, "instances.json")))
    for i in range(len(annotations)):
        file = golden / "data" / "images" / annotations.file_name(i)
        height, width = read_image(str(file)).shape[-2:]
        expected = data[f"{i}.boxes"]
        most = len(expected)
        rows, columns = data[f"{i}.choice"].tolist()
        # The order of the cells is the order drawn: found by matching the boxes.
        padded = max(width, height)
        cells = grid_template(rows, columns) * np.array([width, height, width, height]) / padded
        valid = expected[expected[:, 4] > 0.5, :4]
        order = np.abs(valid[:, None] - cells[None]).sum(-1).argmin(1)
        assert len(set(order.tolist())) == len(order) == min(rows * columns, most)
        boxes, crops = grid_regions(
            width, height, np.random.default_rng(0),
            max_boxes=most, crop_scale=scale, choice=(rows, columns), order=order,
        )  # fmt: skip
        check_sample(golden, data, i, file, boxes, crops)


@pytest.mark.recorded("data", r"proposals(?:_max\d+)?\.npz", argument="name")
def test_proposal_samples(golden, name):
    limit = re.search(r"_max(\d+)", name)
    limits = (SMALLEST, int(limit[1])) if limit else (8, 1024)
    data = np.load(need(golden, name))
    annotations = load_annotations(str(need(golden, "proposals.json")))
    for i in range(len(annotations)):
        file = golden / "data" / "images" / annotations.file_name(i)
        height, width = read_image(str(file)).shape[-2:]
        own = annotations.of(i)
        drawn = draw_proposals(
            annotations.boxes[own], np.random.default_rng(0),
            min_size=limits[0], max_size=limits[1], max_boxes=len(data[f"{i}.boxes"]), order=data[f"{i}.order"],
        )  # fmt: skip
        boxes, crops = proposal_regions(annotations.boxes[own], drawn, width, height)
        check_sample(golden, data, i, file, boxes, crops)


def test_region_text_samples(golden):
    data = np.load(need(golden, "region_clip.npz"))
    meta = json.loads(need(golden, "data.json").read_text())
    annotations = load_annotations(str(need(golden, "instances.json")))
    labels = {int(c): label for label, c in enumerate(annotations.category_ids)}
    assert labels == {int(k): v for k, v in meta["region_clip_cat_id2label"].items()}
    rows = np.flatnonzero(np.diff(annotations.offsets) > 0)
    assert annotations.image_ids[rows].tolist() == meta["region_clip_image_ids"]
    source = Labelled(annotations, RegionOptions())
    assert np.flatnonzero(source.usable()).tolist() == rows.tolist()
    size, crop_size = sizes(golden)
    options = SampleOptions(image_size=size, crop_size=crop_size)
    dataset = RegionDataset(annotations, str(golden / "data" / "images"), rows, source, options, fields=("labels",))
    recorded = sorted({int(k.split(".")[0]) for k in data.files})
    assert len(recorded) == len(dataset)
    for index, i in enumerate(recorded):
        expected = data[f"{i}.boxes"]
        expected = expected[expected[:, 5] > 0.5]
        sample = dataset[(0, index)]
        np.testing.assert_allclose(sample["boxes"].numpy(), expected[:, :4], atol=1e-5)
        assert sample["labels"].tolist() == expected[:, 4].astype(int).tolist()


def test_grid_choices_and_templates(golden):
    for most, expected in json.loads(need(golden, "grid_choices.json").read_text()).items():
        assert [list(c) for c in grid_choices(int(most))] == expected
    for file in (golden / "data").glob("grid_templates_*.npz"):
        templates = np.load(file)
        for name in templates.files:
            rows, columns = (int(v) for v in name.split("x"))
            np.testing.assert_allclose(grid_template(rows, columns), templates[name], atol=1e-6)


def test_decoded_pixels(golden):
    data = np.load(need(golden, "decoded.npz"))
    for name in data.files:
        image = read_image(str(golden / "data" / "images" / name))
        difference = (image.permute(1, 2, 0).to(torch.int16) - torch.from_numpy(data[name]).to(torch.int16)).abs()
        assert difference.max() <= 3 and difference.float().mean() < 0.1
