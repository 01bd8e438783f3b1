"""Sliding windows against the published rule, and their linear maps against upsampling window by window."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from ovseg.windows import REMAINDERS, AxisMap, fit_within, interpolation, plan_windows, spread, window_boxes


def cut(windows, image):
    """All windows of an image, padded."""
    return windows.pad(torch.stack([windows.crop(image, i) for i in range(windows.count)]))


def maps_of(windows, height, width):
    """Maps to the pixels of rows and columns."""
    return [AxisMap.of(axis.matrix(size), "cpu") for axis, size in ((windows.rows, height), (windows.columns, width))]


def test_published_windows_and_padding(golden):
    content = json.loads((golden / "dense_labels" / "windows.json").read_text())
    for case in content["windows"]:
        boxes = window_boxes(case["height"], case["width"], case["crop"], case["stride"])
        assert [list(box) for box in boxes] == case["y0x0y1x1"]
    for case in content["centre_padding_left_right_top_bottom"]:
        windows = plan_windows(case["height"], case["width"], case["multiple"], remainder="centre")
        assert [*windows.columns.padding, *windows.rows.padding] == case["pad"]


@pytest.mark.parametrize(
    "size, within, expected",
    [
        ((375, 500), (2048, 336), (336, 448)),
        ((480, 640), (2048, 448), (448, 597)),
        ((333, 500), (520, 520), (346, 520)),
        ((1, 5000), (2048, 512), (1, 2048)),
    ],
)
def test_largest_size_within(size, within, expected):
    assert fit_within(*size, *within) == expected


def test_golden_merge(golden, recorded):
    """Patch means of each window, at the input's size and at another."""
    arrays = recorded("windows.npz")
    facts = json.loads((golden / "dense_labels" / "windows.json").read_text())
    patch = json.loads((golden / "vit_quickgelu" / "config.json").read_text())["vision_cfg"]["patch_size"]
    image = arrays["rule.image"][0].float()
    windows = plan_windows(*image.shape[1:], patch, facts["crop"], facts["stride"], "drop")
    cells = windows.join(F.avg_pool2d(cut(windows, image), patch))
    for name in ("rule.merged_input_size", "rule.merged_original_size"):
        expected = arrays[name][0]
        height, width = expected.shape[1:]
        merged = spread(cells, *maps_of(windows, height, width))
        torch.testing.assert_close(merged, expected, atol=3e-6, rtol=0)


def conventional(image, size, patch, crop, stride, remainder):
    """Upsample each window's patch means to its pixels, add, divide, resize: as the published programs do it."""
    channels, height, width = image.shape
    total, cover = torch.zeros(channels, height, width), torch.zeros(height, width)
    for y0, x0, y1, x1 in window_boxes(height, width, crop or max(height, width), stride or 1):
        window = image[None, :, y0:y1, x0:x1]
        h, w = window.shape[-2:]
        down, right = -h % patch, -w % patch
        top, left = (down // 2, right // 2) if remainder == "centre" else (0, 0)
        if remainder != "drop":
            window = F.pad(window, (left, right - left, top, down - top))
        cells = F.avg_pool2d(window, patch)
        if remainder in ("pad", "centre"):
            big = F.interpolate(cells, scale_factor=patch, mode="bilinear")[..., top : top + h, left : left + w]
        else:
            big = F.interpolate(cells, (h, w), mode="bilinear")
        total[:, y0:y1, x0:x1] += big[0]
        cover[y0:y1, x0:x1] += 1
    return F.interpolate((total / cover)[None], size, mode="bilinear")[0]


@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("shape, crop, stride", [((50, 83), 24, 10), ((50, 83), 0, 0), ((20, 61), 24, 24)])
def test_one_matrix_per_axis_is_the_sum_of_upsampled_windows(remainder, shape, crop, stride):
    image = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    windows = plan_windows(*shape, 8, crop, stride, remainder)
    cells = windows.join(F.avg_pool2d(cut(windows, image), 8))
    rows, columns = maps_of(windows, 71, 40)
    expected = conventional(image, (71, 40), 8, crop, stride, remainder)
    torch.testing.assert_close(spread(cells, rows, columns), expected, atol=1e-5, rtol=0)
    # A band is a part of the whole.
    band = spread(cells, rows[13:22], columns)
    torch.testing.assert_close(band, expected[:, 13:22], atol=1e-5, rtol=0)


def test_windows_padded_to_another_multiple_and_a_finer_grid():
    """ProxyCLIP: windows padded to 56 around, and a map of cells of 8 pixels beside the model's 14."""
    windows = plan_windows(100, 150, 14, 64, 32, "centre", 56)
    parts = cut(windows, torch.randn(3, 100, 150, generator=torch.Generator().manual_seed(0)))
    assert parts.shape == (windows.count, 3, 112, 112) and windows.rows.cells == 8
    fine = windows.rows.matrix(100, cells=14)
    assert fine.shape == (100, 14 * len(windows.rows.starts))
    torch.testing.assert_close(fine.sum(1), torch.ones(100))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="use one of"):
        plan_windows(10, 10, 2, remainder="round")
    with pytest.raises(ValueError, match="at least 1"):
        window_boxes(10, 10, 4, 0)
    with pytest.raises(ValueError, match="the stride may be 4 at most"):  # or pixels would be divided by no window: NaN
        plan_windows(10, 10, 2, 4, 6)
    assert plan_windows(4, 3, 2, 4, 6).count == 1  # one window holds all
    with pytest.raises(ValueError, match="patch size 16"):
        plan_windows(100, 100, 16, multiple=56)


@pytest.mark.parametrize("remainder", REMAINDERS)
def test_cells_that_pixels_touch_are_those_of_the_matrix(remainder):
    """For every band of rows the first and the last column of the matrix that is not zero throughout."""
    matrix = plan_windows(50, 83, 8, 24, 10, remainder).columns.matrix(40)
    for whole in (matrix, interpolation(5, 31).float(), torch.zeros(4, 6), matrix.flip(1), matrix * float("nan")):
        axis = AxisMap.of(whole, "cpu")
        assert len(axis) == len(whole) and axis.matrix is whole
        for start in range(len(whole)):
            for stop in range(start + 1, len(whole) + 1):
                used = whole[start:stop].any(0).nonzero().flatten().tolist()
                expected = slice(used[0], used[-1] + 1) if used else slice(0, 0)
                assert axis[start:stop].touched == expected


def test_pixels_of_no_cell_are_zero():
    axis = AxisMap.of(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), "cpu")
    cells = torch.ones(3, 2, 2)
    assert torch.equal(spread(cells, axis, axis), torch.tensor([[0.0, 0.0], [0.0, 4.0]]).expand(3, 2, 2))
    assert torch.equal(spread(cells, axis[:1], axis), torch.zeros(3, 1, 2))
