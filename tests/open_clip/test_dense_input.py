"""From pictures to a model's input and back: places of pixels, boxes, masks and maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import open_clip
from open_clip.dense_input import DenseTransform
from open_clip.factory import build_model
from open_clip.transform import normalize, pad_to, resize_longest

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
PATCH = 8


def transform(size: int = 64, mode: str = "pad") -> DenseTransform:
    return DenseTransform(size, PATCH, MEAN, STD, mode)


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_pixels_are_those_of_training():
    """Longest side, zeros on the right and at the bottom, then normalised."""
    array = picture(30, 90)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = normalize(pad_to(resize_longest(tensor, 64), 64), MEAN, STD)
    inputs = transform()([array, Image.fromarray(array), tensor])
    assert inputs.image.shape == (3, 3, 64, 64) and inputs.grid == (8, 8)
    for image in inputs.image:
        torch.testing.assert_close(image, expected)
    assert torch.equal(transform()(tensor[None].expand(2, -1, -1, -1)).image[1], inputs.image[0])
    assert transform()(Image.fromarray(array).convert("L")).image.shape == (1, 3, 64, 64)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(["pad", "stretch"]), st.integers(0, 1000))
def test_boxes_go_and_come_back(height, width, mode, seed):
    inputs = transform(mode=mode)(Image.new("RGB", (width, height)))
    corners = np.sort(np.random.default_rng(seed).uniform(0, 1, (4, 2, 2)), axis=1) * [width, height]
    boxes = torch.tensor(corners.reshape(4, 4), dtype=torch.float32)
    (normed,) = inputs.normed_boxes([boxes])
    assert normed.min() >= 0 and normed.max() <= 1 + 1e-6
    (back,) = inputs.pixel_boxes([normed])
    torch.testing.assert_close(back, boxes, rtol=1e-4, atol=1e-3)
    whole = inputs.normed_boxes([[(0, 0, width, height)]])[0][0]
    place = inputs.placements[0]
    assert whole.tolist() == pytest.approx([0, 0, place.inner[1] / 64, place.inner[0] / 64], abs=1e-6)


def test_a_box_finds_what_it_surrounds():
    """The embedding of a box of the photograph is that of the same pixels, wherever padding and scale put them."""
    model = open_clip.create_model("ViT-Ti-8-64", load_weights=False).eval()
    prepare = open_clip.dense_transform(model, 128)
    inputs = prepare(Image.fromarray(picture(100, 200)))
    dense = model.encode_dense(inputs.image, keep_shape=True)
    boxes = inputs.normed_boxes([[(50, 25, 150, 75)]])  # at 0.64: pixels (32, 16, 96, 48), cells (4, 2, 12, 6)
    (region,) = model.encode_pseudo_boxes(inputs.image, boxes)
    torch.testing.assert_close(region, dense[0, :, 2:6, 4:12].mean((1, 2)), rtol=1e-3, atol=1e-4)
    assert open_clip.dense_transform(model).size == 1024
    with torch.device("meta"):
        large = build_model(open_clip.get_model_config("ViT-L-14-CLIPA"))
    assert open_clip.dense_transform(large.visual).size == 1022


@pytest.mark.parametrize("mode", ["pad", "stretch"])
@pytest.mark.parametrize(("height", "width"), [(50, 120), (120, 50), (64, 64), (33, 200)])
def test_maps_come_back_in_place(height, width, mode):
    """A map that tells its own place tells, restored, the place in the original: linear maps are restored exactly."""
    inputs = transform(mode=mode)(Image.new("RGB", (width, height)))
    place = inputs.placements[0]
    centres = (torch.arange(8) + 0.5) * PATCH  # of the cells, in pixels of the input
    maps = torch.stack([centres[:, None].expand(8, 8), centres.expand(8, 8)])[None]
    (restored,) = inputs.restore(maps)
    assert restored.shape == (2, height, width)
    y = (torch.arange(height) + 0.5) * place.scale[1]
    x = (torch.arange(width) + 0.5) * place.scale[0]
    expected = torch.stack([y[:, None].expand(height, width), x.expand(height, width)])
    inside = (expected > PATCH / 2) & (expected < 64 - PATCH / 2)  # beyond the outermost centres a map is constant
    torch.testing.assert_close(restored[inside], expected[inside], rtol=0, atol=1e-3)
    assert inputs.restore(maps, size=(20, 30))[0].shape == (2, 20, 30)
    cells = inputs.restore(maps, size="cells")[0]
    assert cells.shape[1:] == tuple(-(-s // PATCH) for s in place.inner)
    assert torch.equal(cells, maps[0, :, : cells.shape[1], : cells.shape[2]])


def test_restoring_a_whole_square_is_bilinear_resizing():
    maps = torch.randn(1, 3, 8, 8)
    (restored,) = transform()(Image.new("RGB", (100, 100))).restore(maps)
    expected = F.interpolate(maps, (100, 100), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(restored, expected, rtol=0, atol=1e-5)


def test_masks_of_the_original():
    inputs = transform()([Image.new("RGB", (128, 64)), Image.new("RGB", (16, 32))])
    mask = torch.zeros(3, 64, 128, dtype=torch.bool)
    mask[0, :32, :64] = True  # at half size: cells of 2 rows and 4 columns
    mask[1, 60:62, 10:12] = True  # half of no cell: the one that holds it
    mask[2] = True
    small, none = inputs.cell_masks([mask, np.zeros((0, 32, 16), bool)])
    expected = torch.zeros(3, 8, 8, dtype=torch.bool)
    expected[0, :2, :4] = True
    expected[1, 3, 0] = True
    expected[2, :4] = True
    assert torch.equal(small, expected) and none.shape == (0, 8, 8)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda t, i: t([]), ValueError, "there are no images"),
        (lambda t, i: t("cat.jpg"), TypeError, "image 0 is a str: give a PIL image"),
        (lambda t, i: t(torch.zeros(3, 8, 8)), TypeError, "is a tensor float32"),
        (lambda t, i: t(np.zeros((8, 8, 4), np.uint8)), TypeError, "is an array uint8"),
        (lambda t, i: i.normed_boxes([[(9, 9, 2, 2)]]), ValueError, "reversed corners"),
        (lambda t, i: i.normed_boxes([[(30, 0, 40, 9)]]), ValueError, r"lie outside it \(20x10 pixels\)"),
        (lambda t, i: i.normed_boxes([[], []]), ValueError, "2 lists of boxes for 1 images"),
        (lambda t, i: i.normed_boxes([[1, 2, 3, 4]]), ValueError, r"shape \(4,\): give \[K, 4\]"),
        (lambda t, i: i.cell_masks([torch.ones(1, 9, 9)]), ValueError, r"give \[K, 10, 20\]"),
        (lambda t, i: i.cell_masks([torch.zeros(1, 10, 20)]), ValueError, "has no pixel"),
        (lambda t, i: DenseTransform(60, 8, MEAN, STD), ValueError, "a multiple of the patch size 8, such as 56"),
        (lambda t, i: DenseTransform(64, 8, MEAN, STD, "crop"), ValueError, "use pad or stretch"),
        (lambda t, i: DenseTransform(64, 8, MEAN, STD, "pad", "area"), ValueError, "use bicubic or bilinear"),
    ],
)
def test_what_is_refused(call, kind, message):
    inputs = transform()(Image.new("RGB", (20, 10)))
    with pytest.raises(kind, match=message) as error:
        call(transform(), inputs)
    assert "\n" not in str(error.value)


def test_inputs_move_with_their_places():
    inputs = transform()(Image.new("RGB", (20, 10))).to("cpu", torch.bfloat16)
    assert inputs.image.dtype == torch.bfloat16 and inputs.normed_boxes([[]])[0].shape == (0, 4)
