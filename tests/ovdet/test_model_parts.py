"""Parts of the detector against closed forms and independent implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import MultiScaleRoIAlign, batched_nms, box_iou

from ovdet.fvit.fusion import vlm_probabilities
from ovdet.parts import boxes as box_ops
from ovdet.parts.anchors import level_anchors
from ovdet.parts.boxes import Padded
from ovdet.parts.fpn import Neck, level_strides
from ovdet.parts.losses import box_loss, classification_loss, mask_loss, objectness_loss
from ovdet.parts.masks import compress_runs, mask_targets, paste_masks
from ovdet.parts.rois import sample_rois
from ovdet.parts.rpn import RPN
from ovdet.parts.scores import class_probabilities, fuse, select_detections


def random_boxes(number: int, size: float, generator: torch.Generator) -> torch.Tensor:
    corners = torch.rand(number, 2, 2, generator=generator) * size
    return torch.cat([corners.min(1).values, corners.max(1).values + 1], dim=1)


@pytest.mark.parametrize(("patch", "size", "strides"), [(16, 128, (4, 8, 16, 32, 64)), (14, 112, (3.5, 7, 14, 28, 56))])
def test_levels_have_their_strides(patch: int, size: int, strides: tuple):
    assert level_strides(patch) == strides
    cells = size // patch
    maps = [torch.randn(2, 12, cells, cells) for _ in range(4)]
    levels = Neck(12, 8)(maps)
    assert [tuple(x.shape) for x in levels] == [(2, 8, int(size / s), int(size / s)) for s in strides]
    # An odd, oblong grid: the levels above the ViT's lose a last row or column, never gain one.
    sides = [tuple(x.shape[-2:]) for x in Neck(12, 8)([torch.randn(2, 12, 7, 5) for _ in range(4)])]
    assert sides == [(28, 20), (14, 10), (7, 5), (3, 2), (2, 1)]


@pytest.mark.parametrize(("stride", "offset"), [(3.5, 0.5), (4.0, 0.0), (56.0, 0.0)])
def test_anchors_centres_and_areas(stride: float, offset: float):
    anchors = level_anchors((3, 5), stride, 8.0, [0.5, 1.0, 2.0], offset=offset).reshape(3, 5, 3, 4)
    x1, y1, x2, y2 = anchors.unbind(-1)
    for row, column in [(0, 0), (2, 4), (1, 3)]:
        assert torch.allclose((x1 + x2)[row, column] / 2, torch.tensor((column + offset) * stride))
        assert torch.allclose((y1 + y2)[row, column] / 2, torch.tensor((row + offset) * stride))
    assert torch.allclose((x2 - x1) * (y2 - y1), torch.tensor((8 * stride) ** 2))
    assert torch.allclose((y2 - y1) / (x2 - x1), torch.tensor([0.5, 1.0, 2.0]))


def test_box_coding_is_torchvisions_and_round_trips():
    generator = torch.Generator().manual_seed(0)
    boxes, targets = (random_boxes(50, 300, generator) for _ in range(2))
    weights = (10.0, 10.0, 5.0, 5.0)
    offsets = box_ops.encode_boxes(targets, boxes, weights)
    reference = BoxCoder(weights)
    assert torch.allclose(offsets, reference.encode_single(targets, boxes), atol=1e-5)
    noise = torch.randn(50, 4, generator=generator) * 30
    decoded = box_ops.decode_boxes(noise, boxes, weights, limit_below=False)
    assert torch.allclose(decoded, reference.decode_single(noise, boxes), rtol=1e-4, atol=1e-2)
    near = boxes + torch.rand(50, 4, generator=generator) * boxes.new_tensor([-1, -1, 1, 1])
    offsets = box_ops.encode_boxes(near, boxes, weights)
    assert torch.allclose(box_ops.decode_boxes(offsets, boxes, weights), near, atol=1e-3)
    # Boxes without extent are coded to finite numbers.
    flat = torch.tensor([[5.0, 5.0, 5.0, 9.0]])
    assert box_ops.encode_boxes(flat, flat, weights).isfinite().all()


def test_matching(monkeypatch: pytest.MonkeyPatch):
    truth = torch.tensor([[0.0, 0, 10, 10], [100, 100, 110, 110]])
    boxes = torch.tensor(
        [[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 2], [100, 100, 110, 104], [100, 100, 110, 102], [50, 50, 60, 60]]
    )  # IoU 1, .5, .2 with the first; .4, .2 with the second; 0
    generator = torch.Generator().manual_seed(1)
    many, crowd = random_boxes(200, 100, generator), random_boxes(90, 100, generator)
    best, index = box_iou(many, crowd).max(1)
    expected = torch.where(best >= 0.5, index, box_ops.BACKGROUND)
    for table in (2**25, 1):  # all true boxes at once, and one after another
        monkeypatch.setattr(box_ops, "_TABLE", table)
        assert box_ops.match(boxes, truth, positive=0.7, negative=0.3).tolist() == [0, -2, -1, -2, -1, -1]
        # The best box of the second true box is forced, as its IoU is at least 0.3.
        assert box_ops.match(boxes, truth, positive=0.7, negative=0.3, at_least=0.3).tolist() == [0, -2, -1, 1, -1, -1]
        assert box_ops.match(boxes, truth, positive=0.7, negative=0.3, at_least=0.5).tolist() == [0, -2, -1, -2, -1, -1]
        assert torch.equal(box_ops.match(many, crowd, positive=0.5, negative=0.5), expected)
    assert box_ops.match(boxes, truth[:0], positive=0.7, negative=0.3, at_least=0.3).tolist() == [-1] * 6
    assert box_ops.match(boxes[:0], truth, positive=0.5, negative=0.5, at_least=0.3).shape == (0,)
    # A batch is each image for itself, whatever it is filled up with.
    parts = [crowd[:5], crowd[5:90], crowd[:0]]
    together = box_ops.match_batch(many[None], Padded.of(parts), positive=0.5, negative=0.4, at_least=0.3)
    for row, part in zip(together, parts, strict=True):
        assert torch.equal(row, box_ops.match(many, part, positive=0.5, negative=0.4, at_least=0.3))


def test_drawing_numbers():
    rows = torch.tensor([[-1] * 50 + [3] * 30 + [-2] * 20, [-1] * 98 + [0, -2], [-2] * 100, [5] * 100])
    draw = box_ops.draw(rows, 40, 0.25)
    positive, background = draw.valid[:, : draw.positives].sum(1), draw.valid[:, draw.positives :].sum(1)
    assert positive.tolist() == [10, 1, 0, 10] and background.tolist() == [30, 39, 0, 0]
    for row, index, valid in zip(rows, draw.index, draw.valid, strict=True):
        first, rest = index[: draw.positives][valid[: draw.positives]], index[draw.positives :][valid[draw.positives :]]
        assert (row[first] >= 0).all() and (row[rest] == -1).all()
        assert len(set(first.tolist())) == len(first) and len(set(rest.tolist())) == len(rest)
    # Valid ones come first; everything is drawn equally often.
    assert (draw.valid[:, 1 : draw.positives] <= draw.valid[:, : draw.positives - 1]).all()
    counts = torch.zeros(50)
    for seed in range(400):
        torch.manual_seed(seed)
        counts[box_ops.draw(rows[:1, :50], 10, 0.0).index[0]] += 1
    assert counts.min() > 45 and counts.max() < 120  # 80 on average, standard deviation 8


@pytest.mark.parametrize("iou", [0.1, 0.3, 0.45])
def test_suppression_at_once_is_the_greedy_one(iou: float):
    """What a GPU computes by repetition is what torchvision's loop gives, chains of overlaps included."""
    generator = torch.Generator().manual_seed(2)
    boxes = torch.stack([random_boxes(150, 60, generator) for _ in range(3)])
    chain = torch.arange(150.0)[:, None] * 2 + torch.tensor([0.0, 0, 10, 10])  # each overlaps the next few
    boxes = torch.cat([boxes, chain[None]])
    valid = torch.rand(4, 150, generator=generator) > 0.2
    one, other = box_ops._suppress_by_row(boxes, valid, iou), box_ops._suppress_at_once(boxes, valid, iou, rounds=3)
    assert torch.equal(one, other) and not (one & ~valid).any()
    assert 0 < one.sum() < valid.sum()


