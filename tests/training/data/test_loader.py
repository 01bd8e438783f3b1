"""The way from files to batches: order, resuming, bad files, and every kind of dataset."""

from __future__ import annotations

import json
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import training.engine.data.workers as workers
from training.data import DataOptions, RegionOptions, View, build_train_data, prepare_batch
from training.engine.data.sampler import EpochBatchSampler
from training.engine.errors import UserError
from training.engine.flags import take

PLAIN = ((0.0,) * 3, (1.0,) * 3)
VIEWS = {"images": View("images", 64, *PLAIN), "crops": View("crops", 16, *PLAIN)}
COUNT = 14  # images, of which image 0 has no annotation


def tokenize(texts: list[str]) -> torch.Tensor:
    """Length of each word; a stand-in that tells captions apart."""
    return torch.tensor([([len(word) for word in text.split()] + [0] * 6)[:6] for text in texts])


@pytest.fixture
def root(tmp_path):
    """COCO-like folder: ``images/``, ``instances.json``, ``captions.json``."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    images, boxes, captions = [], [], []
    for i in range(COUNT):
        width, height = rng.integers(40, 90, 2).tolist()
        pixels = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(tmp_path / "images" / f"{i}.png")
        images.append({"id": 100 + i, "file_name": f"{i}.png", "width": width, "height": height})
        for _ in range(i % 4):
            x, y = rng.uniform(0, 20, 2)
            boxes.append({"image_id": 100 + i, "category_id": int(rng.integers(1, 4)), "bbox": [x, y, 18, 15]})
        captions += [{"image_id": 100 + i, "caption": f"{'word ' * i}number {'a' * k}"} for k in range(1, 4)]
    categories = [{"id": c, "name": f"class {c}"} for c in (1, 2, 3)]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return tmp_path


FIELDS = {"region_clip": ("labels",), "contrastive": ()}


def build(root, kind="grid_distill", rank=0, world_size=1, **changes):
    file = "captions.json" if kind == "contrastive" else "instances.json"
    flags = {"batch_size": 2, "workers": 0, "max_boxes": 5, "max_split": 3, "train_data": str(root / file),
             "train_image_root": str(root / "images"), "dataset_type": kind, **changes}  # fmt: skip
    fields = flags.pop("fields", FIELDS.get(kind, ("crops",)))
    return build_train_data(
        take(DataOptions, flags), take(RegionOptions, flags), image_size=64, crop_size=16, fields=fields,
        seed=flags.get("seed", 0), rank=rank, world_size=world_size, tokenize=tokenize,
    )  # fmt: skip


def epoch(data, number: int, start: int = 0) -> list[dict]:
    data.set_epoch(number, start)
    return list(data.loader)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize(("size", "batch", "world"), [(100, 4, 3), (97, 2, 2), (5, 4, 2), (12, 4, 3)])
def test_processes_together_see_what_one_would(size, batch, world):
    whole = EpochBatchSampler(size=size, batch_size=batch * world, seed=3)
    shares = [EpochBatchSampler(size=size, batch_size=batch, rank=r, world_size=world, seed=3) for r in range(world)]
    for number in (0, 1):
        for sampler in (whole, *shares):
            sampler.set_epoch(number)
        steps = list(whole)
        assert [sum(step, []) for step in zip(*shares, strict=True)] == steps and len(steps) == len(whole)
        seen = [index for step in steps for _, index in step]
        if size >= batch * world:
            assert len(set(seen)) == len(seen) == size // (batch * world) * batch * world
        else:
            assert set(seen) == set(range(size)) and len(seen) == batch * world
        shares[0].set_epoch(number, 1)
        assert list(shares[0]) == [step[:batch] for step in steps[1:]]
    whole.set_epoch(0)
    assert list(whole) != steps  # another order in each epoch


@pytest.mark.parametrize("kind", ["grid_distill", "proposals_distill", "mixed_distill", "region_clip", "contrastive"])
@pytest.mark.parametrize("crop_on", ["worker", "device"])
def test_batches_do_not_depend_on_workers_or_resuming(root, kind, crop_on):
    alone, helped = (build(root, kind, crop_on=crop_on, workers=w) for w in (0, 2))
    first, second = epoch(alone, 0), epoch(alone, 1)
    assert len(first) == alone.batches_per_epoch and not same(first, second)
    for data in (alone, helped):  # the same persistent workers serve all epochs
        assert same(epoch(data, 0), first)
        assert same(epoch(data, 1, start=2), second[2:])
        assert same(epoch(data, 1), second)
    assert not same(epoch(build(root, kind, crop_on=crop_on, seed=1), 0), first)


@pytest.mark.parametrize("kind", ["grid_distill", "proposals_distill", "mixed_distill", "region_clip"])
def test_packed_regions(root, kind):
    in_worker, on_device = (epoch(build(root, kind, crop_on=where), 0) for where in ("worker", "device"))
    for batch, other in zip(in_worker, on_device, strict=True):
        count, regions = len(batch["image_ids"]), int(batch["counts"].sum())
        assert batch["images"].shape == (count, 3, 64, 64) and batch["images"].dtype == torch.uint8
        assert batch["boxes"].shape == (regions, 4) and len(batch["counts"]) == count == batch["samples"]
        assert (batch["boxes"] >= 0).all() and (batch["boxes"] <= 1 + 1e-6).all()
        assert torch.equal(batch["boxes"], other["boxes"]) and isinstance(other["images"], list)
        if kind == "region_clip":
            assert batch["labels"].shape == (regions,) and "crops" not in batch and "crop_boxes" not in other
        else:
            assert batch["crops"].shape == (regions, 3, 16, 16) and other["crop_boxes"].shape == (regions, 4)
        a, b = (prepare_batch(x, VIEWS, torch.device("cpu")) for x in (batch, other))
        for name in {"images", "crops"} & a.keys():
            assert (a[name] - b[name]).abs().max() * 255 <= 3.01


def test_labels_and_captions(root):
    data = build(root, "region_clip")
    assert data.class_names == ["class 1", "class 2", "class 3"]
    assert data.num_images == sum(1 for i in range(COUNT) if i % 4) and data.num_regions == sum(
        i % 4 for i in range(COUNT)
    )
    pairs = build(root, "contrastive")
    assert pairs.class_names is None
    drawn = {}
    for number in range(6):
        for batch in epoch(pairs, number):
            assert batch["images"].shape == (2, 3, 64, 64) and batch["texts"].shape == (2, 6)
            for image, text in zip(batch["image_ids"].tolist(), batch["texts"].tolist(), strict=True):
                words = [4] * (image - 100) + [6]
                assert text[: len(words)] == words[:6]  # a caption of this image
                drawn.setdefault(image, set()).add(tuple(text))
    assert len(drawn[100]) > 1  # another caption in another epoch


def test_train_ratio_is_a_fixed_share(root):
    for kind in ("grid_distill", "contrastive"):
        half, again = (build(root, kind, train_ratio=0.5) for _ in range(2))
        assert half.num_images == COUNT // 2 and np.array_equal(half.dataset.indices, again.dataset.indices)
        assert not np.array_equal(half.dataset.indices, build(root, kind, train_ratio=0.5, seed=1).dataset.indices)


def test_unusable_images_are_skipped_and_named(root):
    (root / "images" / "1.png").write_bytes(b"damaged")
    (root / "images" / "2.png").unlink()
    Image.new("RGB", (1, 1)).save(root / "images" / "3.png")
    content = json.loads((root / "instances.json").read_text())
    content["images"][4]["file_name"] = "../instances.json"
    (root / "instances.json").write_text(json.dumps(content))
    for kind in ("grid_distill", "proposals_distill", "region_clip"):
        for crop_on in ("worker", "device"):
            data = build(root, kind, batch_size=1, crop_on=crop_on, workers=2)
            batches = epoch(data, 0)
            assert len(batches) == data.num_images
            names = {os.path.basename(file) for b in batches for file, _ in b["skipped"]}
            assert names == {"1.png", "2.png", "3.png"} | ({"instances.json"} if kind != "region_clip" else set())
            for batch in batches:
                ready = prepare_batch(batch, VIEWS, torch.device("cpu"))
                assert ready["images"].shape == (1, 3, 64, 64)  # black when nothing is left
                assert len(batch["skipped"]) + batch["samples"] == 1
                assert not batch["skipped"] or (not ready["images"].any() and len(ready["boxes"][0]) == 0)


def test_images_that_are_not_there_stop_before_the_start(root):
    with pytest.raises(UserError, match="--train-image-root .*no such folder"):
        build(root, train_image_root=str(root / "elsewhere"))
    (root / "empty").mkdir()
    with pytest.raises(UserError, match="--train-image-root .*the images of .*instances.json are not there.*0.png"):
        build(root, train_image_root=str(root / "empty"))
    content = json.loads((root / "instances.json").read_text())
    (root / "instances.json").write_text(json.dumps({"images": content["images"]}))
    with pytest.raises(UserError, match="no annotation with a category"):
        build(root, "region_clip")
    (root / "captions.json").write_text(json.dumps({"images": content["images"], "annotations": 3}))
    with pytest.raises(UserError, match="no image with a caption"):
        build(root, "contrastive")


def test_a_signal_to_the_group_leaves_the_workers_alive(root):
    data = build(root, workers=2)
    data.set_epoch(0)
    batches = iter(data.loader)
    received = [next(batches)]
    for worker in batches._workers:
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    time.sleep(0.2)
    received += list(batches)
    assert same(received, epoch(build(root), 0))


@pytest.mark.slow  # torch reports the death from a signal handler: wherever Python is then, and a hook may swallow it
def test_a_killed_worker_is_an_error_and_no_hang(root):
    data = build(root, workers=2)
    data.set_epoch(0)
    batches = iter(data.loader)
    next(batches)
    for worker in batches._workers:
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="worker"):
        for _ in range(2):  # the first pass may be served by what they had ready
            list(batches)
            batches = iter(data.loader)


def test_too_little_shared_memory_is_said_before_the_workers_die_of_it(root, monkeypatch, tmp_path):
    """The 64 MB of a container against what the workers will hold: here the images of a batch 2 x 3 x 64 x 64 bytes."""
    monkeypatch.setattr(workers, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20))
    for kind in ("grid_distill", "proposals_distill", "mixed_distill", "region_clip", "contrastive"):
        for crop_on in ("worker", "device"):
            build(root, kind, crop_on=crop_on, workers=4, batch_size=1)
    build(root, workers=0, batch_size=10_000)
    with pytest.raises(UserError) as error:
        build(root, workers=2, batch_size=10_000)
    assert "\n" not in str(error.value) and "lower --workers or --batch-size" in str(error.value)
    assert "64 MB free" in str(error.value) and "--shm-size" in str(error.value)


@pytest.mark.parametrize("kind", ["grid_distill", "proposals_distill", "mixed_distill", "region_clip", "contrastive"])
@pytest.mark.parametrize("crop_on", ["worker", "device"])
def test_what_is_said_of_a_batch_is_what_it_holds(root, monkeypatch, kind, crop_on):
    """The pixels of an epoch, on average: within a third for the sources that draw how many regions they give."""
    asked = []
    monkeypatch.setattr("training.data.loader.check_shared_memory", lambda size, **settings: asked.append(size))
    data = build(root, kind, crop_on=crop_on, max_boxes=9)
    held = [
        sum(p.numel() for name in ("images", "crops") if name in batch for p in batch[name])
        for number in range(20)
        for batch in epoch(data, number)
    ]
    mean = sum(held) / len(held)
    assert mean * 0.8 < asked[0] < mean * 1.6


def test_a_run_with_kept_answers_needs_no_room_for_crops(root, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("training.data.loader.check_shared_memory", lambda size, **settings: asked.append(size))
    build(root, cache_teacher=str(tmp_path / "answers"))
    assert asked == [2 * 3 * 64 * 64]
