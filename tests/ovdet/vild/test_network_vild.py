"""The network: sizes, what trains, what each variant learns from and how it scores."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovdet import task
from ovdet.parts.scores import class_probabilities, fuse
from ovdet.sections import DataConfig, TrainConfig
from ovdet.task import DetectionTask
from ovdet.vild.assemble import build_detector
from ovdet.vild.backbone import Trunk, load_trunk
from ovdet.vild.config import VARIANTS, VildConfig
from ovdet.vild.detector import Detector
from ovdet.vild.scores import cosine_logits, plain_probabilities, with_background
from training.engine.distributed import Dist
from training.engine.errors import UserError

WIDTH, CLASSES, SIDE = 24, 5, 96
BASE = torch.tensor([True, True, False, True, False])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(variant: str = "ensemble", **model: object) -> Detector:
    config = VildConfig()
    settings = {
        "variant": variant, "trunk": "test_resnet", "trunk_weights": "random", "channels": 16, "rpn_convs": 1,
        "box_convs": 1, "box_fcs": 1, "box_width": 32, "mask_convs": 1, "rpn_pre_nms": 100, "rpn_post_nms": 20,
        "rpn_samples": 32, "roi_samples": 16, **model,
    }  # fmt: skip
    for name, value in settings.items():
        setattr(config.model, name, value)
    config.test.score = 0.0
    detector = build_detector(config, CLASSES if variant == "supervised" else WIDTH)
    table = None if variant == "supervised" else torch.randn(CLASSES, WIDTH, generator=generator(1))
    detector.set_vocabulary(table, BASE)
    return detector


def batch(*, distil: bool = True, objects: bool = True) -> tuple[Tensor, list[tuple[int, int]], list[dict]]:
    """Two images, of which the second has no object and nothing to distil."""
    images = torch.randn(2, 3, SIDE, SIDE, generator=generator(0))
    boxes = torch.tensor([[8.0, 8, 50, 60], [30, 40, 90, 88]]) if objects else torch.zeros(0, 4)
    masks = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.bool)
    masks[:, 20:60, 20:60] = True
    first = {"boxes": boxes, "labels": torch.tensor([0, 3])[: len(boxes)], "masks": masks}
    second = {"boxes": boxes[:0], "labels": first["labels"][:0], "masks": masks[:0]}
    if distil:
        first["distil_boxes"] = torch.tensor([[4.0, 4, 40, 40], [50, 50, 90, 90], [0, 0, 96, 96]])
        first["distil_targets"] = F.normalize(torch.randn(3, WIDTH, generator=generator(2)), dim=-1).half()
        second["distil_boxes"], second["distil_targets"] = torch.zeros(0, 4), torch.zeros(0, WIDTH).half()
    return images, [(SIDE, SIDE), (SIDE, 80)], [first, second]


def test_sizes_are_the_published_ones():
    config = VildConfig()
    config.model.trunk_weights = "random"
    detector = build_detector(config, 512)
    millions = {n: sum(p.numel() for p in m.parameters()) / 1e6 for n, m in detector.named_children()}
    assert millions["backbone"] + millions["fpn"] == pytest.approx(26.9, abs=0.05)
    assert millions["image_head"] == pytest.approx(16.8, abs=0.05)
    assert detector.backbone.widths == [256, 512, 1024, 2048]
    assert detector.rpn.strides == (4, 8, 16, 32, 64) and detector.rpn.anchor_scale * 4 == 32


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("given", ["everything", "nothing"])
def test_every_parameter_has_a_gradient_in_every_step(variant, given):
    """Also without objects and without anything to distil: processes must not wait for each other."""
    detector = tiny(variant)
    everything = given == "everything"
    torch.manual_seed(0)
    losses = detector(*batch(distil=everything, objects=everything))
    learns_text, distils = VARIANTS[variant]
    expected = {"loss_rpn_class", "loss_rpn_box", "loss_box", "loss_mask"}
    expected |= {"loss_class"} if learns_text else set()
    expected |= {"loss_image"} if distils else set()
    assert set(losses) == expected
    assert all(loss.isfinite() for loss in losses.values())
    if distils:
        assert (losses["loss_image"] > 0) == everything
    sum(losses.values()).backward()
    assert not [name for name, p in detector.named_parameters() if p.grad is None]
    assert all(p.grad.isfinite().all() for p in detector.parameters())


def test_what_each_loss_teaches():
    """The text loss never moves the ensemble's second head, and the image loss never its first or the background."""
    detector = tiny("ensemble")
    torch.manual_seed(0)
    losses = detector(*batch())
    parts = {
        "first": [*detector.box_head.parameters(), detector.background],
        "second": list(detector.image_head.parameters()),
    }
    for loss, own, other in (("loss_class", "first", "second"), ("loss_image", "second", "first")):
        grads = {
            name: torch.autograd.grad(losses[loss], part, retain_graph=True, allow_unused=True)
            for name, part in parts.items()
        }
        assert any(g is not None and g.abs().sum() > 0 for g in grads[own])
        assert all(g is None or not g.any() for g in grads[other]), loss
    detector = tiny("vild")
    torch.manual_seed(0)
    losses = detector(*batch())
    for loss in ("loss_class", "loss_image"):
        assert torch.autograd.grad(losses[loss], detector.box_head.embedding.weight, retain_graph=True)[0].any()


