"""Annotations, images, views, datasets, order of the data, and class names and embeddings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from ovdet.data.annotations import check_image_root, load_annotations
from ovdet.data.dataset import Skipped, TestDataset, TrainDataset, ViewOptions
from ovdet.data.images import read_image
from ovdet.data.loader import OrientedSampler, TestSampler, collate_train, train_loader
from ovdet.data.masks import MaskWindows, decode_segmentation, encode_mask, unpack, view_of_mask
from ovdet.data.transforms import View, apply_view, apply_view_to_boxes, draw_view, scaled_size
from ovdet.fvit.config import FViTConfig
from ovdet.vocabulary import make_vocabulary, read_embeddings, training_labels
from training.engine.data.records import Annotations
from training.engine.data.sampler import EpochBatchSampler
from training.engine.errors import UserError

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
    assert list(a.file_names) == ["train2017/000000000005.jpg", "val2017/000000000002.jpg"]
    assert a.names == ["dog", "bird", "cat"] and a.category_ids.tolist() == [4, 6, 9]
    assert a.labels.tolist() == [2, 0, 0] and a.crowd.tolist() == [False, True, False]
    assert a.boxes[0].tolist() == [1, 2, 11, 14] and (a.of(0), a.of(1)) == (slice(0, 3), slice(3, 3))
    assert a.segmentation(0) == [[1, 2, 11, 2, 11, 14, 1, 14]] and a.segmentation(2) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; F-ViT/tools/prepare_open_vocabulary.py"),
        ("{", "not a json"),
        ("[" * 5000, "not a json"),
        ([], 'no list "images"'),
        ({"images": [], "annotations": [], "categories": []}, "lists no image"),
        ({"images": [{}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}, "none of its 1 images"),
        ({"images": [{"id": 1, "file_name": "a"}], "annotations": {}, "categories": []}, "lists no category"),
        ({"images": [{"id": 1, "file_name": "a"}], "annotations": [],
          "categories": [{"id": i, "name": "a"} for i in (1, 2)]}, "several|same name"),
    ],
)  # fmt: skip
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


def test_orientation_of_photographs(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    for value in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = value
        Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
        upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "x.png")))
        found = read_image(str(tmp_path / "x.png")).permute(1, 2, 0).numpy()
        assert found.shape == upright.shape and (found == upright).all()
        assert (read_image(str(tmp_path / "x.png"), exif=False).permute(1, 2, 0).numpy() == pixels).all()


def test_a_flipped_byte_never_ends_the_process(tmp_path: Path):
    """200 PNGs with one byte changed, read in a process of its own: each is an image or an error."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    whole = (tmp_path / "x.png").read_bytes()
    # The header and the chunks' heads, where damage is worst, and places all over the file.
    places = [*range(8, 60), *range(len(whole) - 20, len(whole))]
    places += rng.integers(8, len(whole), 200 - len(places)).tolist()
    for number, place in enumerate(places):
        damaged = bytearray(whole)
        damaged[place] ^= int(rng.integers(1, 256))
        (tmp_path / f"{number}.png").write_bytes(damaged)
    code = """
import sys
from ovdet.data.dataset import Skipped, TestDataset
data = TestDataset([f"{i}.png" for i in range(200)], root=sys.argv[1], image_size=32)
kinds = [isinstance(data[i], Skipped) for i in range(200)]
print(len(kinds), sum(kinds))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen, skipped = map(int, done.stdout.split())
    assert len(places) == seen == 200 and skipped > 50


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


@pytest.mark.parametrize("resize", ["bilinear", "bicubic"])
def test_view_of_boxes_and_masks(resize: str):
    """An object painted in one colour stays where its box and its mask say, and masks equal torchvision's."""
    rng = np.random.default_rng(3)
    seen = {"shrunk": 0, "cut": 0, "flip": 0}
    for _ in range(40):
        h, w = (int(v) for v in rng.integers(40, 160, 2))
        x, y = int(rng.integers(0, w - 25)), int(rng.integers(0, h - 25))
        mask = np.zeros((h, w), bool)
        mask[y : y + 20, x : x + 20] = True
        image = torch.from_numpy(mask).expand(3, -1, -1).to(torch.uint8) * 255
        view = draw_view(rng, h, w, size=128, jitter=(0.5, 2.0), flip=0.5)
        pixels = apply_view(image, view, 128, resize)
        boxes = apply_view_to_boxes(torch.tensor([[x, y, x + 20.0, y + 20.0]]), view, (h, w))
        assert pixels.shape == (3, 128, 128) and view.size[0] <= 128 and view.size[1] <= 128
        assert not pixels[:, view.size[0] :].any() and not pixels[:, :, view.size[1] :].any()
        seen_mask, corner = view_of_mask(encode_mask(mask), view, centre=True)
        moved = unpack(MaskWindows.of([seen_mask], [corner]), 128)

        other = tv_tensors.Mask(torch.from_numpy(mask)[None].to(torch.uint8))
        other = TF.resize(other, list(view.scaled), interpolation=InterpolationMode.NEAREST_EXACT)
        other = TF.crop(other, view.top, view.left, *view.size)
        other = TF.horizontal_flip(other) if view.flip else other
        # torchvision computes the source pixel in float32, which may fall on the other side of an edge.
        assert (moved[:, : view.size[0], : view.size[1]] != other.bool()).float().mean() < 0.01

        if moved.any():
            tight = torch.tensor([[*corner, corner[0] + seen_mask.shape[1], corner[1] + seen_mask.shape[0]]])
            assert (tight - boxes).abs().max() <= 1.01
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
    assert 0.09 <= scale.min() < 0.11 and 1.99 < scale.max() <= 2.0 and scale.mean() == pytest.approx(1.05, abs=0.03)
    assert np.mean([v.flip for v in views]) == pytest.approx(0.5, abs=0.04)
    places = [v.left / (v.scaled[1] - 640) for v in views if v.scaled[1] > 1000]
    assert min(places) < 0.05 and max(places) > 0.95
    assert draw_view(rng, 1, 5000, size=64, jitter=(0.1, 0.1), flip=0).scaled == (1, 6)
    # Halves of pixels: the longest side first, rounded up; or each for itself, to even.
    assert scaled_size(449, 640, 142) == (100, 142) and scaled_size(1, 4, 2) == (1, 2)
    assert draw_view(rng, 100, 200, size=9, jitter=(1.0, 1.0), flip=0, whole_target=True).scaled == (5, 9)
    assert draw_view(rng, 100, 200, size=9, jitter=(1.0, 1.0), flip=0, whole_target=False).scaled == (4, 9)


