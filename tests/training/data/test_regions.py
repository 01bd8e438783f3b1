"""Properties of grids and proposals for any image and any random choice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.grid import grid_choices, grid_regions, grid_template
from training.data.proposals import draw_proposals, proposal_regions

sides = st.integers(2, 3000)
seeds = st.integers(0, 2**32)


def areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def check_inside(boxes: np.ndarray, width: int, height: int) -> None:
    assert boxes.dtype == np.float32 and (boxes >= 0).all()
    assert (boxes <= np.array([width, height, width, height], np.float32)).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


@pytest.mark.parametrize("most", [1, 2, 6, 16])
def test_grid_choices(most):
    choices = grid_choices(most)
    assert choices == tuple(
        (m, n) for m in range(1, most + 1) for n in range(1, most + 1) if m / 2 <= n <= 2 * m
    )  # fmt: skip
    for rows, columns in choices:
        cells = grid_template(rows, columns)
        np.testing.assert_allclose(areas(cells), 1 / (rows * columns), rtol=1e-4)
        np.testing.assert_allclose(cells[columns - 1], [1 - 1 / columns, 0, 1, 1 / rows], atol=1e-6)  # end of row 0


@settings(deadline=None)
@given(sides, sides, seeds, st.integers(1, 8), st.integers(1, 30), st.floats(0.5, 3))
def test_grid_regions(width, height, seed, most_split, most, scale):
    boxes, crops = grid_regions(
        width, height, np.random.default_rng(seed), max_split=most_split, max_boxes=most, crop_scale=scale
    )
    assert len(boxes) == len(crops) <= most and len(np.unique(boxes, axis=0)) == len(boxes)
    check_inside(boxes, width, height)
    check_inside(crops, width, height)
    if len(boxes) < most:  # nothing was left out: the cells tile the image
        assert areas(boxes.astype(np.float64)).sum() == pytest.approx(width * height, rel=1e-4)
    if scale == 1:
        assert np.array_equal(boxes, crops)
    elif scale > 1:
        assert (crops[:, :2] <= boxes[:, :2] + 1e-3).all() and (crops[:, 2:] >= boxes[:, 2:] - 1e-3).all()
    again = grid_regions(width, height, np.random.default_rng(seed), max_split=most_split, max_boxes=most)[0]
    assert np.array_equal(boxes, again)


@settings(deadline=None)
@given(sides, sides, seeds, st.integers(0, 40))
def test_proposal_regions(width, height, seed, count):
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, [[[width, height]]], (count, 2, 2)), axis=1)
    annotated = corners.reshape(-1, 4).astype(np.float32)
    annotated = annotated[(annotated[:, 2:] > annotated[:, :2]).all(1)]
    drawn = draw_proposals(annotated, rng, max_boxes=20, min_size=8, max_size=256)
    boxes, crops = proposal_regions(annotated, drawn, width, height)
    assert 1 <= len(boxes) == len(crops) <= 20
    check_inside(crops, width, height)
    allowed = (areas(annotated) >= 64) & (areas(annotated) <= 256**2)
    rows = {tuple(box) for box in annotated[allowed].tolist()}
    if tuple(boxes[0].tolist()) not in rows:  # nothing drawn was left
        np.testing.assert_allclose(boxes, [[0, 0, width / 4, height / 4]], rtol=1e-6)
        assert len(annotated) > 20 or not allowed.any()
    else:
        assert all(tuple(box) in rows for box in boxes.tolist())
        if len(annotated) <= 20:
            assert len(boxes) == allowed.sum()
        # 1.5 times about the centre, where the image does not cut it off.
        inner = ((crops > 0) & (crops < np.array([width, height, width, height]))).all(1)
        np.testing.assert_allclose(areas(crops[inner]), 2.25 * areas(boxes[inner]), rtol=1e-2)
