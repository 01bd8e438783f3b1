"""Logits, losses, ensembles, crops, recall, expansion and labels against recorded numbers; sizes are the files'."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ovdet.data.repeat import RepeatSampler, repeat_factors
from ovdet.evaluation.arrays import Truth
from ovdet.evaluation.recall import average_recall
from ovdet.parts import boxes as box_ops
from ovdet.parts.losses import classification_loss
from ovdet.parts.scores import class_probabilities, fuse
from ovdet.vild.crops import RULES, crop_pixels, crops, crops_on_device, grow
from ovdet.vild.scores import (
    cosine_logits,
    expand,
    image_loss,
    plain_probabilities,
    scores_with_objectness,
    teacher_target,
    with_background,
)


@pytest.fixture
def load(golden: Path):
    def read(name: str) -> dict[str, np.ndarray]:
        path = golden / "vild" / name
        if not path.is_file():
            pytest.skip(f"{path} is not there: set CLIPSELF_GOLDEN to the folder of recorded numbers")
        return dict(np.load(path)) if name.endswith(".npz") else json.loads(path.read_text())

    return read


def tensor(values: np.ndarray, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.from_numpy(np.asarray(values))
    return values.to(dtype) if values.is_floating_point() else values


def close(mine: Tensor | np.ndarray | float, theirs: np.ndarray, dtype: torch.dtype = torch.float64) -> None:
    mine = mine.detach().numpy() if isinstance(mine, Tensor) else np.asarray(mine)
    scale = max(np.abs(theirs).max(), 1e-12)
    assert mine.shape == np.shape(theirs)
    assert np.abs(mine - theirs).max() / scale < (1e-9 if dtype == torch.float64 else 1e-5)


FORMATS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@FORMATS
def test_text_head(load, dtype):
    data = load("text_head.npz")
    region, background = (tensor(data[k], dtype).requires_grad_() for k in ("region", "background"))
    table = with_background(F.normalize(tensor(data["classes"], dtype), dim=-1), background)
    logits = cosine_logits(region, table, float(data["temperature"]))
    close(logits, data["logits"], dtype)
    base, labels = tensor(data["base_mask"]), tensor(data["labels"])
    loss = classification_loss(logits, labels, base, 1.0)
    close(loss, data["loss"], dtype)
    loss.backward()
    close(region.grad, data["grad_region"], dtype)
    close(background.grad, data["grad_background"], dtype)
    # Only the length of the background vector is without effect.
    close(cosine_logits(region, with_background(table[:-1], 7 * background), float(data["temperature"])),
          data["logits"], dtype)  # fmt: skip


@FORMATS
def test_novel_classes_take_no_part_in_the_softmax(load, dtype):
    data = load("text_head.npz")
    logits, labels, base = tensor(data["wide_logits"], dtype), tensor(data["labels"]), tensor(data["base_mask"])
    close(classification_loss(logits, labels, base, 1.0), data["wide_loss"], dtype)
    close(classification_loss(logits, labels, torch.ones_like(base), 1.0), data["wide_loss_nothing_masked"], dtype)
    assert abs(float(data["wide_loss_novel_logits_zeroed_tf"]) / float(data["wide_loss"]) - 1) > 0.01


@FORMATS
def test_image_loss(load, dtype):
    data = load("image_loss.npz")
    student = tensor(data["student"], dtype)
    target = teacher_target(tensor(data["clip_1x"], dtype), tensor(data["clip_15x"], dtype))
    close(target, data["target"], dtype)
    valid = tensor(data["valid"])
    close(image_loss(student[valid], target[valid]), data["loss"], dtype)
    close(image_loss(student, target), data["loss_all_valid"], dtype)
    for i in range(len(student)):
        close(image_loss(student[i : i + 1], target[i : i + 1]), data["per_box"][i], dtype)
    assert image_loss(student[:0], target[:0]) == 0


@FORMATS
@pytest.mark.parametrize("prefix", ["", "wide_"])
def test_ensemble(load, dtype, prefix):
    data = load("ensemble.npz")
    text, image = (tensor(data[f"{prefix}{k}_logits"], dtype) for k in ("text", "image"))
    base = tensor(data["base_mask"])
    p_text, p_image = class_probabilities(text), plain_probabilities(image)
    close(p_text, data[f"{prefix}p_text"], dtype)
    close(p_image, data[f"{prefix}p_image"], dtype)
    close(fuse(p_text, p_image, base, weight_base=1 / 3, weight_novel=2 / 3), data[f"{prefix}ensemble"], dtype)
    close(fuse(p_text, p_image, base, weight_base=0.4, weight_novel=0.4), data[f"{prefix}lambda_06"], dtype)
    if not prefix:
        factor = 0.01 / float(data["detpro_temperature"])
        p_text, p_image = class_probabilities(text * factor), plain_probabilities(image * factor)
        close(fuse(p_text, p_image, base, weight_base=1 / 3, weight_novel=2 / 3), data["detpro_ensemble"], dtype)
        close(fuse(p_text, p_image, base, weight_base=0.4, weight_novel=0.4), data["detpro_lambda_06"], dtype)


@FORMATS
def test_clip_on_proposals(load, dtype):
    data = load("clip_proposals.npz")
    classes = F.normalize(tensor(data["classes"], dtype), dim=-1)
    p = plain_probabilities(cosine_logits(tensor(data["crop_embeddings"], dtype), classes, float(data["temperature"])))
    close(p, data["p"], dtype)
    close(scores_with_objectness(p, tensor(data["objectness"], dtype)), data["score"], dtype)


@FORMATS
def test_expansion_by_attributes(load, dtype):
    data = load("attributes.npz")
    region, classes, attributes = (tensor(data[k], dtype) for k in ("region", "classes", "attributes"))
    settings = {"temperature": float(data["temperature"])}
    found = expand(region, classes, attributes, **settings)
    close(found.classes, data["p_class"], dtype)
    close(found.attributes, data["p_attribute"], dtype)
    close(found.joint, data["joint"], dtype)
    found = expand(region, classes, attributes, background=tensor(data["background"], dtype), **settings)
    close(found.classes, data["p_class_with_background"], dtype)
    close(found.joint, data["joint_with_background"], dtype)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("labels", {"positive": 0.5, "negative": 0.5}),
        ("labels_with_low_quality_matches", {"positive": 0.5, "negative": 0.5, "at_least": 0.5}),
        ("labels_at_03", {"positive": 0.3, "negative": 0.3}),
    ],
)
def test_labels_of_proposals(load, name, options):
    data = load("labels.npz")
    kept, labels = tensor(data["kept_truth"], torch.float32), tensor(data["kept_labels"])
    proposals = tensor(data["proposals"], torch.float32)
    iou = box_ops.pairwise_iou(proposals[None], kept[None])[0]
    close(iou, data["iou"], torch.float32)
    matches = box_ops.match(proposals, kept, **options)
    background = len(data["base_mask"])
    mine = torch.where(matches >= 0, labels[matches.clamp(min=0)], background)
    assert mine.tolist() == data[name].tolist()


@pytest.mark.parametrize("rule", ["squash", "resize_centre"])
@pytest.mark.parametrize(("name", "scale"), [("1x", 1.0), ("15x", 1.5)])
def test_crops(load, rule, name, scale):
    data = load("crops.npz")
    image, size = torch.from_numpy(data["image"]).permute(2, 0, 1), int(data["size"])
    pixels = crop_pixels(data["boxes"], scale, *image.shape[-2:])
    assert pixels.tolist() == data[f"{name}_pixels"].tolist()
    if scale == 1.5:
        close(grow(data["boxes"], scale), data["grown"])
    expected = data[f"{name}_{rule}"].astype(int)
    for made in (crops(image, pixels, size, rule), crops_on_device(image, pixels, size, rule, chunk=4)):
        difference = np.abs(made.permute(0, 2, 3, 1).numpy().astype(int) - expected)
        # Ours resize along the lines first; Pillow 13 begins with the columns of high, narrow crops, which moves a
        # rounding from one pass to the other: 2 in a few values of ten thousand.
        assert difference.max() <= 2 and (difference > 1).mean() < 1e-3 and difference.mean() < 0.1


def test_both_ways_to_cut_agree_under_every_rule():
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (3, 50, 70), dtype=np.uint8))
    corners = np.sort(rng.uniform(-10, 80, (12, 2, 2)), axis=1).reshape(-1, 4)
    for rule in RULES:
        pixels = crop_pixels(corners, 1.5, 50, 70)
        difference = (crops(image, pixels, 24, rule).float() - crops_on_device(image, pixels, 24, rule)).abs()
        assert difference.max() <= 3 and difference.mean() < 0.2, rule
    assert crops_on_device(image, pixels[:0], 24).shape == crops(image, pixels[:0], 24).shape == (0, 3, 24, 24)


def test_recall(load):
    data = load("recall.json")
    truth = Truth.from_json(data["truth"])
    boxes: dict[int, list] = {}
    for one in sorted(data["proposals"], key=lambda p: -p["score"]):
        x, y, w, h = one["bbox"]
        boxes.setdefault(one["image_id"], []).append([x, y, x + w, y + h])
    novel = [i for i, c in enumerate(truth.category_ids) if c in (2, 4)]
    most = [int(key.partition("@")[2]) for key in data["expected"]["all"]]
    mine = average_recall(
        truth, lambda row: np.array(boxes.get(int(truth.image_ids[row]), [])).reshape(-1, 4), most,
        {"all": range(len(truth.names)), "novel": novel},
    )  # fmt: skip
    for group in ("all", "novel"):
        for n in most:
            assert mine[group][f"AR@{n}"] == pytest.approx(data["expected"][group][f"AR@{n}"], abs=1e-12)
            theirs = data["expected"][f"{group}_mean_over_classes"][f"AR@{n}"]
            assert mine[group][f"class_AR@{n}"] == pytest.approx(theirs, abs=1e-12)


def test_repeat_factors(load):
    data = load("repeat_factors.json")
    lists = data["classes_of_image"]
    image = np.repeat(np.arange(len(lists)), [len(c) for c in lists])
    label = np.array([c for classes in lists for c in classes])
    close(repeat_factors(image, label, len(lists), data["threshold"]), np.array(data["factors"]))


def test_repeated_images_come_as_often_as_their_factors_say():
    factors = np.array([1.0, 2.3, 1.0, 1.5, 3.2])
    sampler = RepeatSampler(factors, batch_size=1, seed=3)
    counts = np.zeros(5)
    for epoch in range(400):
        sampler.set_epoch(epoch)
        keys = [key for batch in sampler for key in batch]
        assert len(keys) == sampler.batches_per_epoch == 9
        times = np.bincount([i for _, i in keys], minlength=5)
        assert (times >= np.floor(factors)).all() and (times <= np.ceil(factors)).all()
        counts += times
    assert np.abs(counts / 400 - factors).max() < 0.12
    # Processes share an epoch out; a resumed one goes on in its middle.
    parts = [RepeatSampler(factors, batch_size=2, rank=r, world_size=2, seed=3) for r in (0, 1)]
    whole = RepeatSampler(factors, batch_size=4, seed=3)
    for sampler in (*parts, whole):
        sampler.set_epoch(1, 1)
    assert [a + b for a, b in zip(*parts, strict=True)] == list(whole)
