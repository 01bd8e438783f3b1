"""Annotations, images, views, datasets, order of the data, and class names and embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from ovdet.data.annotations import Annotations, check_image_root, load_annotations
from ovdet.data.dataset import Skipped, TestDataset, TrainDataset
from ovdet.data.images import ImageError, read_image, resolve
from ovdet.data.loader import TestSampler, TrainSampler, collate_train, train_loader
from ovdet.data.masks import decode_segmentation, encode_mask
from ovdet.data.transforms import View, apply_view, apply_view_to_masks, boxes_of_masks, draw_view
from ovdet.errors import UserError
from ovdet.fvit.config import FViTConfig
from ovdet.vocabulary import make_vocabulary, read_embeddings, training_labels

# -- annotations ------------------------------------------------------------------------------------------------------


def write(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def small_file(folder: Path, **changes: object) -> str:
    """Two images (LVIS style: no file_name), three classes out of order, a crowd, and an image without objects."""
    content = {
        "images": [
            {"id": 5, "coco_url": "http://images.org/train2017/000000000005.jpg", "height": 30, "width": 40},
            {"id": 2, "coco_url": "http://images.org/val2017/000000000002.jpg", "height": 20, "width": 20},
        ],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 9, "bbox": [1, 2, 10, 12], "iscrowd": 0,
             "segmentation": [[1, 2, 11, 2, 11, 14, 1, 14]]},
            {"id": 2, "image_id": 5, "category_id": 4, "bbox": [5, 5, 20, 20], "iscrowd": 1,
             "segmentation": {"size": [30, 40], "counts": [0, 600, 600]}},
            {"id": 3, "image_id": 5, "category_id": 4, "bbox": [20, 10, 15, 15]},
        ],
        "categories": [{"id": 9, "name": "cat"}, {"id": 4, "name": "dog"}, {"id": 6, "name": "bird"}],
    }  # fmt: skip
    return write(folder / "a.json", {**content, **changes})


def test_lvis_style_file(tmp_path: Path):
    a = load_annotations(small_file(tmp_path), key="data.train_annotations", masks=True)
    assert a.file_names == ["train2017/000000000005.jpg", "val2017/000000000002.jpg"]
    assert a.names == ["dog", "bird", "cat"] and a.category_ids.tolist() == [4, 6, 9]
    assert a.labels.tolist() == [2, 0, 0] and a.crowd.tolist() == [False, True, False]
    assert a.boxes[0].tolist() == [1, 2, 11, 14] and (a.of(0), a.of(1)) == (slice(0, 3), slice(3, 3))
    assert a.segmentation(0) == [[1, 2, 11, 2, 11, 14, 1, 14]] and a.segmentation(2) is None


def test_bad_entries_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    good = {"image_id": 5, "category_id": 4, "bbox": [0, 0, 3, 3]}
    bad = [None, {**good, "image_id": 77}, {**good, "category_id": 1}, {**good, "bbox": [0, 0, 0, 5]},
           {**good, "bbox": [0, 0, 1e9, 1]}, {**good, "bbox": "x"}, {**good, "id": 8}, {**good, "id": 8},
           {**good, "image_id": [5]}]  # fmt: skip
    a = load_annotations(small_file(tmp_path, annotations=[good, *bad]), key="data.train_annotations")
    assert len(a.boxes) == 2 and sum(a.skipped.values()) == 8
    assert "box of zero or negative size" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "not a json"),
        ("[" * 5000, "not a json"),
        ([], 'no list "images"'),
        ({"images": [], "annotations": [], "categories": []}, "lists no image"),
        ({"images": [{}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}, "none of its 1 images"),
        ({"images": [{"id": 1}], "annotations": {}, "categories": []}, 'no list "annotations"'),
        ({"images": [{"id": 1}], "annotations": [], "categories": [{}]}, "none of its 1 categories"),
        ({"images": [{"id": 1}], "annotations": [], "categories": [{"id": i, "name": "a"} for i in (1, 2)]}, "several"),
    ],
)
def test_malformed_files(tmp_path: Path, content: object, message: str):
    path = str(tmp_path / "a.json") if content is None else write(tmp_path / "a.json", content)
    with pytest.raises(UserError, match=message) as error:
        load_annotations(path, key="data.train_annotations")
    assert "data.train_annotations" in str(error.value) and path in str(error.value) and "\n" not in str(error.value)


def test_image_root(tmp_path: Path):
    a = load_annotations(small_file(tmp_path), key="k")
    with pytest.raises(UserError, match="no such folder"):
        check_image_root(a, str(tmp_path / "nowhere"), key="data.train_images")
    with pytest.raises(UserError, match="none of the first 2 images"):
        check_image_root(a, str(tmp_path), key="data.train_images")
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "val2017" / "000000000002.jpg")
    check_image_root(a, str(tmp_path), key="data.train_images")


# -- images and masks -------------------------------------------------------------------------------------------------


def test_images_of_any_mode(tmp_path: Path):
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    for mode, name in [("RGB", "a.png"), ("L", "b.png"), ("P", "c.png"), ("RGBA", "d.png"), ("CMYK", "e.tif"),
                       ("RGB", "f.jpg"), ("CMYK", "g.jpg")]:  # fmt: skip
        rgb.convert(mode).save(tmp_path / name)
        image = read_image(str(tmp_path / name))
        assert image.shape == (3, 12, 16) and image.dtype == torch.uint8
        expected = np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int)
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected).max() <= (3 if name == "f.jpg" else 0)


def test_unreadable_images_and_escapes(tmp_path: Path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("hello")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:400])
    for name in ("missing.jpg", "empty.jpg", "text.jpg", "half.jpg"):
        with pytest.raises(ImageError, match=name):
            read_image(str(tmp_path / name))
    for name in ("../a.jpg", "a/../../b.jpg", "/etc/passwd", "C:\\a.jpg", "http://x/y.jpg", "..\\a.jpg", ""):
        with pytest.raises(ImageError):
            resolve("/root", name)
    assert resolve("/root", "a/../b.jpg") == "/root/b.jpg"


def test_segmentations_in_every_form():
    mask = np.zeros((30, 40), bool)
    mask[5:20, 7:31] = True
    rle = encode_mask(mask)
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], mask.T.ravel().astype(int), [2]])))).tolist()
    polygon = [[7, 5, 31, 5, 31, 20, 7, 20]]
    for form in (rle, {"size": [30, 40], "counts": runs}, polygon):
        assert np.array_equal(decode_segmentation(form, 30, 40), mask)
    for bad in (
        None, [], [[1, 2, 3, 4]], [["a"] * 6], {"size": [40, 30], "counts": runs}, {"size": [30, 40], "counts": [3]},
        {"size": [30, 40], "counts": rle["counts"][:-2]}, {"size": [30, 40]}, {"size": [30, 40], "counts": "~~~"},
        {"size": [30, 40], "counts": [-5, 1205]}, [[0, 0, float("nan"), 1, 2, 2]], "text",
    ):  # fmt: skip
        assert decode_segmentation(bad, 30, 40) is None
    rng = np.random.default_rng(1)
    for _ in range(50):  # long runs, negative differences
        random = rng.random((70, 90)) < rng.random() ** 3
        assert np.array_equal(decode_segmentation(encode_mask(random), 70, 90), random)
        assert int(coco_mask.area(encode_mask(random))) == random.sum()


# -- views ------------------------------------------------------------------------------------------------------------


def test_view_of_boxes_and_masks():
    """An object painted in one colour stays where its box and its mask say, and masks equal torchvision's."""
    rng = np.random.default_rng(3)
    seen = {"shrunk": 0, "cut": 0, "flip": 0}
    for _ in range(40):
        h, w = (int(v) for v in rng.integers(40, 160, 2))
        x, y = int(rng.integers(0, w - 25)), int(rng.integers(0, h - 25))
        masks = torch.zeros(1, h, w, dtype=torch.bool)
        masks[0, y : y + 20, x : x + 20] = True
        image = masks.expand(3, -1, -1).to(torch.uint8) * 255
        view = draw_view(rng, h, w, size=128, jitter=(0.5, 2.0), flip=0.5)
        pixels, boxes = apply_view(image, torch.tensor([[x, y, x + 20.0, y + 20.0]]), view, 128)
        assert pixels.shape == (3, 128, 128) and view.size[0] <= 128 and view.size[1] <= 128
        assert not pixels[:, view.size[0] :].any() and not pixels[:, :, view.size[1] :].any()
        moved = apply_view_to_masks(masks, view, 128)

        other = tv_tensors.Mask(masks.to(torch.uint8))
        other = TF.resize(other, list(view.scaled), interpolation=InterpolationMode.NEAREST_EXACT)
        other = TF.crop(other, view.top, view.left, *view.size)
        other = TF.horizontal_flip(other) if view.flip else other
        # torchvision computes the source pixel in float32, which may fall on the other side of an edge.
        assert (moved[:, : view.size[0], : view.size[1]] != other.bool()).float().mean() < 0.01

        if moved.any():
            assert (boxes_of_masks(moved) - boxes).abs().max() <= 1.01
            bright = (pixels[0] > 127).nonzero()
            low, high = bright.min(0).values, bright.max(0).values + 1
            assert (torch.stack([low[1], low[0], high[1], high[0]]) - boxes[0]).abs().max() <= 1.6
        seen["shrunk"] += max(view.scaled) < 128
        seen["cut"] += max(view.scaled) > 128
        seen["flip"] += view.flip
    assert min(seen.values()) > 5


