"""The detector against numbers recorded from the published one: forward, losses, gradients, a step, detections."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from safetensors.torch import load_file
from torch import Tensor

from open_clip.factory import build_model
from open_clip.regions import roi_features
from open_clip.weights import load_weights
from ovdet.fvit.config import FViTConfig
from ovdet.fvit.detector import Detector, build_detector
from ovdet.fvit.fusion import vlm_probabilities
from ovdet.fvit.published import EMBEDDINGS, from_published, published_name
from ovdet.parts import boxes as box_ops
from ovdet.parts.boxes import Draw, Padded
from ovdet.parts.losses import classification_loss
from ovdet.parts.masks import encode_pasted, mask_targets, paste_masks
from ovdet.parts.rois import Samples, collect
from ovdet.parts.scores import class_probabilities, fuse
from ovdet.testing import to_original

LOSSES = {
    "loss_rpn_class": "loss_rpn_cls",
    "loss_rpn_box": "loss_rpn_bbox",
    "loss_class": "loss_cls",
    "loss_box": "loss_bbox",
    "loss_mask": "loss_mask",
}
Batch = tuple[Tensor, list[tuple[int, int]], list[dict[str, Tensor]]]


class Recorded:
    """One variant of the recording: its settings and arrays, and a detector with its weights."""

    def __init__(self, folder: Path, variant: str) -> None:
        self.folder, self.variant = folder, variant
        self.settings: dict[str, Any] = json.loads((folder / variant / "settings.json").read_text())

    @cached_property
    def state(self) -> dict[str, Tensor]:
        return load_file(str(self.folder / self.variant / "detector.safetensors"))

    def json(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / self.variant / f"{name}.json").read_text())

    def arrays(self, name: str) -> dict[str, Tensor]:
        with np.load(self.folder / self.variant / f"{name}.npz") as content:
            return {key: torch.from_numpy(content[key]) for key in content.files}

    def config(self, training: bool) -> FViTConfig:
        """The published config with the sizes of the recording."""
        s, config = self.settings, FViTConfig()
        train, test_rpn, test_rcnn = s["train_cfg"], s["test_cfg"]["rpn"], s["test_cfg"]["rcnn"]
        model, test, lvis = config.model, config.test, s["kind"] == "lvis"
        model.blocks, model.channels, model.rpn_norm, model.masks = s["blocks"][:3], s["channels"], lvis, lvis
        model.roi_low_quality = train["rcnn"]["assigner"]["match_low_quality"]
        sampler = train["rpn"]["sampler"]
        model.rpn_samples, model.rpn_positive_share = sampler["num"], sampler["pos_fraction"]
        sampler = train["rcnn"]["sampler"]
        model.roi_samples, model.roi_positive_share = sampler["num"], sampler["pos_fraction"]
        proposals = train["rpn_proposal"] if training else test_rpn
        model.rpn_pre_nms, model.rpn_post_nms = proposals["nms_pre"], proposals["max_per_img"]
        model.background_weight = s["class_weight"][-1]
        test.score, test.nms, test.per_image = (
            test_rcnn["score_thr"], test_rcnn["nms"]["iou_threshold"], test_rcnn["max_per_img"],
        )  # fmt: skip
        test.vlm_weight_base, test.vlm_weight_novel = s["alpha"], s["beta"]
        test.vlm_temperature, config.data.image_size = s["vlm_temperature"], s["size"]
        return config

    def detector(self, training: bool = False) -> Detector:
        clip = build_model(json.loads((self.folder / f"clip_{self.variant[-3:]}.json").read_text())).eval()
        load_weights(clip, self.folder / f"clip_{self.variant[-3:]}.safetensors")
        base = torch.tensor([name not in self.settings["novel"] for name in self.settings["classes"]])
        detector = build_detector(self.config(training), clip, self.state[EMBEDDINGS].T, base)
        detector.load_trainable_state_dict(from_published(self.state, detector.trainable_state_dict()))
        return detector.train(training)

    def batch(self, empty: tuple[int, ...] = ()) -> Batch:
        """(images, valid sizes, targets) of the two recorded images; those in ``empty`` without their objects."""
        inputs, targets = self.arrays("inputs"), []
        for i in range(2):
            few = slice(0) if i in empty else slice(None)
            target = {"boxes": inputs[f"truth_boxes_{i}"], "labels": inputs[f"truth_labels_{i}"]}
            target["masks"] = unpack(inputs[f"truth_masks_{i}"], self.settings["size"])
            targets.append({key: value[few] for key, value in target.items()})
        return inputs["images"].float(), [tuple(v) for v in inputs["valid"].tolist()], targets


@pytest.fixture
def recorded(variant: str, golden: Path) -> Recorded:
    return Recorded(golden / "fvit", variant)


variants = pytest.mark.recorded("fvit", r"\w+_p\d+", argument="variant")


def unpack(bits: Tensor, width: int) -> Tensor:
    """Bool masks of arrays stored as bits along the last axis."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1)[..., :width].astype(bool))


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Largest difference at most ``tolerance`` of the values' scale (at least 1)."""
    assert found.shape == wanted.shape
    if wanted.numel():
        limit = tolerance * max(float(wanted.abs().max()), 1.0)
        assert float((found.detach().float() - wanted.float()).abs().max()) <= limit