def test_pooling_is_torchvisions_for_whole_strides():
    generator = torch.Generator().manual_seed(0)
    strides = (4, 8, 16, 32)
    maps = [torch.randn(2, 3, 512 // s, 512 // s, generator=generator) for s in strides]
    boxes = [random_boxes(40, 450, generator), random_boxes(30, 60, generator)]
    boxes[0][0] = torch.tensor([0.0, 0, 512, 500])
    boxes = [torch.cat([b[:, :2], torch.maximum(b[:, 2:], b[:, :2] + 40)], dim=1) for b in boxes]
    levels = [box_ops.assign_levels(b, 4) for b in boxes]
    assert len(torch.cat(levels).unique()) == 4
    # torchvision's multi-level pooling does not align: its cells are read half a cell further right and down. It also
    # has no boxes smaller than a cell, hence the 40 pixels above.
    moved = [b - torch.tensor(strides)[level][:, None] / 2 for b, level in zip(boxes, levels, strict=True)]
    expected = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)(
        {str(i): m for i, m in enumerate(maps)}, moved, [(512, 512)] * 2
    )
    assert torch.allclose(box_ops.pool_levels(maps, strides, boxes, size=7, sampling=2), expected, atol=1e-4)


def test_pooling_with_fractional_strides_reads_coordinates():
    strides, size = (3.5, 7.0, 14.0, 28.0), 896
    maps = []
    for stride in strides:
        n = int(size / stride)
        centre = (torch.arange(n) + 0.5) * stride
        maps.append(torch.stack(torch.meshgrid(centre, centre, indexing="xy"))[None])  # channel 0: x, channel 1: y
    boxes = torch.tensor([[30.0, 50, 60, 90], [100, 100, 250, 300], [200, 60, 500, 420], [40, 40, 840, 840]])
    assert box_ops.assign_levels(boxes, 4, 49.0).tolist() == [0, 1, 2, 3]
    pooled = box_ops.pool_levels(maps, strides, [boxes], size=7, sampling=4, finest=49.0)
    x1, y1, x2, y2 = boxes.unbind(1)
    steps = (torch.arange(7) + 0.5) / 7
    assert torch.allclose(pooled[:, 0, 3], x1[:, None] + steps * (x2 - x1)[:, None], atol=1e-2)
    assert torch.allclose(pooled[:, 1, :, 2], y1[:, None] + steps * (y2 - y1)[:, None], atol=1e-2)


def test_level_of_a_224_pixel_box_is_stride_16():
    for side, level in [(55, 0), (57, 0), (113, 1), (225, 2), (449, 3), (1000, 3), (0, 0)]:
        box = torch.tensor([[0.0, 0, side, side]])
        assert box_ops.assign_levels(box, 4).item() == level
        assert box_ops.assign_levels(box * 14 / 16, 4, finest=49.0).item() == level


def test_classification_loss_closed_form():
    base = torch.tensor([True, False, True, False])
    logits = torch.randn(5, 5, dtype=torch.float32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([0, 2, 4, 4, 2])
    loss = classification_loss(logits, labels, base, 0.6)
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        kept = {c: row[c] for c in (0, 2, 4)}  # base classes and background
        nll = math.log(sum(math.exp(v) for v in kept.values())) - kept[label]
        total += nll * (0.6 if label == 4 else 1.0)
    assert loss.item() == pytest.approx(total / 5, rel=1e-5)
    loss.backward()
    assert (logits.grad[:, [1, 3]] == 0).all() and (logits.grad[:, [0, 2, 4]] != 0).all()
    assert torch.allclose(logits.grad.sum(1), torch.zeros(5), atol=1e-6)
    empty = classification_loss(logits[:0], labels[:0], base, 0.6)
    assert empty.item() == 0 and empty.requires_grad


def test_other_losses_closed_form():
    predicted, target = torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 0]]), torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, -1]])
    assert box_loss(predicted, target, 7).item() == pytest.approx(14 / 7)
    assert box_loss(predicted[:0], target[:0], 0).item() == 0
    logits, positive = torch.tensor([0.0, 2.0]), torch.tensor([True, False])
    assert objectness_loss(logits, positive, 2).item() == pytest.approx((math.log(2) + math.log(1 + math.e**2)) / 2)
    assert mask_loss(torch.zeros(3, 4, 4), torch.rand(3, 4, 4) > 0.5).item() == pytest.approx(math.log(2))


