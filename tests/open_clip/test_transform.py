"""Image preparation against Pillow, which the reference uses, and against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from open_clip.transform import (
    crop_box,
    crop_region,
    detection_size,
    image_transform,
    normalize,
    pad_to,
    random_crop_box,
    resize_longest,
)

MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.27, 0.28)


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth shapes with a little noise, ``[3, height, width]``, channel innermost as decoders leave it."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(x * f + y * g) for f, g in rng.uniform(-40, 40, (3, 2))], -1)
    pixels = 128 + 90 * waves + rng.normal(0, 12, waves.shape)
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)


def pillow(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def close(actual: torch.Tensor, expected: Image.Image) -> None:
    difference = (actual.permute(1, 2, 0).int() - torch.from_numpy(np.array(expected)).int()).abs()
    assert difference.max() <= 2 and difference.float().mean() <= 0.2


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 90), st.integers(1, 90), st.sampled_from([16, 33]),
    st.lists(st.floats(-20, 110), min_size=4, max_size=4),
)  # fmt: skip
def test_crop_region_is_pillows(height, width, size, box):
    image = picture(height, width)
    box = [*np.minimum(box[:2], box[2:]), *np.maximum(box[:2], box[2:])]
    x1, y1, x2, y2 = crop_box(box, height, width)
    assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
    h, w, _ = detection_size(y2 - y1, x2 - x1, size)
    assert max(h, w) == size
    expected = Image.new("RGB", (size, size))
    resized = pillow(image).crop((x1, y1, x2, y2)).resize((w, h), Image.BICUBIC)
    expected.paste(resized, ((size - w) // 2, (size - h) // 2))
    crop = crop_region(image, box, size)
    close(crop, expected)
    assert torch.equal(crop, crop_region(image.contiguous(), box, size))  # whatever the layout in memory


def test_crop_coordinates_are_rounded_to_even():
    assert crop_box([0.5, 1.5, 9.5, 10.4], 20, 20) == (0, 2, 10, 10)
    assert crop_box([5.1, 5.1, 5.3, 5.2], 20, 20) == (5, 5, 6, 6)  # below one pixel
    assert crop_box([20, 20, 20, 20], 20, 20) == (19, 19, 20, 20)  # at the far corner


def test_detection_size_and_padding():
    assert detection_size(480, 640, 1024) == (768, 1024, 1.6)
    assert detection_size(3, 1000, 100)[:2] == (1, 100)  # 0.3 of a pixel is still a row
    image = picture(48, 64)
    for layout in (image, image.contiguous()):
        padded = pad_to(resize_longest(layout, 100), 100)
        assert padded.shape == (3, 100, 100) and not padded[:, 75:].any()
        close(padded[:, :75], pillow(image).resize((100, 75), Image.BICUBIC))
    assert torch.equal(pad_to(torch.stack([image, image]), 64)[1, :, :48], image)


def test_normalize_in_float64():
    image = picture(9, 7)
    expected = (image.double() / 255 - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(normalize(image, MEAN, STD).double(), expected, atol=1e-6, rtol=0)
    assert normalize(image, MEAN, STD, torch.bfloat16).dtype == torch.bfloat16


def test_whole_images():
    image = picture(60, 97)
    expected = {
        "shortest": pillow(image).resize((int(97 * 32 / 60), 32), Image.BICUBIC).crop((10, 0, 42, 32)),
        "squash": pillow(image).resize((32, 32), Image.BICUBIC),
        "longest": Image.new("RGB", (32, 32)),
    }
    expected["longest"].paste(pillow(image).resize((32, 20), Image.BICUBIC), (0, 6))
    for mode, pixels in expected.items():
        transform = image_transform(32, mean=MEAN, std=STD, mode=mode)
        made = transform(pillow(image))
        assert torch.equal(made, transform(image))
        close((made * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]).mul(255).round(), pixels)
    assert image_transform(32, mean=MEAN, std=STD, mode="random")(pillow(image).convert("L")).shape == (3, 32, 32)
    with pytest.raises(ValueError, match="shortest, longest, squash or random"):
        image_transform(32, mean=MEAN, std=STD, mode="fit")


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 10**6))
@settings(deadline=None)
def test_random_crops_lie_inside(height, width, seed):
    top, left, h, w = random_crop_box(height, width, (0.5, 1.0), torch.Generator().manual_seed(seed))
    assert h >= 1 and w >= 1 and top >= 0 and left >= 0 and top + h <= height and left + w <= width