def test_windows_hold_whole_masks():
    """A mask in a view, through its packed window: each pixel is that of the source; odd sizes and empty ones too."""
    rng = np.random.default_rng(5)
    view = View((10, 20), 2, 3, (5, 8), True)
    mask = (np.arange(200).reshape(10, 20) % 3) == 0
    window, corner = view_of_mask(encode_mask(mask), view)
    whole = unpack(MaskWindows.of([window], [corner]), 8)[0]
    assert torch.equal(whole[:5], torch.from_numpy(mask[2:7, 3:11][:, ::-1].copy())) and not whole[5:].any()
    masks = [rng.random((13, 17)) < share for share in (0.9, 0.01, 0.0, 0.3)]
    view = View((29, 37), 4, 1, (20, 32), False)
    windows = [view_of_mask(encode_mask(m), view) for m in masks]
    packed = MaskWindows.of([w for w, _ in windows], [c for _, c in windows])
    rows = np.minimum(np.floor(np.arange(4, 24) * (13 / 29)).astype(int), 12)
    columns = np.minimum(np.floor(np.arange(1, 33) * (17 / 37)).astype(int), 16)
    for one, mask in zip(unpack(packed, 40), masks, strict=True):
        assert np.array_equal(one[:20, :32].numpy(), mask[rows][:, columns]) and one.sum() == one[:20, :32].sum()
    assert packed.boxes[2].tolist() == [0, 0, 0, 0] and packed.bits.dtype == torch.uint8
    assert unpack(MaskWindows.of([], []), 16).shape == (0, 16, 16)


# -- datasets ---------------------------------------------------------------------------------------------------------


def dataset(folder: Path, *, masks: bool = False, **kwargs) -> tuple[TrainDataset, Annotations]:
    for sub in ("train2017", "val2017"):
        (folder / sub).mkdir(exist_ok=True)
    Image.new("RGB", (40, 30), "blue").save(folder / "train2017" / "000000000005.jpg")
    a = load_annotations(small_file(folder), key="k", masks=masks)
    own = {key: kwargs.pop(key) for key in ("keep_empty", "min_image_side", "min_object_side") if key in kwargs}
    options = ViewOptions(image_size=64, **kwargs)
    return TrainDataset(a, labels=a.labels, root=str(folder), options=options, masks=masks, **own), a


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
    assert sample["labels"].tolist() == [2] and unpack(sample["masks"], 64).shape == (1, 64, 64)
    assert torch.equal(sample["masks"].boxes.float(), sample["boxes"])
    assert (sample["boxes"] - torch.tensor([1, 2, 11, 14]) * 1.6).abs().max() <= 1


