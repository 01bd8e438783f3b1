"""RoIAlign to 1x1 as two products, against torchvision's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align

from open_clip import regions
from open_clip.separable_roi import separable_roi_align

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}

# Sides of maps; corners that are anywhere, on halves and whole cells (where samples meet limits), or close together.
sides = st.integers(1, 24)
corners = st.one_of(
    st.floats(-40, 60, allow_nan=False, width=32),
    st.integers(-80, 120).map(lambda n: n / 2),
    st.floats(-(2**-10), 2**-10, width=32),
    st.sampled_from([-0.5, 0.5, -1.0, 200.0, -200.0, 1e-20]),
)
spans = st.tuples(corners, corners).map(sorted)
box = st.tuples(spans, spans).map(lambda b: (b[0][0], b[1][0], b[0][1], b[1][1]))


def compare(features: torch.Tensor, boxes: list[torch.Tensor]) -> None:
    results = []
    for align in (lambda f, b: roi_align(f, b, (1, 1), 1.0, -1, True), separable_roi_align):
        leaf = features.clone().requires_grad_(True)
        out = align(leaf, boxes)
        torch.manual_seed(0)
        (out * torch.randn_like(out)).sum().backward()
        results.append((out.detach(), leaf.grad))
    for theirs, ours in zip(*results, strict=True):
        assert theirs.shape == ours.shape and theirs.dtype == ours.dtype
        limit = TOLERANCE[features.dtype] * max(1.0, theirs.abs().max().item() if theirs.numel() else 1.0)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=limit)


@settings(max_examples=100, deadline=None)
@given(
    height=sides, width=sides, seed=st.integers(0, 1000), dtype=st.sampled_from([torch.float32, torch.float64]),
    lists=st.lists(st.lists(box, max_size=4), min_size=1, max_size=3),
)  # fmt: skip
def test_any_box_on_any_map(height, width, seed, dtype, lists):
    """Outside the map, of no size, far larger than the map; images without boxes; values and gradients."""
    torch.manual_seed(seed)
    features = torch.randn(len(lists), 3, height, width, dtype=dtype)
    compare(features, [torch.tensor(boxes, dtype=dtype).reshape(-1, 4) for boxes in lists])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grid_cells_and_proposals_of_a_training_image(dtype):
    torch.manual_seed(0)
    features = torch.randn(2, 8, 64, 64, dtype=dtype)
    edges = torch.linspace(0, 64, 6, dtype=dtype)
    cells = [(edges[i], edges[j], edges[i + 1], edges[j + 1]) for i in range(5) for j in range(5)]
    low = torch.rand(100, 2, dtype=dtype) * 60
    proposals = torch.cat([low, low + torch.rand(100, 2, dtype=dtype) * 40], dim=1)
    compare(features, [torch.tensor(cells, dtype=dtype), proposals])


def test_reversed_and_distant_boxes_are_zero():
    """torchvision fails on the first."""
    boxes = torch.tensor([[3.0, 1.0, 2.0, 2.0], [3.0, 3.0, 1.0, 1.0], [1e4, 0.0, 1e4 + 2, 2.0], [1.0, 1.0, 1.0, 3.0]])
    assert not separable_roi_align(torch.ones(1, 2, 4, 4), [boxes]).any()


def test_no_images():
    assert separable_roi_align(torch.zeros(0, 5, 4, 4), []).shape == (0, 5, 1, 1)


@pytest.mark.parametrize(("share", "count", "graded", "expected"),
                         [(0.3, 20, True, True), (0.3, 20, False, True), (0.15, 20, False, False),
                          (0.05, 20, True, False), (0.3, 200, True, False), (0.3, 0, True, False)])  # fmt: skip
def test_the_faster_of_two_ways_is_chosen_and_they_agree(share, count, graded, expected, monkeypatch):
    """Sides of boxes are a share of the map's."""
    torch.manual_seed(0)
    features = torch.randn(2, 4, 16, 16, requires_grad=graded)
    low = torch.rand(count, 2) * (1 - share)
    boxes = [torch.cat([low, low + share], dim=1), torch.zeros(0, 4)]
    called = []
    monkeypatch.setattr(
        regions, "separable_roi_align", lambda *a: called.append(1) or separable_roi_align(*a)
    )
    pooled = regions.roi_features(features, boxes)
    assert bool(called) == expected
    torch.testing.assert_close(pooled, roi_align(features, [16 * b for b in boxes], 1, 1.0, -1, True)[..., 0, 0])