def test_jitter_range():
    rng = np.random.default_rng(0)
    views = [draw_view(rng, 480, 640, size=640, jitter=(0.1, 2.0), flip=0.5) for _ in range(2000)]
    scale = np.array([v.scaled[1] / 640 for v in views])
    assert 0.1 <= scale.min() < 0.11 and 1.99 < scale.max() <= 2.0 and scale.mean() == pytest.approx(1.05, abs=0.03)
    assert np.mean([v.flip for v in views]) == pytest.approx(0.5, abs=0.04)
    places = [v.left / (v.scaled[1] - 640) for v in views if v.scaled[1] > 1000]
    assert min(places) < 0.05 and max(places) > 0.95
    assert draw_view(rng, 1, 5000, size=64, jitter=(0.1, 0.1), flip=0).scaled == (1, 6)


def test_boxes_of_masks():
    masks = torch.zeros(3, 9, 7, dtype=torch.bool)
    masks[0, 2:5, 3:7] = True
    masks[2, 8, 0] = True
    assert boxes_of_masks(masks).tolist() == [[3, 2, 7, 5], [0, 0, 0, 0], [0, 8, 1, 9]]
    assert boxes_of_masks(masks[:0]).shape == (0, 4)


# -- datasets ---------------------------------------------------------------------------------------------------------