def test_fusion_closed_form():
    detector, vlm = torch.tensor([[0.5, 0.2], [0.0, 1.0]]), torch.tensor([[0.1, 0.9], [0.3, 0.0]])
    fused = fuse(detector, vlm, torch.tensor([True, False]), weight_base=0.1, weight_novel=0.8)
    expected = [[0.5**0.9 * 0.1**0.1, 0.2**0.2 * 0.9**0.8], [0.0, 0.0]]
    assert torch.allclose(fused, torch.tensor(expected))
    assert torch.equal(fuse(detector, vlm, torch.tensor([True, False]), weight_base=0.0, weight_novel=1.0)[0],
                       torch.tensor([0.5, 0.9]))  # fmt: skip
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]])  # background last: it competes and is not returned
    assert torch.allclose(class_probabilities(logits), torch.tensor([[1 / 8, 2 / 8]]))


def test_vlm_probabilities_closed_form():
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(4, 6, generator=generator), dim=1)
    cells = F.normalize(torch.randn(2, 6, 2, 2, generator=generator), dim=1)
    dense = cells.repeat_interleave(8, 2).repeat_interleave(8, 3)  # 16x16 map of four constant quarters
    boxes = [torch.tensor([[70.0, 8, 120, 50]]), torch.tensor([[8.0, 70, 56, 120], [70, 70, 120, 120]])]
    found = vlm_probabilities(dense, boxes, (128, 128), embeddings, 75.0)
    for row, (image, y, x) in zip(found, [(0, 0, 1), (1, 1, 0), (1, 1, 1)], strict=True):
        expected = (75 * embeddings @ cells[image, :, y, x]).softmax(0)[:3]
        assert torch.allclose(row, expected, atol=1e-5)