def test_weight_of_the_distillation_loss():
    values = []
    for weight, share in ((0.5, 1.0), (2.0, 1.0), (2.0, 0.25)):
        detector = tiny("vild", image_weight=weight)
        detector.image_share = share
        torch.manual_seed(0)
        values.append(detector(*batch())["loss_image"].item())
    assert values[1] == pytest.approx(4 * values[0]) and values[2] == pytest.approx(values[0])


def test_other_vocabularies_at_test_and_scores_of_the_variants():
    images, sizes, _ = batch()
    for variant in ("text", "image", "vild", "ensemble"):
        detector = tiny(variant).eval()
        table, base = torch.randn(9, WIDTH, generator=generator(3)), torch.arange(9) < 4
        detector.set_vocabulary(table, base)
        _, regions = detector.judge(images, sizes)
        unit = F.normalize(table, dim=-1)
        maps = detector.fpn(detector.backbone(images))
        proposals = [p["boxes"] for p in detector.rpn.proposals(detector.rpn(maps), sizes)]
        first = detector.box_head(maps[:4], proposals)[0]
        if variant == "image":
            expected = plain_probabilities(cosine_logits(first, unit, 0.01))
        else:
            expected = class_probabilities(cosine_logits(first, with_background(unit, detector.background), 0.01))
        if variant == "ensemble":
            image = plain_probabilities(cosine_logits(detector.image_head(maps[:4], proposals)[0], unit, 0.01))
            expected = fuse(expected, image, base, weight_base=1 / 3, weight_novel=2 / 3)
        assert torch.allclose(torch.cat([r.scores for r in regions]), expected, atol=1e-6)
        found = detector(images, sizes)
        assert all((r["labels"] < 9).all() and len(r["masks"]) == len(r["boxes"]) for r in found)


def test_attributes_make_joint_scores_and_leave_boxes_and_classes():
    images, sizes, _ = batch()
    detector = tiny("ensemble").eval()
    plain = detector(images, sizes)[0]
    attributes = torch.randn(3, WIDTH, generator=generator(4))
    detector.set_attributes(attributes)
    joint = detector(images, sizes)[0]
    assert len(joint["boxes"]) == len(plain["boxes"]) > 0 and (joint["scores"].diff() <= 0).all()
    _, regions = detector.judge(images, sizes)
    shares = plain_probabilities(cosine_logits(regions[0].embeddings, F.normalize(attributes, dim=-1), 0.01))
    row_of = {tuple(box): row for row, box in enumerate(regions[0].boxes.tolist())}
    score_of = {(tuple(b), c): s for b, c, s in zip(*(plain[k].tolist() for k in ("boxes", "labels", "scores")),
                                                    strict=True)}  # fmt: skip
    for box, label, score, attribute in zip(
        *(joint[k].tolist() for k in ("boxes", "labels", "scores", "attributes")), strict=True
    ):
        own = shares[row_of[tuple(box)]]
        assert attribute == own.argmax()
        assert score == pytest.approx(score_of[tuple(box), label] * float(own.max()), rel=1e-4)
    detector.set_attributes(None)
    assert "attributes" not in detector(images, sizes)[0]


def test_supervised_never_finds_what_it_was_not_taught():
    detector = tiny("supervised").eval()
    images, sizes, _ = batch()
    found = detector(images, sizes)
    assert all(BASE[r["labels"]].all() for r in found) and any(len(r["labels"]) for r in found)
    with pytest.raises(ValueError, match="classes that it was trained with"):
        detector.set_vocabulary(None, torch.ones(7, dtype=torch.bool))


def test_proposals_are_ranked_as_asked():
    images, sizes, _ = batch()
    detector = tiny("supervised", masks=False).eval()
    for rank in ("rpn", "box", "both"):
        detector.test_config.rank = rank
        found = detector.proposals(images, sizes)
        assert all((one["scores"].diff() <= 0).all() and (one["scores"] <= 1).all() for one in found)


def test_frozen_norms_and_stages_stay_as_they_are():
    for settings in ({"trunk_norm": "frozen"}, {"trunk_norm": "fixed"}, {"trunk_frozen": 2}):
        detector = tiny("text", **settings)
        before = {n: v.clone() for n, v in detector.backbone.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=0.1)
        detector.train()
        torch.manual_seed(0)
        sum(detector(*batch()).values()).backward()
        optimizer.step()
        changed = {n for n, v in detector.backbone.state_dict().items() if not torch.equal(before[n], v)}
        if settings.get("trunk_norm") == "fixed":
            assert any(".bn" in n for n in changed) and not any("running" in n or "tracked" in n for n in changed)
        elif "trunk_norm" in settings:
            assert changed and not any("running" in n or ".bn" in n for n in changed)
            assert not any(isinstance(m, nn.BatchNorm2d) for m in detector.backbone.modules())
        else:
            assert changed and all("layer3" in n or "layer4" in n for n in changed)


