"""Image preparation against Pillow, which the reference uses, and against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from open_clip.transform import (
    AugmentationCfg,
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


def expected_whole_image(image: torch.Tensor, mode: str) -> Image.Image:
    """An image of 60x97 at 32x32 by Pillow alone."""
    if mode == "longest":
        square = Image.new("RGB", (32, 32), (7, 7, 7))
        square.paste(pillow(image).resize((32, 20), Image.BICUBIC), (0, 6))
        return square
    if mode == "squash":
        return pillow(image).resize((32, 32), Image.BICUBIC)
    return pillow(image).resize((int(97 * 32 / 60), 32), Image.BICUBIC).crop((10, 0, 42, 32))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_whole_images(mode):
    image = picture(60, 97)
    transform = image_transform(32, False, mean=MEAN, std=STD, resize_mode=mode, fill_color=7)
    made, expected = transform(pillow(image)), expected_whole_image(image, mode)
    pixels = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
    torch.testing.assert_close(made, normalize(pixels, MEAN, STD), rtol=0, atol=1e-6)  # Pillow's own pixels
    values = transform(image) * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    close(values.mul(255).round(), expected)  # a tensor is resized by torch
    assert transform.transforms[-1].mean == MEAN and transform(pillow(image).convert("L")).shape == (3, 32, 32)


def test_whole_images_that_are_not_square():
    image = picture(60, 97)
    transform = image_transform((32, 64), False, mean=MEAN, std=STD)  # 40 x 64 covers it
    expected = pillow(image).resize((64, 40), Image.BICUBIC).crop((0, 4, 64, 36))
    pixels = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
    torch.testing.assert_close(transform(pillow(image)), normalize(pixels, MEAN, STD), rtol=0, atol=1e-6)


def test_training_images():
    image = pillow(picture(60, 97))
    crop = image_transform(32, True, aug_cfg={"scale": (0.4, 0.5), "ratio": (1, 1)})
    torch.manual_seed(0)
    made = [crop(image) for _ in range(5)]
    assert all(m.shape == (3, 32, 32) for m in made) and not torch.equal(made[0], made[1])
    assert crop.transforms[0].scale == (0.4, 0.5)
    grey = image_transform(32, True, mean=(0, 0, 0), std=(1, 1, 1), aug_cfg=AugmentationCfg(gray_scale_prob=1.0))(image)
    torch.testing.assert_close(grey[0], grey[1])
    jitter = {"color_jitter": (0.3, 0.3, 0.3, 0.1), "color_jitter_prob": 1.0}
    assert image_transform(32, True, aug_cfg=jitter)(image).shape == (3, 32, 32)
    timm = image_transform(32, True, aug_cfg={"use_timm": True, "re_prob": 0.5, "color_jitter": 0.2})
    assert timm(image).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resize_mode": "fit"}, "use shortest, longest, squash"),
        ({"interpolation": "nearest"}, "use bicubic or bilinear"),
        ({"mean": (0.5, 0.5)}, "image_mean has 2 values: give three"),
        ({"std": (0.2, 0.0, 0.2)}, "every value must be above 0"),
        ({"is_train": True, "aug_cfg": {"scales": (0.1, 1)}}, "aug_cfg has unknown keys scales"),
        ({"is_train": True, "aug_cfg": {"re_prob": 0.1}}, "set use_timm=True"),
        ({"is_train": True, "aug_cfg": {"color_jitter": 0.1, "color_jitter_prob": 0.5}}, "give brightness, contrast"),
    ],
)
def test_preparations_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        image_transform(32, **{"is_train": False, **arguments})


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 10**6))
@settings(deadline=None)
def test_random_crops_lie_inside(height, width, seed):
    top, left, h, w = random_crop_box(height, width, (0.5, 1.0), torch.Generator().manual_seed(seed))
    assert h >= 1 and w >= 1 and top >= 0 and left >= 0 and top + h <= height and left + w <= width