def dataset(folder: Path, **kwargs) -> tuple[TrainDataset, Annotations]:
    for sub in ("train2017", "val2017"):
        (folder / sub).mkdir(exist_ok=True)
    Image.new("RGB", (40, 30), "blue").save(folder / "train2017" / "000000000005.jpg")
    a = load_annotations(small_file(folder), key="k", masks=kwargs.get("masks", False))
    kwargs = {"labels": a.labels, "root": str(folder), "image_size": 64, **kwargs}
    return TrainDataset(a, **kwargs), a


def test_train_samples(tmp_path: Path):
    data, _ = dataset(tmp_path, jitter=(1.0, 1.0), flip=0.0)
    assert len(data) == 1  # the image without objects is left out
    sample = data[(0, 0)]
    assert sample["labels"].tolist() == [2, 0]  # not the crowd
    assert torch.allclose(sample["boxes"], torch.tensor([[1, 2, 11, 14], [20, 10, 35, 25]]) * 1.6, atol=1e-4)
    assert sample["size"] == (48, 64) and sample["image"].dtype == torch.uint8
    jittered, _ = dataset(tmp_path)
    first, again, later = jittered[(3, 0)], jittered[(3, 0)], jittered[(4, 0)]
    assert torch.equal(first["image"], again["image"]) and torch.equal(first["boxes"], again["boxes"])
    assert first["boxes"].shape != later["boxes"].shape or not torch.equal(first["boxes"], later["boxes"])
    with_empty, _ = dataset(tmp_path, keep_empty=True)
    missing = with_empty[(0, 1)]
    assert len(with_empty) == 2 and isinstance(missing, Skipped) and "no such file" in missing.reason
    batch = collate_train([first, missing])
    assert batch["images"].shape == (1, 3, 64, 64) and batch["skipped"] == [(missing.file, missing.reason)]
    assert collate_train([missing])["images"] is None
    # The one with a mask; the one without has nothing to learn from.
    masked, _ = dataset(tmp_path, masks=True, jitter=(1.0, 1.0), flip=0.0)
    sample = masked[(0, 0)]
    assert sample["labels"].tolist() == [2] and sample["masks"].shape == (1, 64, 64)
    assert torch.allclose(boxes_of_masks(sample["masks"]), sample["boxes"])
    assert (sample["boxes"] - torch.tensor([1, 2, 11, 14]) * 1.6).abs().max() <= 1


def test_small_boxes_go(tmp_path: Path):
    data, _ = dataset(tmp_path, jitter=(0.03, 0.03), min_box_side=1.0)
    assert data[(0, 0)]["boxes"].shape == (0, 4) and data[(0, 0)]["labels"].shape == (0,)
    a = TestDataset(["train2017/000000000005.jpg", "x.jpg"], root=str(tmp_path), image_size=64)
    assert a[0]["size"] == (48, 64) and a[0]["original"] == (30, 40) and isinstance(a[1], Skipped)


