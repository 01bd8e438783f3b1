"""Batches made on the device against those made by the workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import open_clip
from open_clip.transform import crop_region, normalize, pad_to, resize_longest
from training.data.prepare import DevicePrefetcher, View, prepare_batch
from training.data.resample import device_crops, device_image, resample
from training.scenes.compose import SceneOptions, draw_scene

SETTINGS = {"mean": (0.48, 0.45, 0.40), "std": (0.26, 0.27, 0.28)}


def views(dtype: torch.dtype = torch.float32) -> dict[str, View]:
    return {"images": View("images", 64, **SETTINGS, dtype=dtype), "crops": View("crops", 24, **SETTINGS, dtype=dtype)}


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return torch.from_numpy(values).permute(2, 0, 1)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 120), st.integers(1, 120), st.sampled_from([8, 24, 33]),
    st.lists(st.lists(st.floats(-10, 130), min_size=4, max_size=4), min_size=1, max_size=40),
)  # fmt: skip
def test_device_crops_are_the_workers(height, width, size, corners):
    """White noise is the hardest picture; the kernels still agree to the rounding of 8-bit weights."""
    image = picture(height, width)
    boxes = torch.tensor(corners)
    boxes = torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])], 1)
    made = device_crops(image, boxes, size)
    expected = torch.stack([crop_region(image, box, size) for box in boxes.tolist()])
    difference = (made - expected).abs()
    assert difference.max() <= 3 and difference.mean() <= 0.2
    whole = (device_image(image, size) - pad_to(resize_longest(image, size), size)).abs()
    assert whole.max() <= 3 and whole.mean() <= 0.2


@pytest.mark.parametrize(("height", "width", "size"), [(50, 80, 32), (20, 30, 64), (64, 64, 64)])
def test_resampling_against_torch_in_float64(height, width, size):
    image = picture(height, width, seed=3)
    h, w = round(height * size / max(height, width)), round(width * size / max(height, width))
    # One pass at a time, with the 8-bit image that lies between them.
    lines = F.interpolate(image[None].double(), (height, w), mode="bicubic", antialias=True).round().clamp(0, 255)
    expected = F.interpolate(lines, (h, w), mode="bicubic", antialias=True).round().clamp(0, 255)
    difference = (resample(image, [(0, 0, width, height)], size, centred=False)[0, :, :h, :w] - expected[0]).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3  # ties of the rounding


def test_prepared_batches(device="cpu"):
    """On a GPU: :mod:`tests.gpu.test_gpu`."""
    for dtype in (torch.float32, torch.bfloat16):
        check_prepared_batches(device, dtype)


def check_prepared_batches(device: str, dtype: torch.dtype) -> None:
    images = [picture(40, 60, 1), picture(90, 30, 2)]
    crop_boxes = [torch.tensor([[0.0, 0, 30, 40], [10, 10, 50, 20]]), torch.tensor([[3.0, 3, 28, 80]])]
    common = {
        "boxes": torch.rand(3, 4), "counts": torch.tensor([2, 1]), "image_ids": torch.tensor([5, 6]),
        "labels": torch.arange(3), "skipped": [("x.jpg", "broken")],
    }  # fmt: skip
    in_worker = common | {
        "images": torch.stack([pad_to(resize_longest(i, 64), 64) for i in images]),
        "crops": torch.stack([crop_region(i, b, 24) for i, bs in zip(images, crop_boxes, strict=True) for b in bs]),
    }
    on_device = common | {"images": images, "crop_boxes": torch.cat(crop_boxes)}
    target = torch.device(device)

    def prepare(batch: dict) -> dict:
        return prepare_batch(batch, views(dtype), target)

    first, second = DevicePrefetcher([in_worker, on_device], prepare, target)
    mean, std = (torch.tensor(SETTINGS[k], dtype=torch.float64)[:, None, None] for k in ("mean", "std"))
    for batch in (first, second):
        assert batch["images"].shape == (2, 3, 64, 64) and batch["crops"].shape == (3, 3, 24, 24)
        assert batch["images"].dtype == batch["crops"].dtype == dtype and batch["images"].device.type == device
        assert [b.tolist() for b in batch["boxes"]] == [common["boxes"][:2].tolist(), common["boxes"][2:].tolist()]
        assert all(b.dtype == torch.float32 for b in batch["boxes"])  # whatever the pixels' type
        assert batch["skipped"] == common["skipped"] and batch["labels"].tolist() == [0, 1, 2]
        for name in ("images", "crops"):
            expected = (in_worker[name].double() / 255 - mean) / std
            error = (batch[name].cpu().double() - expected).abs()
            levels = 0 if batch is first else 3
            assert error.max() <= levels / 255 / 0.26 + (1e-5 if dtype == torch.float32 else 0.02)


def test_a_batch_without_regions():
    batch = {"boxes": torch.zeros(0, 4), "counts": torch.zeros(1, dtype=torch.int64), "skipped": []}
    for images, crops in (
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), {"crops": torch.zeros(0, 3, 24, 24, dtype=torch.uint8)}),
        ([torch.zeros(3, 64, 64, dtype=torch.uint8)], {"crop_boxes": torch.zeros(0, 4)}),
    ):
        out = prepare_batch(batch | {"images": images} | crops, views(), torch.device("cpu"))
        assert out["crops"].shape == (0, 3, 24, 24) and [len(b) for b in out["boxes"]] == [0]


def test_teacher_embeddings_of_device_crops_agree_with_pillows():
    """Cosine 0.999 at least, between crops made on the device and antialiased bicubic crops of Pillow."""
    torch.manual_seed(0)
    teacher = open_clip.create_model("ViT-Ti-8-64").eval()
    scene = draw_scene(np.random.default_rng(0), SceneOptions(size=480)).image  # uint8 [H, W, 3]
    image, (height, width) = torch.from_numpy(scene).permute(2, 0, 1), scene.shape[:2]
    corners = np.sort(np.random.default_rng(1).uniform(0, [[[width, height]]], (24, 2, 2)), axis=1)
    boxes = corners.reshape(-1, 4).round()
    boxes = boxes[((boxes[:, 2:] - boxes[:, :2]) >= 8).all(1)]
    assert len(boxes) >= 16
    expected = np.zeros((len(boxes), 64, 64, 3), np.uint8)
    for square, box in zip(expected, boxes, strict=True):
        crop = Image.fromarray(scene).crop(tuple(int(v) for v in box))
        scale = 64 / max(crop.size)
        w, h = (max(round(side * scale), 1) for side in crop.size)
        top, left = (64 - h) // 2, (64 - w) // 2
        square[top : top + h, left : left + w] = np.asarray(crop.resize((w, h), Image.Resampling.BICUBIC))
    made = device_crops(image, torch.from_numpy(boxes), 64)
    mean, std = teacher.visual.image_mean, teacher.visual.image_std
    with torch.no_grad():
        a = teacher.encode_image(normalize(made, mean, std), normalize=True)
        b = teacher.encode_image(normalize(torch.from_numpy(expected).permute(0, 3, 1, 2), mean, std), normalize=True)
    assert (a * b).sum(-1).min() >= 0.999
    # Embeddings of random weights lie close together; what sets a crop apart from the mean of all agrees as well.
    centre = b.mean(0)
    assert F.cosine_similarity(a - centre, b - centre).min() >= 0.999
    assert F.cosine_similarity(a[:-1] - centre, b[1:] - centre).max() < 0.99