def test_selection():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]])
    scores = torch.tensor([[0.9, 0.01], [0.8, 0.7], [0.005, 0.3]])
    found = select_detections(boxes, scores, score=0.01, iou=0.5, most=10)
    assert found["labels"].tolist() == [0, 1, 1]  # the second box loses class 0 to the first, not class 1
    assert torch.allclose(found["scores"], torch.tensor([0.9, 0.7, 0.3]))
    assert torch.equal(found["boxes"], boxes[[0, 1, 2]])
    assert len(select_detections(boxes, scores, score=0.01, iou=0.5, most=2)["scores"]) == 2
    # Many candidates are looked at in portions; the answer is that of all at once.
    generator = torch.Generator().manual_seed(0)
    boxes = random_boxes(300, 40, generator)
    scores = torch.randperm(6000, generator=generator).reshape(300, 20) / 6000  # no ties
    for iou, most in [(0.5, 10), (0.05, 200), (0.5, 5000)]:
        found = select_detections(boxes, scores, score=0.2, iou=iou, most=most)
        row, label = (scores > 0.2).nonzero().unbind(1)
        best = batched_nms(boxes[row], scores[row, label], label, iou)[:most]
        assert torch.equal(found["scores"], scores[row, label][best]) and torch.equal(found["labels"], label[best])
        assert torch.equal(found["boxes"], boxes[row[best]])
    empty = select_detections(boxes[:0], scores[:0], score=0.0, iou=0.5, most=2)
    assert empty["boxes"].shape == (0, 4) and empty["labels"].shape == empty["scores"].shape == (0,)


def test_masks_are_cut_and_pasted_back():
    y, x = torch.meshgrid(torch.arange(200) + 0.5, torch.arange(240) + 0.5, indexing="ij")
    disc = (x - 120) ** 2 + (y - 90) ** 2 < 50**2
    box = torch.tensor([[64.3, 31.7, 181.2, 150.9], [70, 40, 170, 140]])
    cut = mask_targets(torch.stack([torch.zeros_like(disc), disc]), torch.tensor([1, 1]), box, 28)
    assert cut[1].float().mean().item() == pytest.approx(math.pi / 4, abs=0.02)
    pasted = paste_masks(cut.float(), box, (200, 240))
    for mask in pasted:
        assert (mask & disc).sum() / (mask | disc).sum() > 0.95
    # At twice the scale, and a box that leaves the image.
    large = paste_masks(cut.float(), box * 2, (400, 480))
    assert large[1].sum().item() == pytest.approx(4 * math.pi * 50**2, rel=0.03)
    full = paste_masks(torch.ones(2, 28, 28), torch.tensor([[-10.0, -10, 20, 30], [300, 300, 310, 310]]), (200, 240))
    assert full[0, :30, :20].all() and full[0].sum() == 600 and full[1].sum() == 0
    assert mask_targets(disc[None], torch.zeros(0, dtype=torch.long), box[:0], 28).shape == (0, 28, 28)