def by_anchor(arrays: dict[str, Tensor], name: str, values: int) -> Tensor:
    """Levels of MMDetection's channel order as ``[B, N, values]``."""
    levels = [arrays[f"{name}_{i}"].permute(0, 2, 3, 1) for i in range(5)]
    return torch.cat([level.reshape(len(level), -1, values) for level in levels], 1)


@variants
@torch.no_grad()
def test_forward_pieces(recorded: Recorded):
    detector, wanted = recorded.detector(), recorded.arrays("eval")
    images, sizes, _ = recorded.batch()
    vit = detector.backbone(images, dense=True)
    for i, level in enumerate(vit.levels):
        close(level, wanted[f"tap_{i}"])
    close(vit.dense, wanted["dense"])
    for i, level in enumerate(detector.neck.levels(vit.levels)):
        close(level[:1, ::4] if i < 2 else level, wanted[f"level_{i}"])
    maps = detector.neck(vit.levels)
    for i, level in enumerate(maps):
        close(level, wanted[f"fpn_{i}"])
    out = detector.rpn(maps)
    close(out.logits[..., None], by_anchor(wanted, "rpn_cls", 1))
    close(out.offsets, by_anchor(wanted, "rpn_reg", 4))
    close(out.anchors, torch.cat([wanted[f"anchors_{i}"] for i in range(5)]), 1e-6)
    for i, found in enumerate(detector.rpn.proposals(out, sizes)):
        close(found["boxes"], wanted[f"proposals_{i}"][:, :4])
        close(found["scores"], wanted[f"proposals_{i}"][:, 4])


@variants
@torch.no_grad()
def test_fixed_rois(recorded: Recorded):
    detector, wanted, inputs = recorded.detector(), recorded.arrays("eval"), recorded.arrays("inputs")
    sizes, embeddings, settings = recorded.batch()[1], detector.class_embeddings, recorded.settings
    maps, rois = [wanted[f"fpn_{i}"] for i in range(4)], [inputs["rois_0"], inputs["rois_1"]]
    head = detector.box_head
    assert torch.equal(box_ops.assign_levels(torch.cat(rois), 4, head.finest), wanted["roi_levels"])
    close(box_ops.pool_levels(maps, head.strides, rois, size=7, finest=head.finest), wanted["roi_features"])
    found, offsets = head(maps, rois)
    logits = detector.classifier(found, embeddings)
    close(logits, wanted["roi_logits"])
    close(offsets, wanted["roi_deltas"])
    close(torch.cat(head.refine(offsets, rois, sizes)), wanted["roi_boxes"])
    size = settings["size"]
    close(roi_features(wanted["dense"], [r / size for r in rois]), wanted["roi_vlm_features"])
    vlm = vlm_probabilities(wanted["dense"], rois, (size, size), embeddings, settings["vlm_temperature"])
    close(vlm, wanted["roi_vlm_probabilities"][:, :-1])
    fused = fuse(
        class_probabilities(logits), vlm, detector.base_mask, weight_base=settings["alpha"],
        weight_novel=settings["beta"],
    )  # fmt: skip
    close(fused, wanted["roi_fused"][:, :-1])
    if detector.mask_head is not None:
        count = len(wanted["roi_mask_logits"])
        close(detector.mask_head(maps, [rois[0][:count], rois[1][:0]]), wanted["roi_mask_logits"])