def test_trunks_from_a_file_and_what_does_not_fit(tmp_path):
    torch.manual_seed(5)
    model = timm.create_model("test_resnet", pretrained=False)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    settings = {"norm": "batch", "frozen": 0, "eps": 1e-5, "momentum": 0.1, "seed": 0}
    trunk = load_trunk("test_resnet", str(tmp_path / "weights.pth"), **settings).eval()
    x = torch.randn(1, 3, 64, 64, generator=generator(0))
    assert torch.allclose(trunk(x)[3], model.eval().forward_features(x), atol=1e-6)
    assert [m.shape[-1] for m in trunk(x)] == [16, 8, 4, 2]
    for name, weights, message in (
        ("test_resnet", "nowhere.pth", "nowhere.pth: no such file"),
        ("test_resnet_of_nobody", "random", "test_resnet_of_nobody"),
        ("test_vit", "random", "strides"),
        ("resnet18", str(tmp_path / "weights.pth"), "cannot be made"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_trunk(name, weights, **settings)
        assert "\n" not in str(error.value)


def trunk_of_several_gpus(name: str, monkeypatch: pytest.MonkeyPatch, **settings: object) -> tuple[Trunk, Trunk]:
    """A trunk with norms of any statistics, and what a task on the first of two GPUs makes of a copy of it."""
    options = {"norm": "batch", "frozen": 0, "eps": 1e-5, "momentum": 0.1, "seed": 0, **settings}
    trunk = load_trunk(name, "random", **options)
    draws = generator(6)
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                value.copy_(torch.rand(value.shape, generator=draws) + 0.5)
    monkeypatch.setattr(task, "many", lambda: True)
    dataset = SimpleNamespace(annotations=SimpleNamespace(file=""), higher_than_wide=lambda: np.zeros(4, bool))
    made = DetectionTask(
        copy.deepcopy(trunk), dataset, data=DataConfig(workers=0), train=TrainConfig(batch_size=2),
        dist=Dist(0, 2, 0, torch.device("cuda"), True), content=dict, validate=None, folder=Path(), identity={},
        options={},
    )  # fmt: skip
    return trunk, made.detector


@pytest.mark.parametrize("name", ["regnetx_002", "test_efficientnet", "test_resnet"])
def test_synchronised_norms_change_nothing_else(name, monkeypatch):
    """Also not the activation that norms of timm may end with."""
    trunk, synchronised = trunk_of_several_gpus(name, monkeypatch)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in trunk.modules())
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in synchronised.modules()) == norms > 0
    assert not any(isinstance(m, nn.BatchNorm2d) for m in synchronised.modules())
    x = torch.randn(1, 3, SIDE, SIDE, generator=generator(0))
    for before, after in zip(trunk.eval()(x), synchronised.eval()(x), strict=True):
        assert before.any() and torch.equal(before, after)


def test_norms_of_frozen_stages_stay_frozen_when_they_are_synchronised(monkeypatch):
    """The stem's norm is a part of the trunk by itself, which is replaced as a whole."""
    _, trunk = trunk_of_several_gpus("test_resnet", monkeypatch, frozen=1)
    trunk.train()
    norms = {n: m for n, m in trunk.body.named_modules() if isinstance(m, nn.SyncBatchNorm)}
    frozen = {n for n in norms if n.startswith(("conv1.", "bn1", "layer1."))}
    assert "bn1" in frozen and len(frozen) > 3
    assert {n for n, m in norms.items() if not m.training} == frozen
    before = {n: m.running_mean.clone() for n, m in norms.items()}
    trunk(torch.randn(2, 3, SIDE, SIDE, generator=generator(0)))
    assert {n for n, m in norms.items() if torch.equal(before[n], m.running_mean)} == frozen


def test_embeddings_and_labels_that_do_not_fit_are_refused():
    detector = tiny("vild")
    for table, message in (
        (torch.ones(CLASSES, WIDTH + 1), "the text tower of its teacher"),
        (torch.zeros(CLASSES, WIDTH), "zero or not finite"),
        (torch.ones(CLASSES + 1, WIDTH), "embeddings for 5 classes"),
        (None, "shape None"),
    ):
        with pytest.raises(ValueError, match=message):
            detector.set_vocabulary(table, BASE)
    with pytest.raises(ValueError, match="no text embeddings"):
        tiny("supervised").set_attributes(torch.ones(2, WIDTH))
    _, _, targets = batch()
    targets[0]["labels"] = torch.tensor([0, 2])
    with pytest.raises(ValueError, match="not base classes"):
        detector.check_targets(targets)
