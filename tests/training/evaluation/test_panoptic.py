"""Panoptic samples against the recorded ones, and the cases that those do not cover."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import training.engine.data.workers as workers
from training.engine.data.masks import read_segment_ids, tight_box
from training.engine.errors import UserError
from training.evaluation.grid_masks import grid_masks
from training.evaluation.options import EvalOptions
from training.evaluation.panoptic import PanopticDataset, build_eval_data, collate_panoptic, load_panoptic


def dataset_of(folder, **kwargs) -> PanopticDataset:
    kwargs = {"image_sizes": [128], "patch_size": 16, "crop_size": 32, **kwargs}
    annotations = load_panoptic(str(folder / "panoptic.json"))
    return PanopticDataset(annotations, image_root=str(folder / "images"), segm_root=str(folder / "panoptic"), **kwargs)


def write_panoptic(folder, scenes, categories=(("sky", 0), ("cat", 1), ("dog", 1))):
    """Write a panoptic set: ``scenes`` is a list of (id map [H, W], segments [(id, category, bbox)])."""
    for name in ("images", "panoptic"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 10 * i + 3, "name": n, "isthing": t} for i, (n, t) in enumerate(categories)],
    }
    for index, (ids, segments) in enumerate(scenes):
        pixels = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "panoptic" / f"{index}.png")
        Image.fromarray(pixels[..., ::-1].copy()).save(folder / "images" / f"{index}.png")
        content["images"].append({"id": index + 1, "file_name": f"{index}.png"})
        infos = [{"id": s, "category_id": 10 * c + 3, "bbox": b, "area": 1} for s, c, b in segments]
        content["annotations"].append({"image_id": index + 1, "file_name": f"{index}.png", "segments_info": infos})
    (folder / "panoptic.json").write_text(json.dumps(content))


def eval_args(folder, **kwargs) -> EvalOptions:
    values = {
        "val_data": str(folder / "panoptic.json"),
        "val_image_root": str(folder / "images"),
        "val_segm_root": str(folder / "panoptic"),
    }
    return EvalOptions(**{**values, **kwargs})


@pytest.mark.parametrize("antialias", [False, True])
def test_samples_are_the_recorded_ones(golden, antialias):
    folder = golden / "data"
    expected, meta = np.load(folder / "panoptic.npz"), json.loads((folder / "data.json").read_text())
    size, content = meta["det"], json.loads((folder / "panoptic.json").read_text())
    dataset = dataset_of(
        folder, mask_antialias=antialias, image_sizes=[size], crop_size=meta["crop"],
        patch_size=size // expected["0.masks"].shape[-1],
    )  # fmt: skip
    assert len(dataset) == len(meta["panoptic_image_ids"])
    for index, annotation in enumerate(content["annotations"]):
        sample = collate_panoptic([dataset[index]])
        boxes = expected[f"{index}.boxes"]  # xyxy, label, valid, area, is thing; a skipped segment leaves its row empty
        rows = np.flatnonzero(boxes[:, 5])
        # The smallest segments, below 8 x 8 pixels, are left out.
        assert len(rows) == sum(segment["area"] >= 64 for segment in annotation["segments_info"])
        torch.testing.assert_close(sample["boxes"][size], torch.from_numpy(boxes[rows, :4]), atol=1e-6, rtol=0)
        assert sample["labels"].tolist() == boxes[rows, 4].tolist()
        assert sample["areas"].tolist() == boxes[rows, 6].tolist()
        assert sample["is_thing"].tolist() == boxes[rows, 7].astype(bool).tolist()
        masks = expected[f"{index}.{'masks' if antialias else 'masks_no_antialias'}"][rows]
        empty = ~masks.any((1, 2))
        assert (sample["masks"][size].numpy()[~empty] == masks[~empty]).all()
        assert (sample["masks"][size].numpy()[empty].sum((1, 2)) == 1).all()
        # The reference pads CMYK with white, and resizes palette images by nearest neighbour.
        if Image.open(folder / "images" / content["images"][index]["file_name"]).mode not in ("CMYK", "P"):
            for name, ours, theirs in (
                ("image", sample["images"][size][0], expected[f"{index}.image"]),
                ("crops", sample["crops"], expected[f"{index}.crops"][rows]),
            ):
                difference = np.abs(ours.numpy().astype(int) - theirs.astype(int))
                assert difference.max() <= 2 and difference.mean() <= 0.2, (index, name)


@pytest.mark.parametrize(("height", "width", "grid"), [(480, 640, 64), (427, 640, 37), (240, 160, 20), (97, 300, 56)])
def test_masks_are_torchs_bicubic_resize(height, width, grid):
    """The four-tap shortcut against torch resizing whole masks, at sizes where sums cancel (640 / 64) and others."""
    generator = np.random.default_rng(height)
    coarse = generator.integers(1, 12, (height // 7 + 1, width // 7 + 1), dtype=np.int32)
    ids = coarse.repeat(7, 0).repeat(7, 1)[:height, :width] * 65793  # all three colour channels used
    segments = np.unique(ids)
    full = torch.from_numpy(ids == segments[:, None, None]).float()
    sides = [round(side * grid / max(height, width)) for side in (height, width)]
    expected = F.interpolate(full[None], sides, mode="bicubic", align_corners=False)[0] > 0
    masks = grid_masks(ids, segments, grid)
    assert torch.equal(masks[:, : sides[0], : sides[1]], expected)
    assert masks[:, sides[0] :].sum() == 0 and masks[:, :, sides[1] :].sum() == 0


def test_a_vanished_mask_is_the_cell_of_its_centre():
    ids = np.zeros((160, 80), dtype=np.int32)
    ids[101:104, 51:53] = 7  # inside cell (6, 3) of 16 pixels, away from the taps at its middle
    masks = grid_masks(ids, np.array([7], dtype=np.int32), 10)
    assert masks.nonzero().tolist() == [[0, 6, 3]]


def test_boxes_crops_sizes_and_limits(tmp_path):
    """Every rule in one small image, by hand."""
    ids = np.full((40, 80), 70000, dtype=np.int32)  # sky: the id needs all three channels
    ids[5:25, 10:40] = 300
    ids[0:6, 70:80] = 5
    ids[39, 0] = 6
    segments = [
        (300, 1, [10, 5, 30, 20]),
        (70000, 0, [0, 0, 3, 3]),  # stuff: the annotated box is not used
        (5, 2, [70, 0, 10, 6]),  # area 60 < 8^2
        (999, 2, [0, 0, 30, 30]),  # no such pixel
        (6, 1, [0, 39, 0, 0]),  # empty box
        (5, 1, [70, 0, 10, 20]),
    ]
    write_panoptic(tmp_path, [(ids, segments)])
    sample = dataset_of(tmp_path, image_sizes=[160, 64], patch_size=8, crop_size=16)[0]
    images = collate_panoptic([sample])["images"]
    assert sample["labels"].tolist() == [1, 0, 1] and sample["is_thing"].tolist() == [True, False, True]
    assert sample["areas"].tolist() == [600, 79 * 39, 200]
    assert sample["absent_segments"] == 1
    expected = torch.tensor([[10, 5, 40, 25], [0, 0, 79, 39], [70, 0, 80, 20]]) / 80
    for size in (160, 64):
        torch.testing.assert_close(sample["boxes"][size], expected)
        assert images[size].shape == (1, 3, size, size) and images[size].dtype == torch.uint8
        assert images[size][:, :, size // 2 :].sum() == 0  # padded below
        assert images[size][:, :, size // 2 - 1].any()
        assert sample["masks"][size].shape == (3, size // 8, size // 8)
    # Crop of the last: 70..80 by 0..20 enlarged to 67.5..82.5 by -5..25, clipped to 12 (or 13) by 25 pixels.
    columns = (sample["crops"][2].sum((0, 1)) > 0).sum()
    assert 7 <= columns <= 9 and (sample["crops"][2].sum((0, 2)) > 0).all()

    ids = np.zeros((8, 8), dtype=np.int32)
    ids[2, 3:6] = 1
    assert tight_box(ids == 1) == (3, 2, 5, 2)  # last index, not plus one
    assert tight_box(ids == 2) is None


def test_at_most_100_segments(tmp_path):
    ids = np.arange(1, 12 * 12 + 1, dtype=np.int32).reshape(12, 12).repeat(10, 0).repeat(10, 1)
    write_panoptic(tmp_path, [(ids, [(i, 1, [0, 0, 4 if i < 5 else 20, 10]) for i in range(1, 145)])])
    assert len(dataset_of(tmp_path)[0]["labels"]) == 96  # the 4 small ones are among the first 100


def test_every_image_once_over_processes_and_batches(golden):
    folder = golden / "data"
    whole = build_eval_data(eval_args(folder), image_sizes=[128, 64], patch_size=16, crop_size=32)
    content = json.loads((folder / "panoptic.json").read_text())
    ids = [annotation["image_id"] for annotation in content["annotations"]]
    assert whole.num_images == len(ids)
    assert whole.is_thing == [bool(category["isthing"]) for category in content["categories"]]
    seen, world = [], len(ids) + 2
    for rank in range(world):  # more processes than images: two have none
        data = build_eval_data(
            eval_args(folder), image_sizes=[64], patch_size=16, crop_size=32, rank=rank, world_size=world
        )
        seen += [i for batch in data.loader for i in batch["image_ids"].tolist()]
    assert seen == ids
    batches = list(whole.loader)
    counts = [sum(s["area"] >= 64 for s in a["segments_info"]) for a in content["annotations"]]
    assert [batch["counts"].tolist() for batch in batches] == [counts[i : i + 2] for i in range(0, len(counts), 2)]
    first, sample, before = batches[0], whole.loader.dataset[1], counts[0]
    for key in ("crops", "labels", "is_thing", "areas"):
        assert torch.equal(first[key][before:], sample[key])
    for key in ("boxes", "masks"):
        assert torch.equal(first[key][64][before:], sample[key][64])
    assert first["images"][64].shape == (2, 3, 64, 64)


def test_unusable_images_are_named(golden, tmp_path):
    content = json.loads((golden / "data" / "panoptic.json").read_text())
    annotation, number = content["annotations"][0], 5
    source = next(image for image in content["images"] if image["id"] == annotation["image_id"])
    images, maps = ([tmp_path / kind / f"{i}.{end}" for i in range(number)]
                    for kind, end in (("images", "jpg"), ("panoptic", "png")))  # fmt: skip
    for files, original in ((images, source["file_name"]), (maps, annotation["file_name"])):
        files[0].parent.mkdir()
        for file in files:
            shutil.copy(golden / "data" / file.parent.name / original, file)
    content["images"] = [{**source, "id": i, "file_name": f.name} for i, f in enumerate(images)]
    content["annotations"] = [{**annotation, "image_id": i, "file_name": f.name} for i, f in enumerate(maps)]
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    width, height = Image.open(images[4]).size
    images[0].unlink()
    images[1].write_bytes(b"\xff\xd8 no photograph")
    maps[2].unlink()
    Image.new("L", Image.open(maps[3]).size).save(maps[3])
    Image.new("RGB", (7, 5)).save(maps[4])
    data = build_eval_data(eval_args(tmp_path), image_sizes=[64], patch_size=16, crop_size=32)
    batches = list(data.loader)
    assert all(batch["counts"].tolist() == [] and "images" not in batch for batch in batches)
    skipped = [entry for batch in batches for entry in batch["skipped"]]
    names = [images[0].name, images[1].name, maps[2].name, maps[3].name, ""]
    for (file, reason), name in zip(skipped, names, strict=True):
        assert file.endswith(name) and reason
    assert f"{width} x {height}" in skipped[-1][1] and "7 x 5" in skipped[-1][1]


def test_wrong_files_get_one_line(golden, tmp_path):
    def message(**kwargs) -> str:
        with pytest.raises(UserError) as error:
            build_eval_data(eval_args(golden / "data", **kwargs), image_sizes=[64], patch_size=16, crop_size=32)
        assert "\n" not in str(error.value)
        return str(error.value)

    def json_file(content) -> str:
        (tmp_path / "x.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return str(tmp_path / "x.json")

    good = json.loads((golden / "data" / "panoptic.json").read_text())
    assert "no such file" in message(val_data=str(tmp_path / "none.json"))
    assert "not a json file" in message(val_data=json_file("{"))
    assert "no categories" in message(val_data=json_file({**good, "categories": []}))
    assert "instance file" in message(val_data=json_file({**good, "annotations": [{"id": 1, "bbox": [0, 0, 1, 1]}]}))
    assert "no annotations" in message(val_data=json_file({**good, "annotations": []}))
    empty = [{**annotation, "segments_info": []} for annotation in good["annotations"]]
    assert "not a single segment" in message(val_data=json_file({**good, "annotations": empty}))
    image = good["images"][0]["id"]
    assert "unknown" not in message(
        val_data=json_file({**good, "annotations": [{"segments_info": 3, "image_id": image}]})
    )
    known = {category["id"] for category in good["categories"][:2]}
    unknown = next(s["category_id"] for a in good["annotations"] for s in a["segments_info"]
                   if s["category_id"] not in known)  # fmt: skip
    assert f"unknown category {unknown}" in message(val_data=json_file({**good, "categories": good["categories"][:2]}))
    assert "'file_name'" in message(
        val_data=json_file({**good, "annotations": [{"image_id": image, "segments_info": []}]})
    )
    assert "--val-image-root" in message(val_image_root=str(tmp_path))
    assert "--val-segm-root" in message(val_segm_root=str(tmp_path))
    with pytest.raises(UserError, match="patch size 16"):
        build_eval_data(eval_args(golden / "data"), image_sizes=[100], patch_size=16, crop_size=32)


def test_too_little_shared_memory_is_said_before_the_workers_die_of_it(golden, monkeypatch, tmp_path):
    """And what is said of an image is what it holds; here every segment is within the area limits, or nearly."""
    asked, args = [], eval_args(golden / "data")
    sizes = {"image_sizes": [128, 64], "patch_size": 16, "crop_size": 32}
    with monkeypatch.context() as patch:
        patch.setattr("training.evaluation.panoptic.check_shared_memory", lambda size, **more: asked.append(size))
        batches = list(build_eval_data(args, **sizes, batch_size=1).loader)
    held = [sum(p.numel() for p in [*b["images"].values(), *b["masks"].values(), b["crops"]]) for b in batches]
    mean = sum(held) / len(held)
    assert mean <= asked[0] < mean * 1.2

    monkeypatch.setattr(workers, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20))
    build_eval_data(args, **sizes, workers=4)
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: SimpleNamespace(free=mean * len(batches) / 2))
    build_eval_data(args, **sizes, workers=0)
    with pytest.raises(UserError, match="MB free: lower --workers, --batch-size or .*--shm-size") as error:
        build_eval_data(args, **sizes, workers=4, batch_size=1)
    assert "\n" not in str(error.value)


def test_segment_ids_use_all_channels(tmp_path):
    ids = np.random.default_rng(0).integers(0, 1 << 24, (9, 11), dtype=np.int32)
    pixels = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    Image.fromarray(np.dstack([pixels, np.full((9, 11), 3, np.uint8)])).save(tmp_path / "rgba.png")
    for name in ("rgb.png", "rgba.png"):
        assert (read_segment_ids(str(tmp_path / name)) == ids).all()


@pytest.mark.parametrize(("isthing", "good"), [(1, False), (0, True)])
def test_a_thing_whose_box_reaches_far_beyond_its_image_is_refused(tmp_path, isthing, good):
    """The model would refuse it amid an evaluation; the box of stuff is not read."""
    image = {"id": 7, "file_name": "a.jpg", "width": 64, "height": 48}
    segment = {"id": 1, "category_id": 3, "bbox": [1, 1, 500, 9]}
    content = {
        "images": [image], "categories": [{"id": 3, "name": "cat", "isthing": isthing}],
        "annotations": [{"image_id": 7, "file_name": "a.png", "segments_info": [segment]}],
    }  # fmt: skip
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    if good:
        assert load_panoptic(str(tmp_path / "panoptic.json")).boxes.tolist() == [[1, 1, 500, 9]]
    else:
        with pytest.raises(UserError, match="image 7 has a box .* far beyond it"):
            load_panoptic(str(tmp_path / "panoptic.json"))