@variants
@torch.no_grad()
def test_detections_and_masks_in_order(recorded: Recorded):
    detector, wanted, inputs = recorded.detector(), recorded.arrays("eval"), recorded.arrays("inputs")
    images, sizes, _ = recorded.batch()
    for i, found in enumerate(detector(images, sizes)):
        original = tuple(inputs["original"][i].tolist())
        for rescaled, one in ((0, found), (1, to_original(found, sizes[i], original))):
            rows = wanted[f"detections_{i}_rescale{rescaled}"]
            assert torch.equal(one["labels"], wanted[f"detection_labels_{i}_rescale{rescaled}"])
            close(one["boxes"], rows[:, :4])
            close(one["scores"], rows[:, 4], 5e-5)  # temperatures enlarge the noise of float32
        if i == 0:  # the whole test call answers class by class
            rows = wanted["whole_test_rows_of_image_0"]
            order = one["labels"].argsort(stable=True)
            close(torch.cat([one["boxes"], one["scores"][:, None]], 1)[order], rows[:, :5], 5e-5)
            assert torch.equal(one["labels"][order].float(), rows[:, 5])
        if detector.mask_head is not None:
            if i == 0:
                count = len(wanted["mask_logits"])
                boxes = [wanted["detections_0_rescale0"][:count, :4], torch.zeros(0, 4)]
                close(detector.mask_head([wanted[f"fpn_{level}"] for level in range(4)], boxes), wanted["mask_logits"])
            expected = unpack(wanted[f"pasted_{i}"], original[1])
            boxes = wanted[f"detections_{i}_rescale1"][: len(expected), :4]
            pasted = paste_masks(found["masks"][: len(expected)], boxes, original)
            assert torch.equal(pasted, expected)
            runs = encode_pasted(found["masks"][: len(expected)], boxes, original)
            assert np.array_equal(coco_mask.decode(runs).transpose(2, 0, 1).astype(bool), expected.numpy())


@variants
def test_training_step(recorded: Recorded):
    """Losses, gradients, one step of the optimizer and running statistics."""
    detector, wanted, numbers = recorded.detector(training=True), recorded.arrays("train"), recorded.json("train")
    settings = recorded.settings
    losses = detector(*recorded.batch())
    expected = {name: numbers["losses"][theirs] for name, theirs in LOSSES.items() if theirs in numbers["losses"]}
    expected = {name: sum(value) if isinstance(value, list) else value for name, value in expected.items()}
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-5)

    sum(losses.values()).backward()
    named = {published_name(name): p for name, p in detector.named_parameters() if p.requires_grad}
    unused = set(numbers["no_gradient"])
    assert set(named) == {name for name, asks in settings["requires_grad"].items() if asks} - unused
    # The record is float32: the same formulas in float64 differ from it by up to 3.3e-3 in a norm, 4e-4 in the total.
    norms = {name: p.grad.norm().item() for name, p in named.items()}
    assert norms == pytest.approx({name: numbers["grad_norms"][name] for name in named}, rel=3e-3, abs=1e-5)
    total = torch.nn.utils.clip_grad_norm_(named.values(), settings["optimizer_config"]["grad_clip"]["max_norm"])
    assert total.item() == pytest.approx(numbers["grad_norm_total"], rel=5e-4)

    values = settings["optimizer"]
    group = numbers["optimizer_groups"][0]
    optimizer = torch.optim.AdamW(
        named.values(), lr=values["lr"], betas=tuple(values["betas"]), eps=group["eps"],
        weight_decay=values["weight_decay"],
    )  # fmt: skip
    clipped = {name: p.grad.clone() for name, p in named.items()}
    optimizer.step()
    compared = 0
    for name, p in named.items():
        key = name if f"step.{name}" in wanted else f"{name}[:256]"
        gradient, after = wanted[f"grad_clipped.{key}"], wanted[f"step.{key}"]
        own, mine = clipped[name].flatten()[: gradient.numel()], p.detach().flatten()[: gradient.numel()]
        assert float((own - gradient.flatten()).abs().max()) <= 1e-2 * float(gradient.abs().max()) + 1e-7
        steady = gradient.flatten().abs() > 1e-5  # Adam's first step blows smaller ones, which are noise, up
        compared += int(steady.sum())
        close(mine[steady], after.flatten()[steady], 1e-6)
    assert compared
    state = detector.trainable_state_dict()
    statistics = [name for name in state if "running" in name]
    assert statistics
    for name in statistics:
        close(state[name], wanted[f"after.{published_name(name)}"])


@variants
@pytest.mark.parametrize(("empty", "key"), [((1,), "losses_second_image_empty"), ((0, 1), "losses_both_images_empty")])
def test_images_without_objects(recorded: Recorded, empty: tuple[int, ...], key: str):
    numbers = recorded.json("train")[key]
    losses = recorded.detector(training=True)(*recorded.batch(empty))
    for name, value in losses.items():
        theirs = numbers[LOSSES[name]]
        theirs = sum(theirs) if isinstance(theirs, list) else theirs
        assert value.item() == pytest.approx(theirs, rel=1e-5, abs=1e-7), name