def test_small_images_and_objects_go(tmp_path: Path):
    assert len(dataset(tmp_path, min_image_side=30)[0]) == 1 and len(dataset(tmp_path, min_image_side=31)[0]) == 0
    data, _ = dataset(tmp_path, jitter=(1.0, 1.0), min_object_side=11.0)
    assert data[(0, 0)]["labels"].tolist() == [0]  # the cat is 10 wide
    # All objects too thin: nothing is left of them, or another image comes instead (there is none here).
    for replace in (False, True):
        data, _ = dataset(tmp_path, jitter=(0.03, 0.03), min_box_side=1.0, replace_thin=replace)
        assert data[(0, 0)]["boxes"].shape == (0, 4) and data[(0, 0)]["labels"].shape == (0,)
    a = TestDataset(["train2017/000000000005.jpg", "x.jpg"], root=str(tmp_path), image_size=64)
    assert a[0]["size"] == (48, 64) and a[0]["original"] == (30, 40) and isinstance(a[1], Skipped)


def test_thin_objects_bring_another_image(tmp_path: Path):
    images = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 40} for i in (1, 2)]
    boxes = {1: [0, 0, 40, 0.4], 2: [0, 0, 40, 30]}
    content = {"images": images, "categories": [{"id": 1, "name": "a"}],
               "annotations": [{"image_id": i, "category_id": 1, "bbox": b} for i, b in boxes.items()]}  # fmt: skip
    for i in (1, 2):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{i}.png")
    a = load_annotations(write(tmp_path / "b.json", content), key="k")
    for replace, ids in ((True, {2}), (False, {1})):
        options = ViewOptions(image_size=32, jitter=(1.0, 1.0), min_box_side=1.0, replace_thin=replace)
        data = TrainDataset(a, labels=a.labels, root=str(tmp_path), options=options)
        assert {data[(epoch, 0)]["image_id"] for epoch in range(5)} == ids


def test_test_batches_over_processes():
    for world in (1, 2, 3):
        batches = [list(TestSampler(size=11, batch_size=2, rank=r, world_size=world)) for r in range(world)]
        flat = [i for part in batches for batch in part for i in batch]
        assert sorted(flat) == list(range(11))  # nothing twice, nothing missing
        assert all(batch[0] % 2 == 0 for part in batches for batch in part)  # the same batches for any world


def test_steps_of_one_orientation():
    high = np.random.default_rng(0).random(37) < 0.3

    def steps(rank: int, world: int, batch: int, start: int = 0, epoch: int = 2) -> list[list[tuple[int, int]]]:
        sampler = OrientedSampler(high, batch_size=batch, rank=rank, world_size=world, seed=1)
        sampler.set_epoch(epoch, start)
        assert len(sampler) == sampler.batches_per_epoch - start
        return list(sampler)

    one = steps(0, 1, 4)
    assert one == [a + b for a, b in zip(steps(0, 2, 2), steps(1, 2, 2), strict=True)]
    assert one[3:] == steps(0, 1, 4, start=3) and one != steps(0, 1, 4, epoch=3)
    assert all(len({bool(high[i]) for _, i in step}) == 1 and len(step) == 4 for step in one)
    assert {i for step in one for _, i in step} == set(range(37))
    kinds = [bool(high[step[0][1]]) for step in one]
    assert kinds != sorted(kinds) and sum(kinds) == -(-int(high.sum()) // 4)


def test_workers_change_nothing(tmp_path: Path):
    data, _ = dataset(tmp_path)
    boxes = []
    for workers in (0, 2):
        sampler = EpochBatchSampler(size=1, batch_size=2, seed=0)
        loader = train_loader(data, sampler, workers=workers, pin=False)
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            boxes.append(torch.cat([t["boxes"] for batch in loader for t in batch["targets"]]))
    assert torch.equal(boxes[0], boxes[2]) and torch.equal(boxes[1], boxes[3])


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
    for file, message in [("b.pt", "no embedding of 'background'"), ("c.npy", "zero"), ("d.npy", "not readable"),
                          ("e.npy", "no such file")]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            read_embeddings(str(tmp_path / file), names, 8)
    with pytest.raises(UserError, match=r"shape \(4, 8\)"):
        read_embeddings(str(tmp_path / "a.npy"), names[:2], 8)
    with pytest.raises(UserError, match="zebra"):
        read_embeddings(str(tmp_path / "a.pt"), ["zebra"], 8)