def test_run_lengths_are_cocos():
    rng = np.random.default_rng(0)
    masks = [rng.random((17, 23)) < share for share in (0.0, 1.0, 0.5, 0.02, 0.98, 0.3)]
    masks[3][:, 5:9] = True  # whole columns: runs that go on from one to the next
    which, edges = [], []
    for number, mask in enumerate(masks):
        flat = mask.T.ravel().astype(int)
        lines = np.pad(mask.T.astype(int), ((0, 0), (1, 1)))  # as the columns are looked at, one by one
        column, line = np.nonzero(np.diff(lines, axis=1))
        edges.append(column * 17 + line)
        which.append(np.full(len(edges[-1]), number))
        assert flat.sum() == mask.sum()
    texts = compress_runs(np.concatenate(which), np.concatenate(edges), len(masks), 17 * 23)
    expected = [coco_mask.encode(np.asfortranarray(m.astype(np.uint8)))["counts"].decode() for m in masks]
    assert texts == expected
    assert compress_runs(np.zeros(0, int), np.zeros(0, int), 2, 12) == compress_runs(
        np.zeros(0, int), np.zeros(0, int), 1, 12
    ) * 2 == ["<"] * 2  # fmt: skip


@pytest.mark.parametrize("repeat_edges", [False, True])
@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_pasting_is_bilinear_interpolation(repeat_edges: bool, threshold: float):
    """Against the formula at every pixel's centre, in float64."""
    generator = torch.Generator().manual_seed(0)
    cells, height, width = 7, 50, 61
    masks = torch.rand(12, cells, cells, generator=generator)
    boxes = random_boxes(12, 55, generator)
    boxes[0] = torch.tensor([-9.3, -4.2, 30.7, 22.1])
    boxes[1] = torch.tensor([10.0, 10.0, 24.0, 24.0])
    found = paste_masks(masks, boxes, (height, width), threshold, repeat_edges=repeat_edges)
    off = 0
    for mask, (x1, y1, x2, y2), one in zip(masks.double().numpy(), boxes.double().tolist(), found.numpy(), strict=True):
        across = (np.arange(width) + 0.5 - x1) / (x2 - x1) * cells - 0.5
        down = (np.arange(height) + 0.5 - y1) / (y2 - y1) * cells - 0.5
        weights, inside = [], []
        for place in (down, across):
            inside.append((place >= -0.5) & (place <= cells - 0.5) if repeat_edges else np.ones(len(place), bool))
            place = place.clip(0, cells - 1) if repeat_edges else place
            weights.append((1 - np.abs(place[:, None] - np.arange(cells))).clip(0))
        value = weights[0] @ mask @ weights[1].T
        sure = np.abs(value - threshold) > 1e-4
        wanted = (value >= threshold) & inside[0][:, None] & inside[1]
        off += int((one != wanted)[sure].sum())
    # A pixel whose centre lies on the box's own edge, up to rounding.
    assert off <= (2 if repeat_edges else 0) and found.any()
    assert paste_masks(masks[:0], boxes[:0], (height, width)).shape == (0, height, width)


def test_the_best_of_a_true_box_is_a_proposal_or_a_true_box():
    """Not the whole image, which stands in where an image has neither: it would be the best of one that fills it."""
    truth = torch.tensor([[0.0, 0, 72, 100], [0, 0, 100, 100]])
    proposal = torch.tensor([[0.0, 0, 84, 100]])
    samples = sample_rois(
        [proposal], [(100, 100)], [truth], [torch.tensor([5, 7])], background=9, number=8, positive_share=1.0, iou=0.5,
        low_quality=True,
    )  # fmt: skip
    found = {tuple(b): int(label) for b, label in zip(samples.boxes[0].tolist(), samples.labels, strict=True)}
    assert found[tuple(proposal[0].tolist())] == 7  # the best proposal of both: the last


def test_proposals_before_suppression_are_fewer_outside_of_training():
    rpn = RPN(4, (8,), convs=0, pre_nms=50, pre_nms_test=5, nms=1.0, post_nms=1000, padding=True)
    out = rpn([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))])
    numbers = [int(rpn.train(mode).propose(out, [(64, 64)])[0].valid.sum()) for mode in (True, False)]
    assert numbers[1] == 5 < numbers[0] <= 50