def test_order_over_processes_and_resuming():
    def keys(rank: int, world: int, batch: int, start: int = 0, epoch: int = 2) -> list[list[tuple[int, int]]]:
        sampler = TrainSampler(size=23, batch_size=batch, rank=rank, world_size=world, seed=1)
        sampler.set_position(epoch, start)
        assert len(sampler) == 23 // (batch * world) - start
        return list(sampler)

    one = keys(0, 1, 6)
    two = [a + b for a, b in zip(keys(0, 2, 3), keys(1, 2, 3), strict=True)]
    assert one == two and one[2:] == keys(0, 1, 6, start=2) and one != keys(0, 1, 6, epoch=3)
    flat = [key for batch in one for key in batch]
    assert len(set(flat)) == 18 and all(epoch == 2 for epoch, _ in flat)
    repeated = TrainSampler(size=3, batch_size=4, rank=0, world_size=2, seed=0)
    assert [len(b) for b in repeated] == [4]

    for world in (1, 2, 3):
        batches = [list(TestSampler(size=11, batch_size=2, rank=r, world_size=world)) for r in range(world)]
        flat = [i for part in batches for batch in part for i in batch]
        assert sorted(flat) == list(range(11))  # nothing twice, nothing missing
        assert all(batch[0] % 2 == 0 for part in batches for batch in part)  # the same batches for any world


def test_workers_change_nothing(tmp_path: Path):
    data, _ = dataset(tmp_path)
    boxes = []
    for workers in (0, 2):
        sampler = TrainSampler(size=1, batch_size=2, rank=0, world_size=1, seed=0)
        loader = train_loader(data, sampler, workers=workers, pin=False)
        for epoch in (0, 1):
            sampler.set_position(epoch, 0)
            boxes.append(torch.cat([t["boxes"] for batch in loader for t in batch["targets"]]))
    assert torch.equal(boxes[0], boxes[2]) and torch.equal(boxes[1], boxes[3])


def test_plain_view():
    view = View((10, 20), 2, 3, (5, 8), True)
    masks = torch.arange(200).reshape(1, 10, 20) % 3 == 0
    assert torch.equal(apply_view_to_masks(masks, view, 8)[0, :5, :8], masks[0, 2:7, 3:11].flip(1))


# -- classes ----------------------------------------------------------------------------------------------------------


def test_vocabulary_and_training_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = FViTConfig()
    config.data.novel = ["cat"]
    a = load_annotations(small_file(tmp_path), key="k")
    vocabulary = make_vocabulary(config, a)
    assert vocabulary.names == ("dog", "bird", "cat") and vocabulary.category_ids == (4, 6, 9)
    assert vocabulary.base_mask.tolist() == [True, True, False]
    assert training_labels(a, vocabulary).tolist() == [-1, 0, 0]  # the cat is never shown
    assert "1 objects of 1 classes that are novel" in caplog.text
    config.data.novel = ["unicorn"]
    with pytest.raises(UserError, match="unicorn"):
        make_vocabulary(config, a)
    config.data.novel, config.data.novel_frequency = [], ["r"]
    with pytest.raises(UserError, match="novel_frequency"):
        make_vocabulary(config, a)
    classes = [{"id": i, "name": n, "frequency": f} for i, n, f in ((4, "dog", "r"), (6, "bird", "c"), (9, "cat", "f"))]
    rare = make_vocabulary(config, load_annotations(small_file(tmp_path, categories=classes), key="k"))
    assert rare.novel == (True, False, False)
    everything = small_file(tmp_path, categories=[{**c, "frequency": "r"} for c in classes])
    with pytest.raises(UserError, match="no object is of a base class"):
        training_labels(a, make_vocabulary(config, load_annotations(everything, key="k")))


def test_embedding_files(tmp_path: Path):
    names, rows = ["dog", "potted_plant", "cat"], torch.randn(4, 8)
    table = dict(zip(["cat", "Potted plant", "dog", "background"], rows, strict=True))
    torch.save(table, tmp_path / "a.pt")
    np.save(tmp_path / "a.npy", rows[[2, 1, 0, 3]].numpy().astype(np.float16))
    expected = torch.nn.functional.normalize(rows[[2, 1, 0, 3]], dim=1)
    assert torch.allclose(read_embeddings(str(tmp_path / "a.pt"), names, 8), expected)
    assert torch.allclose(read_embeddings(str(tmp_path / "a.npy"), names, 8), expected, atol=2e-3)
    del table["background"]
    torch.save(table, tmp_path / "b.pt")
    np.save(tmp_path / "c.npy", np.zeros((4, 8), np.float32))
    (tmp_path / "d.npy").write_text("no array")
    for file, message in [("b.pt", "no embedding of background"), ("c.npy", "zero"), ("d.npy", "not readable"),
                          ("e.npy", "no such file")]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            read_embeddings(str(tmp_path / file), names, 8)
    with pytest.raises(UserError, match=r"shape \(4, 8\)"):
        read_embeddings(str(tmp_path / "a.npy"), names[:2], 8)
    with pytest.raises(UserError, match="zebra"):
        read_embeddings(str(tmp_path / "a.pt"), ["zebra"], 8)