@variants
def test_what_enters_the_losses(recorded: Recorded):
    """Assignment of all anchors, RoIs and their true boxes, targets of boxes and masks, and each loss alone."""
    detector, wanted = recorded.detector(training=True), recorded.arrays("train")
    images, sizes, targets = recorded.batch()
    maps = detector.neck(detector.backbone(images, dense=False).levels)
    out = detector.rpn(maps)
    close(out.logits[:1, :, None], by_anchor(wanted, "rpn_cls", 1))
    truth = Padded.of([t["boxes"] for t in targets])
    draw, matches = detector.rpn.sample(out, sizes, truth)
    labels = torch.cat([wanted[f"rpn_labels_{i}"] for i in range(5)], 1)
    weights = torch.cat([wanted[f"rpn_label_weights_{i}"] for i in range(5)], 1)
    assert torch.equal(matches >= 0, (labels == 0) & (weights == 1))
    assert torch.equal(matches == box_ops.IGNORED, weights == 0)
    positive = wanted["rpn_positive"]
    assert torch.equal((matches >= 0).nonzero(), positive)
    boxes = truth.boxes[positive[:, 0], matches[matches >= 0]]
    close(box_ops.encode_boxes(boxes, out.anchors[positive[:, 1]], (1, 1, 1, 1)), wanted["rpn_positive_targets"])

    background = len(detector.base_mask)
    predicted, labels = wanted["bbox_pred"], wanted["labels"].long()
    counts = [len(wanted[f"roi_boxes_{i}"]) for i in range(2)]
    samples = Samples(
        [wanted[f"roi_boxes_{i}"] for i in range(2)], labels, [wanted[f"roi_positive_truth_{i}"] for i in range(2)]
    )
    loss = classification_loss(wanted["cls_score"], labels, detector.base_mask, detector.config.background_weight)
    numbers = recorded.json("train")["losses"]
    assert loss.item() == pytest.approx(numbers["loss_cls"], rel=1e-5)
    loss = detector.box_head.box_loss(predicted, samples, [t["boxes"] for t in targets])
    assert loss.item() == pytest.approx(numbers["loss_bbox"], rel=1e-5)
    for i, (one, which) in enumerate(zip(labels.split(counts), samples.positives, strict=True)):
        assert torch.equal(one[: len(which)], targets[i]["labels"][which])
        assert (one[len(which) :] == background).all()
        own = wanted[f"roi_is_truth_{i}"].bool()
        close(samples.boxes[i][: len(which)][own], targets[i]["boxes"][which[own]])
    if "mask_targets" in wanted:
        side = 2 * detector.config.mask_size
        cut = [mask_targets(t["masks"], which, boxes[: len(which)], side)
               for t, which, boxes in zip(targets, samples.positives, samples.boxes, strict=True)]  # fmt: skip
        assert torch.equal(torch.cat(cut), unpack(wanted["mask_targets"], side))


