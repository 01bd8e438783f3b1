"""Boxes, assignment, losses and decoding against numbers recorded from the reference, and against closed forms."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou, sigmoid_focal_loss

from ovdet.glip import boxes as ops
from ovdet.glip.assign import assign
from ovdet.glip.decode import Selection, class_scores, select_detections
from ovdet.glip.head import HeadOutput
from ovdet.glip.losses import GroundTruth, assign_targets, focal_loss, giou_loss, glip_losses, token_loss

LEVELS = 5
STRIDES = (8, 16, 32, 64, 128)


def head_output(content: dict[str, Tensor]) -> HeadOutput:
    """The recorded ``dot``, ``reg`` and ``ctr`` of all levels as one output, in a graph."""
    flat = {
        name: torch.cat([content[f"{name}{i}"].flatten(2).transpose(1, 2) for i in range(LEVELS)], dim=1)
        for name in ("reg", "ctr")
    }
    tokens = torch.cat([content[f"dot{i}"] for i in range(LEVELS)], dim=1)
    grids = [tuple(g) for g in content["grids"].tolist()]
    tensors = (tokens, flat["reg"], flat["ctr"][..., 0])
    return HeadOutput(*(t.clone().requires_grad_() for t in tensors), grids)


def test_box_arithmetic_matches_the_recorded_one(arrays: Callable):
    content = arrays("boxes.npz")
    anchors, truth = content["anchors"], content["gts"]
    close = {"rtol": 1e-5, "atol": 1e-4}
    assert torch.allclose(ops.encode(truth, anchors), content["encoded"], **close)
    assert torch.allclose(ops.decode(content["encoded"], anchors), content["decoded_back"], **close)
    assert torch.allclose(ops.decode(content["pred"], anchors), content["decoded"], **close)
    assert torch.allclose(ops.box_iou(anchors, truth), content["iou"], rtol=0, atol=1e-6)
    assert torch.allclose(ops.area(anchors), content["area"], rtol=1e-6, atol=0)
    # Sizes of the image are not recorded: a box and its mirror image add up to the width, and sides grow by the ratio.
    width = round(float(content["flipped"][0, 0] + anchors[0, 2])) + 1
    assert torch.allclose(ops.mirror(anchors, width), content["flipped"], **close)
    far = anchors.abs().argmax(0)
    ratio = [float(content["resized"][far[i], i] / anchors[far[i], i]) for i in (0, 1)]
    height = round(float(content["clip_out"][:, 1::2].max())) + 1  # one of the boxes reached below
    size, other = (height, width), (height * ratio[1], width * ratio[0])
    assert torch.allclose(ops.rescale(anchors, size, other), content["resized"], **close)
    corner, far = ops.to_exclusive(anchors).split(2, dim=1)
    assert torch.allclose(torch.cat([corner, far - corner], dim=1), content["xywh"], **close)
    assert torch.equal(ops.clip(content["clip_in"], size), content["clip_out"])
    grids = content["anchors/grids"].tolist()
    for i, (grid, stride) in enumerate(zip(grids, STRIDES, strict=True)):
        assert torch.equal(ops.level_anchors(tuple(grid), stride), content[f"anchors/level{i}"])
        assert torch.equal(torch.tensor([ops.cell_anchor(stride)]), content[f"anchors/cell{i}"])


def test_anchors_boxes_and_their_ends():
    assert ops.cell_anchor(8) == (-28, -28, 35, 35) and ops.cell_anchor(128) == (-448, -448, 575, 575)
    grids = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
    anchors = ops.make_anchors(grids, STRIDES)
    assert [h * w for h, w in grids] == [16800, 4200, 1050, 273, 77] and len(anchors) == 22400
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 90, (20, 2, 2), generator=generator).float()
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    # A box of whole pixels is the ordinary one that ends a pixel later.
    outside = ops.to_exclusive(boxes)
    assert torch.allclose(ops.box_iou(boxes, boxes), box_iou(outside, outside), atol=1e-6)
    assert torch.equal(ops.to_inclusive(outside), boxes)
    assert torch.allclose(ops.decode(ops.encode(boxes, anchors[:20]), anchors[:20]), boxes, atol=1e-3)
    box = torch.tensor([[10.0, 20, 50, 40]])
    points = torch.tensor([[30.0, 30], [20, 30], [20, 25]])
    # The centre; a quarter of the width from the left: 1/3; and a quarter of the height from above as well.
    wanted = torch.tensor([1.0, (1 / 3) ** 0.5, 1 / 3])
    assert torch.allclose(ops.centerness(points, box.expand(3, 4)), wanted)


@pytest.mark.parametrize("name", ["loss.npz", "loss_full_text.npz"])
def test_assignment_and_losses_match_the_recorded_ones(arrays: Callable, name: str):
    content = arrays(name)
    out, mask = head_output(content), content["mask"].bool()
    anchors = ops.make_anchors(out.grids, STRIDES)
    counts = [h * w for h, w in out.grids]
    truths, start = [], 0
    for i in range(len(mask)):
        boxes = content[f"gt{i}"]
        truths.append(GroundTruth(boxes, content["positive_map"][start : start + len(boxes)] > 0))
        start += len(boxes)
        target = assign_targets(anchors, counts, truths[-1], no_object=True)
        positive = target.box >= 0
        # The recorded labels are classes of the boxes; 0 is background.
        labels = torch.where(positive, content[f"labels{i}"][target.box.clamp(min=0)], 0)
        assert torch.equal(labels, content[f"assigned{i}"])
        assert torch.equal(target.tokens.to(torch.uint8), content[f"token_label{i}"])
        encoded = ops.encode(boxes[target.box[positive]], anchors[positive])
        assert torch.allclose(encoded, content[f"reg_target{i}"][positive], rtol=1e-5, atol=1e-5)
        central = ops.centerness(
            (anchors[positive][:, :2] + anchors[positive][:, 2:]) / 2, ops.decode(encoded, anchors[positive])
        )
        assert torch.allclose(central, content[f"centerness{i}"], rtol=1e-5, atol=1e-6)
    losses = glip_losses(out, mask, anchors, truths, no_object=True)
    recorded = {"loss_token": "loss_dot", "loss_box": "loss_reg", "loss_centerness": "loss_centerness"}
    for key, wanted in recorded.items():
        assert losses[key].item() == pytest.approx(content[wanted].item(), rel=2e-6)
    sum(losses.values()).backward()
    for i, (h, w) in enumerate(out.grids):
        part = slice(sum(counts[:i]), sum(counts[: i + 1]))
        gradients = {
            "dot": out.tokens.grad[:, part],
            "reg": out.boxes.grad[:, part].transpose(1, 2).unflatten(2, (h, w)),
            "ctr": out.centerness.grad[:, None, part].unflatten(2, (h, w)),
        }
        for key, gradient in gradients.items():
            assert torch.allclose(gradient, content[f"grad_{key}{i}"], rtol=1e-4, atol=1e-6)


def test_focal_loss_matches_the_recorded_one(arrays: Callable):
    content = arrays("focal.npz")
    logits, targets, mask = content["logits"], content["targets"], content["mask"].bool()
    each = focal_loss(logits, targets)
    kept = each[mask[:, None].expand_as(each)]
    assert torch.allclose(kept, content["per_element"], rtol=1e-5, atol=1e-6)
    assert token_loss(logits, targets, mask).item() == pytest.approx(content["total"].item(), rel=1e-6)
    everything = torch.ones_like(mask)
    assert token_loss(logits, targets, everything).item() == pytest.approx(content["total_no_mask"].item(), rel=1e-6)
    classes = content["sigmoid/logits"].shape[1]
    onehot = torch.nn.functional.one_hot(content["sigmoid/labels"], classes + 1)[:, 1:].float()
    each = focal_loss(content["sigmoid/logits"], onehot)
    assert torch.allclose(each, content["sigmoid/per_element"], rtol=1e-5, atol=1e-6)


def test_losses_are_torchvisions():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(3, 5, generator=generator), torch.rand(3, 5, generator=generator).round()
    assert torch.allclose(focal_loss(logits, targets), sigmoid_focal_loss(logits, targets), atol=1e-6)
    corners = torch.rand(2, 30, 2, 2, generator=generator) * 100
    first, second = (torch.cat([c.amin(1), c.amax(1) + 1], dim=1) for c in corners)
    assert torch.allclose(giou_loss(first, second), 1 - generalized_box_iou(first, second).diagonal(), atol=1e-5)


def test_images_without_boxes_have_nothing_but_background():
    """A mixed batch, and one without any box: finite losses, a gradient for every output."""
    grids = [(4, 6), (2, 3), (1, 2), (1, 1), (1, 1)]
    anchors, cells = ops.make_anchors(grids, STRIDES), sum(h * w for h, w in grids)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    empty = GroundTruth(torch.zeros(0, 4), torch.zeros(0, 3, dtype=torch.bool))
    full = GroundTruth(torch.tensor([[2.0, 2, 30, 20]]), torch.tensor([[False, True, False]]))
    for truths in ([empty, full], [empty, empty]):
        out = HeadOutput(*(torch.zeros(2, cells, *s).requires_grad_() for s in ((3,), (4,), ())), grids)
        losses = glip_losses(out, mask, anchors, truths, no_object=False)
        total = sum(losses.values())
        total.backward()
        assert total.isfinite() and all(t.grad is not None and t.grad.isfinite().all() for t in out[:3])
        # Image 0 is background: at p = 1/2 each of its unmasked tokens costs 0.75 / 4 log 2.
        assert out.tokens.grad[0, :, 2].abs().max() == 0 and out.tokens.grad[0, :, :2].min() > 0
    assert losses["loss_box"] == 0 and losses["loss_centerness"] == 0
    assert losses["loss_token"].item() == pytest.approx(cells * 5 * 0.75 * 0.25 * math.log(2), rel=1e-5)
    assert assign(anchors, [h * w for h, w in grids], torch.zeros(0, 4)).eq(-1).all()


def test_class_scores_match_the_recorded_ones(arrays: Callable, glip_golden: Path):
    content = arrays("post.npz")
    tokens = label_tokens(glip_golden)
    probabilities = content["agg/probs"]
    for name in ("mean", "max", "onehot"):
        assert torch.allclose(class_scores(probabilities, tokens, name), content[f"agg/{name}"], rtol=1e-6, atol=1e-7)
    # The second form counts its columns from the labels and leaves further columns at 0.
    for name, key in (("mean", "agg/v2_mean"), ("power", "agg/power")):
        wanted = content[key]
        padded = [*tokens, *[[]] * (wanted.shape[-1] - len(tokens))]
        assert torch.allclose(class_scores(probabilities, padded, name), wanted, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="mean, max, onehot"):
        class_scores(probabilities, tokens, "median")


def label_tokens(folder: Path) -> list[list[int]]:
    """The recorded map from labels 1, 2, ... to tokens, as a list."""
    content = json.loads((folder / "post_map.json").read_text())
    return [content[key] for key in sorted(content, key=int)]


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("mean", {}),
        ("max", {"aggregation": "max"}),
        ("mean_topn", None),
        ("v2_mean", {}),
    ],
)
def test_detections_match_the_recorded_ones(arrays: Callable, glip_golden: Path, key: str, options: dict | None):
    content, tokens = arrays("post.npz"), label_tokens(glip_golden)
    out = head_output(content)
    sizes = [(h, w) for w, h in content["image_sizes"].tolist()]
    anchors = ops.make_anchors(out.grids, STRIDES)
    if options is None:  # how many of a level came this far is not recorded; of an image, no more than there are
        most = max(len(content[f"{key}/scores{i}"]) for i in range(len(sizes)))
        candidates = [{"per_level": n, "per_image": most} for n in range(most, 101)]
    else:
        candidates = [options]
    wrong = []
    for option in candidates:
        found = select_detections(out, anchors, tokens, sizes, Selection(**option))
        try:
            for i, result in enumerate(found):
                same_detections(result, {k: content[f"{key}/{k}{i}"] for k in ("boxes", "scores", "labels")})
        except AssertionError as error:
            wrong.append(error)
    assert len(wrong) < len(candidates), wrong


def same_detections(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal detections; those of equal score may stand in any order."""
    assert len(found["scores"]) == len(wanted["scores"])
    assert torch.allclose(found["scores"], wanted["scores"], rtol=0, atol=1e-6)
    ours = torch.cat([found["labels"][:, None] + 1.0, found["scores"][:, None], found["boxes"]], dim=1)
    theirs = torch.cat([wanted["labels"][:, None].float(), wanted["scores"][:, None], wanted["boxes"]], dim=1)
    distance = (ours[:, None] - theirs).abs().amax(-1)
    assert distance.amin(0).max() < 2e-3 and distance.amin(1).max() < 2e-3
