"""A training step of a batch of images does not wait for its GPU at every turn: counted, without a GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from open_clip.factory import build_model
from ovdet.fvit.config import FViTConfig
from ovdet.fvit.detector import build_detector
from ovdet.glip.head import GroundingHead, HeadOptions, Text
from ovdet.parts import boxes as box_ops

_spec = importlib.util.spec_from_file_location(
    "host_waits", Path(__file__).resolve().parents[2] / "benchmarks" / "host_waits.py"
)
host_waits = sys.modules.setdefault("host_waits", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(host_waits)


def test_the_counter_counts():
    x, mask = torch.arange(6.0), torch.tensor([True, False] * 3)
    cases = [lambda: x.sum().item(), lambda: x.tolist(), lambda: x[mask], lambda: x.nonzero(), lambda: float(x[0]),
             lambda: x.cpu(), lambda: bool(mask.any()), lambda: torch.tensor([1.0], device=x.device),
             lambda: x.new_tensor([1.0]), lambda: x.__setitem__(mask, 0.0), lambda: torch.equal(x, x),
             lambda: torch.ops.torchvision.nms(torch.rand(3, 4), torch.rand(3), 0.5), lambda: x.unique()]  # fmt: skip
    for case in cases:
        with host_waits.HostWaits() as waits:
            case()
        assert waits.count == 1, waits.places
    with host_waits.HostWaits() as waits:  # and none of these
        x[torch.tensor([0, 1])], x.topk(2), torch.where(mask, x, 0), x.masked_fill(mask, 0), x[:2], len(x)
        x.to("cpu", non_blocking=True), x.sort(), torch.cat([x, x]), mask.any(), torch.tensor([1, 2])
    assert waits.count == 0, waits.places


@pytest.mark.parametrize("masks", [False, True])
def test_host_waits_of_a_training_forward(masks: bool, monkeypatch: pytest.MonkeyPatch):
    vision = {"image_size": 64, "layers": 4, "width": 32, "head_width": 16, "patch_size": 16, "mlp_ratio": 2.0,
              "eva_model_name": "tiny", "rope": True, "naiveswiglu": True, "subln": True}  # fmt: skip
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    clip = build_model({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text})
    config = FViTConfig()
    config.data.image_size, config.model.blocks, config.model.channels = 128, [0, 1, 2], 8
    config.model.rpn_pre_nms, config.model.roi_samples, config.model.box_convs = 100, 32, 1
    config.model.masks = config.model.rpn_norm = config.model.roi_low_quality = masks
    detector = build_detector(config, clip, torch.randn(6, 24), torch.ones(5, dtype=torch.bool)).train()
    monkeypatch.setattr(box_ops, "suppress", box_ops._suppress_at_once)  # as on a GPU
    monkeypatch.setattr(type(detector), "check_targets", lambda *a: None)  # looks at what is on the host
    images, sizes = torch.randn(8, 3, 128, 128), [(128, 128 - 4 * i) for i in range(8)]
    targets = []
    for i in range(8):
        boxes = torch.rand(i, 2) * 60
        target = {"boxes": torch.cat([boxes, boxes + 30], 1), "labels": torch.arange(i) % 5}
        targets.append(target | {"masks": torch.rand(i, 128, 128) > 0.5})
    detector(images, sizes, targets)  # what is made once, such as anchors, is made
    with host_waits.HostWaits() as waits:
        losses = detector(images, sizes, targets)
    assert waits.count <= 5, waits.places
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in detector.parameters() if p.requires_grad)


@pytest.mark.parametrize("half", [True, False])
def test_host_waits_of_deep_fusion(half: bool):
    """None in bfloat16, GLIP's own precision; else one in each block, for whether a limit acts."""
    torch.manual_seed(0)
    options = HeadOptions(
        channels=16, text_width=8, blocks=2, fusion_width=16, fusion_heads=2, text_heads=2, text_hidden=16, groups=4,
        deform=False,
    )  # fmt: skip
    head = GroundingHead(options).train()
    maps = [torch.randn(2, 16, h, w, requires_grad=True) for h, w in ((8, 6), (4, 3), (2, 2), (1, 1), (1, 1))]
    text = Text(torch.randn(2, 7, 8), torch.arange(7) < torch.tensor([[4], [7]]))
    with host_waits.HostWaits() as waits:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = head(maps, text)
    assert waits.count == (0 if half else options.blocks), waits.places
    (output.tokens.sum() + output.boxes.sum()).backward()
    assert all(x.grad.isfinite().all() for x in maps)