@variants
def test_published_sampling(recorded: Recorded):
    """The losses with the anchors and RoIs that the published code drew."""
    detector = recorded.detector(training=True)
    detector.rpn.post_nms = 1000
    images, sizes, targets = recorded.batch()
    wanted, numbers = recorded.arrays("pieces"), recorded.json("train")["sampled_losses"]
    maps = detector.neck(detector.backbone(images, dense=False).levels)
    out = detector.rpn(maps)
    own = Padded.of([t["boxes"] for t in targets])
    proposals, scores = detector.rpn.propose(out, sizes)
    for i, boxes in enumerate(proposals.unpad()):
        theirs = wanted[f"proposals_{i}"]
        close(scores[i, : len(boxes)], theirs[:, 4])
        # Of two scores that differ in their last digit, either may come first. Where the network means a box far larger
        # than the image, rounding grows with it: the record is 1.6e-3 pixels off the same formulas in float64.
        apart, near = torch.cdist(boxes, theirs[:, :4], p=torch.inf), 3e-3
        assert apart.amin(0).max() <= near and apart.amin(1).max() <= near
        assert (apart.diagonal() > near).sum() <= 2

    def drawn(kind: str) -> Draw:
        parts = ("positive", "background")
        positive, rest = ([wanted[f"{kind}_sampled_{part}_{i}"] for i in range(2)] for part in parts)
        width = [max(map(len, part)) for part in (positive, rest)]
        index = torch.zeros(2, sum(width), dtype=torch.int64)
        valid = torch.zeros(2, sum(width), dtype=torch.bool)
        for i in range(2):
            for start, values in ((0, positive[i]), (width[0], rest[i])):
                index[i, start : start + len(values)], valid[i, start : start + len(values)] = values, True
        return Draw(index, valid, width[0])

    _, matches = detector.rpn.sample(out, sizes, own)
    found = detector.rpn.losses_of(out, drawn("rpn"), matches, own)
    expected = [sum(numbers[f"loss_rpn_{k}"]) for k in ("cls", "bbox")]
    assert [v.item() for v in found] == pytest.approx(expected, rel=1e-5)

    rois, assigned = [], []
    for boxes, target in zip(proposals.unpad(), targets, strict=True):
        at_least = 0.5 if detector.config.roi_low_quality else None
        matched = box_ops.match(boxes, target["boxes"], positive=0.5, negative=0.5, at_least=at_least)
        rois.append(torch.cat([target["boxes"], boxes]))
        assigned.append(torch.cat([torch.arange(len(target["boxes"])), matched]))
    padded = Padded.of(rois)
    table = torch.full(padded.valid.shape, box_ops.IGNORED)
    for row, values in zip(table, assigned, strict=True):
        row[: len(values)] = values
    samples = collect(padded.boxes, table, drawn("roi"), [t["labels"] for t in targets], len(detector.base_mask))
    embeddings, offsets = detector.box_head(maps[:4], samples.boxes)
    logits = detector.classifier(embeddings, detector.class_embeddings)
    loss = classification_loss(logits, samples.labels, detector.base_mask, detector.config.background_weight)
    assert loss.item() == pytest.approx(numbers["loss_cls"], rel=1e-5)
    loss = detector.box_head.box_loss(offsets, samples, [t["boxes"] for t in targets])
    assert loss.item() == pytest.approx(numbers["loss_bbox"], rel=1e-5)


@variants
@torch.no_grad()
def test_head_in_train_mode_and_box_coding(recorded: Recorded):
    detector, wanted = recorded.detector(training=True), recorded.arrays("pieces")
    inputs = recorded.arrays("inputs")
    maps = detector.neck(detector.backbone(recorded.batch()[0], dense=False).levels)[:4]
    found, offsets = detector.box_head(maps, [inputs["rois_0"], inputs["rois_1"]])
    close(box_ops.pool_levels(maps, detector.box_head.strides, [inputs["rois_0"][:6], inputs["rois_1"][:0]], size=7),
          wanted["roi_features"])  # fmt: skip
    logits = detector.classifier(found, detector.class_embeddings)
    close(logits, wanted["roi_logits"])
    close(offsets, wanted["roi_deltas"])
    loss = classification_loss(logits, wanted["labels"], detector.base_mask, detector.config.background_weight)
    assert loss.item() == pytest.approx(wanted["loss_cls"].item(), rel=1e-5)
    boxes, size = wanted["coder_boxes"], recorded.batch()[1][0]
    for kind, weights, factor in (("rpn", (1, 1, 1, 1), 1), ("box", (10, 10, 5, 5), 5)):
        decoded = box_ops.decode_boxes(wanted["coder_deltas"] * factor, boxes, weights)
        close(decoded, wanted[f"coder_{kind}_decoded_unclipped"])
        close(box_ops.clip_to(decoded, size), wanted[f"coder_{kind}_decoded"])
        close(box_ops.encode_boxes(boxes.flip(0), boxes, weights), wanted[f"coder_{kind}_encoded"])


def test_assignment_of_crowded_boxes(golden: Path):
    file = golden / "fvit" / "assign.npz"
    if not file.is_file():
        pytest.skip("recorded numbers of the detector are not there: set CLIPSELF_GOLDEN")
    with np.load(file) as content:
        arrays = {key: torch.from_numpy(content[key]) for key in content.files}
    for name, positive, negative, at_least in (("rpn", 0.7, 0.3, 0.3), ("roi_coco", 0.5, 0.5, None),
                                               ("roi_lvis", 0.5, 0.5, 0.5)):  # fmt: skip
        found = box_ops.match(
            arrays["boxes"], arrays["truth"], positive=positive, negative=negative, at_least=at_least
        )
        theirs = arrays[name]  # 0 background, -1 ignored, i + 1 a true box
        assert torch.equal(found, torch.where(theirs > 0, theirs - 1, torch.where(theirs == 0, -1, -2)))
