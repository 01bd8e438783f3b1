"""The whole detector on a tiny ViT: what is trained, what is stored, and inputs without anything in them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from open_clip.factory import build_model
from ovdet.fvit.config import FViTConfig
from ovdet.fvit.detector import Detector, build_detector
from ovdet.fvit.fusion import vlm_probabilities

CLASSES, SIZE = 5, 128
BASE = torch.tensor([True, False, True, True, False])


def tiny_clip(patch: int = 16, size: int = 64):
    torch.manual_seed(0)
    vision = {"image_size": size, "layers": 6, "width": 32, "head_width": 16, "patch_size": patch, "mlp_ratio": 2.0}
    vision |= {"eva_model_name": "tiny", "rope": True, "naiveswiglu": True, "subln": True, "drop_path_rate": 0.5}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    return build_model({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text})


def tiny_config(**model) -> FViTConfig:
    config = FViTConfig()
    config.data.image_size = SIZE
    values = dict(
        name="tiny", blocks=[1, 2, 3], channels=16, box_width=32, box_convs=1, mask_convs=1, roi_samples=32,
        rpn_samples=32, rpn_pre_nms=100, rpn_post_nms=50, masks=True, background_weight=0.9,
    )  # fmt: skip
    for key, value in (values | model).items():
        setattr(config.model, key, value)
    config.test.score = 0.0
    return config


def vocabulary(classes: int = CLASSES) -> torch.Tensor:
    return torch.randn(classes + 1, 24, generator=torch.Generator().manual_seed(3))


def make(clip=None, **model) -> Detector:
    clip = clip or tiny_clip()
    torch.manual_seed(1)
    return build_detector(tiny_config(**model), clip, vocabulary(), BASE)


def batch(number: int = 2, size: int = SIZE):
    """Images whose second one is padded, and one to three objects in each."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(number, 3, size, size, generator=generator)
    sizes = [(size, size), (size * 3 // 4, size // 2)][:number]
    targets = []
    for i, (height, width) in enumerate(sizes):
        boxes = torch.tensor([[8.0, 10, 40, 60], [20, 20, 60, 44], [0, 50, 50, 90]])[: 3 - i]
        masks = torch.zeros(len(boxes), size, size, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = True
        targets.append({"boxes": boxes, "labels": torch.tensor([0, 2, 3])[: 3 - i], "masks": masks})
        assert boxes.max() <= max(height, width)
    return images, sizes, targets


def total(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(losses.values())).sum()


def test_freezing_and_state():
    clip = tiny_clip()
    before = copy.deepcopy(clip.visual.state_dict())
    detector = make(clip).train()
    assert detector.training and not any(m.training for m in detector.backbone.vit.modules())
    assert not any(p.requires_grad for p in detector.backbone.parameters())
    trained = {n: p for n, p in detector.named_parameters() if p.requires_grad}
    assert all(not n.startswith("backbone") for n in trained) and {n.split(".")[0] for n in trained} == {
        "neck", "rpn", "classifier", "box_head", "mask_head",
    }  # fmt: skip
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    losses = detector(*batch())
    assert set(losses) == {"loss_rpn_class", "loss_rpn_box", "loss_class", "loss_box", "loss_mask"}
    total(losses).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    assert all(p.grad is None for p in detector.backbone.parameters())
    optimizer.step()
    after = detector.backbone.vit.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())

    state = detector.trainable_state_dict()
    assert set(trained) <= set(state) and all(not n.startswith("backbone") for n in state)
    assert "neck.levels.up4.1.running_mean" in state and not any("embeddings" in n for n in state)
    torch.manual_seed(9)
    other = make(clip)
    other.load_trainable_state_dict(state)
    images, sizes, _ = batch()
    for a, b in zip(detector.eval()(images, sizes), other.eval()(images, sizes), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in ("boxes", "scores", "labels", "masks"))
    make(clip, masks=False).load_trainable_state_dict(state)  # a box detector takes a mask detector's state
    with pytest.raises(ValueError, match="lacks mask_head"):
        other.load_trainable_state_dict({k: v for k, v in state.items() if not k.startswith("mask_head")})
    with pytest.raises(ValueError, match="has unknown x"):
        other.load_trainable_state_dict(state | {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="has other shapes of box_head.embedding.bias"):
        other.load_trainable_state_dict(state | {"box_head.embedding.bias": torch.zeros(3)})


def saved_bytes(detector: Detector) -> tuple[int, set]:
    """Bytes that autograd keeps for one training step, each storage once, parameters aside; and the storages."""
    own = {t.untyped_storage().data_ptr() for t in [*detector.parameters(), *detector.buffers()]}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor

    torch.manual_seed(4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        total(detector(*batch()))
    return sum(kept.values()), set(kept)


def test_no_activation_of_the_vit_is_stored(monkeypatch: pytest.MonkeyPatch):
    detector = make().train()
    levels, inner = [], []
    detector.backbone.register_forward_hook(lambda m, i, out: levels.extend(out.levels))

    def watch(module, inputs, output):
        assert not output.requires_grad
        inner.append(output)

    for module in detector.backbone.vit.modules():
        if not list(module.children()):
            module.register_forward_hook(watch)
    frozen, storages = saved_bytes(detector)
    assert len(inner) > 50
    allowed = {t.untyped_storage().data_ptr() for t in levels}  # inputs of the trained layers: four maps
    assert not (storages & {t.untyped_storage().data_ptr() for t in inner}) - allowed

    # The same step with a ViT that is trained: many times its four maps more.
    unfrozen = make().train()
    unfrozen.backbone.requires_grad_(True)
    forward = type(unfrozen.backbone).forward.__wrapped__  # without no_grad
    monkeypatch.setattr(type(unfrozen.backbone), "forward", forward)
    more, _ = saved_bytes(unfrozen)
    assert more - frozen > 10 * sum(t.nbytes for t in levels)


def test_one_vit_pass_for_detection(monkeypatch: pytest.MonkeyPatch):
    detector = make().eval()
    passes = []
    detector.backbone.vit.trunk.patch_embed.proj.register_forward_hook(lambda *a: passes.append("patches"))
    detector.backbone.vit.trunk.blocks[0].register_forward_hook(lambda *a: passes.append("block"))
    images, sizes, _ = batch()
    detector(images, sizes)
    assert passes == ["patches", "block"]
    maps = detector.backbone(images, dense=True)
    assert torch.allclose(maps.dense, detector.backbone.vit.encode_dense(images), atol=1e-6)
    assert [tuple(m.shape) for m in maps.levels] == [(2, 32, 8, 8)] * 4


def test_other_readings_of_the_vit():
    images, sizes, _ = batch()
    clip = tiny_clip()
    detector = make(clip, readout="qq").eval()
    maps = detector.backbone(images, dense=True)
    assert torch.allclose(maps.dense, clip.visual.encode_dense(images, readout="qq"), atol=1e-6)
    assert not torch.allclose(maps.dense, clip.visual.encode_dense(images), atol=1e-2)
    assert len(detector(images, sizes)[0]["boxes"])
    with pytest.raises(ValueError, match="nonsense"):
        make(clip, readout="nonsense")


def test_a_vit_that_leaves_padding_out():
    """Maps are those of the pictures alone, whatever stands beside them, in training and detection."""
    images, sizes, targets = batch()
    clip = tiny_clip()
    detector = make(clip, drop_padding=True).eval()
    assert clip.visual.drop_padding
    maps = detector.backbone(images, sizes, dense=True)
    height, width = sizes[1]
    alone = clip.visual.encode_dense(images, sizes=sizes)[1:, :, : -(-height // 16), : -(-width // 16)]
    own = maps.dense[1:, :, : alone.shape[2], : alone.shape[3]]
    assert torch.allclose(own, alone, atol=1e-6)
    others = images.clone()
    others[1, :, height:] = 3.0
    others[1, :, :, width:] = -2.0
    before, after = detector(images, sizes), detector(others, sizes)
    for theirs, ours in zip(before, after, strict=True):
        torch.testing.assert_close(ours["scores"], theirs["scores"])
        torch.testing.assert_close(ours["boxes"], theirs["boxes"])
    detector.train()
    losses = []
    for pictures in (images, others):
        torch.manual_seed(0)
        losses.append(sum(detector(pictures, sizes, targets).values()))
    torch.testing.assert_close(*losses)


def test_detections_are_fused_scores_of_valid_boxes():
    detector = make().eval()
    detector.test_config.vlm_weight_base = detector.test_config.vlm_weight_novel = 1.0  # the VLM alone decides
    detector.test_config.vlm_boxes = "refined"  # those in the answer
    images, sizes, _ = batch()
    found = detector(images, sizes)
    dense = detector.backbone.vit.encode_dense(images)
    for i, (one, (height, width)) in enumerate(zip(found, sizes, strict=True)):
        assert 0 < len(one["boxes"]) <= 100 and one["masks"].shape[1:] == (28, 28)
        assert (one["boxes"] >= 0).all()
        assert (one["boxes"][:, 2] <= width).all() and (one["boxes"][:, 3] <= height).all()
        assert (one["scores"].diff() <= 0).all() and one["labels"].max() < CLASSES
        p = vlm_probabilities(dense[i : i + 1], [one["boxes"]], (SIZE, SIZE), F.normalize(vocabulary(), dim=1), 75.0)
        assert torch.allclose(one["scores"], p.gather(1, one["labels"][:, None])[:, 0], atol=1e-5)


def test_novel_embeddings_have_no_part_in_training():
    losses = []
    for change in (0.0, 5.0):
        detector = make().train()
        embeddings = vocabulary()
        embeddings[:CLASSES][~BASE] += change
        detector.set_vocabulary(embeddings, BASE)
        logits = []
        inner = detector.classifier.forward
        detector.classifier.forward = lambda *a, inner=inner, logits=logits: logits.append(inner(*a)) or logits[0]
        torch.manual_seed(5)
        out = detector(*batch())
        logits[0].retain_grad()
        total(out).backward()
        assert (logits[0].grad[:, :CLASSES][:, ~BASE] == 0).all() and (logits[0].grad[:, -1] != 0).any()
        losses.append({k: v.item() for k, v in out.items()})
    assert losses[0] == losses[1]  # and: the same seed gives identical losses


@pytest.mark.parametrize("masks", [True, False])
def test_images_without_boxes(masks: bool):
    detector = make(masks=masks).train()
    images, sizes, targets = batch()
    none = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.long),
        "masks": torch.zeros(0, SIZE, SIZE, dtype=torch.bool),
    }
    for batch_targets in ([none, none], [none, targets[1]]):
        detector.zero_grad()
        losses = detector(images, sizes, batch_targets)
        total(losses).backward()
        assert all(loss.isfinite() for loss in losses.values())
        missing = [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing  # data parallelism waits for every one
        if batch_targets[1] is none:
            assert losses["loss_box"] == losses["loss_rpn_box"] == losses.get("loss_mask", 0) == 0
            assert losses["loss_class"] > 0


def test_no_proposals_at_all():
    detector = make()
    nothing = [{"boxes": torch.zeros(0, 4), "scores": torch.zeros(0)}] * 2
    detector.rpn.proposals = lambda *a: nothing
    images, sizes, targets = batch()
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "masks": targets[0]["masks"][:0]}
    for batch_targets in (targets, [none, none]):
        losses = detector.train()(images, sizes, batch_targets)
        total(losses).backward()
        assert all(p.grad is not None for p in detector.parameters() if p.requires_grad)
    found = detector.eval()(images, sizes)
    assert [f["boxes"].shape for f in found] == [(0, 4)] * 2 and found[0]["masks"].shape == (0, 28, 28)
    assert [len(p["scores"]) for p in detector.proposals(images, sizes)] == [0, 0]


def test_patch_14_and_class_agnostic_proposals():
    clip = tiny_clip(patch=14, size=56)
    config = tiny_config()
    config.data.image_size = 112
    detector = build_detector(config, clip, vocabulary(), BASE)
    assert detector.strides == (3.5, 7, 14, 28, 56)
    images, sizes, targets = batch(size=112)
    total(detector.train()(images, sizes, targets)).backward()
    for found, (height, width) in zip(detector.eval().proposals(images, sizes), sizes, strict=True):
        assert 0 < len(found["boxes"]) <= 50 and set(found) == {"boxes", "scores"}
        assert (found["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert (found["scores"].diff() <= 0).all() and (found["scores"] <= 1).all()


def test_mixed_precision_stays_close():
    detector = make(roi_samples=1000, rpn_samples=100_000).train()  # all of them: rounding must not change the draw
    values = []
    for enabled in (False, True):
        torch.manual_seed(6)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = detector(*batch())
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        values.append(total(losses).item())
    assert values[1] == pytest.approx(values[0], rel=0.05)
    detector.backbone.vit.to(torch.bfloat16)  # the ViT alone in half precision
    torch.manual_seed(6)
    assert total(detector(*batch())).item() == pytest.approx(values[0], rel=0.05)
    detector.eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = detector(*batch()[:2])
    assert found[0]["boxes"].dtype == found[0]["scores"].dtype == torch.float32


def test_it_learns_two_boxes():
    detector = make(box_convs=0).train()
    images, sizes, targets = batch()
    optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=2e-3)
    history = []
    for step in range(25):
        torch.manual_seed(step)
        loss = total(detector(images, sizes, targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-5:]) < 0.6 * sum(history[:5])


def test_other_vocabularies():
    detector = make().eval()
    images, sizes, _ = batch()
    detector.set_vocabulary(vocabulary(9), torch.zeros(9, dtype=torch.bool))
    assert max(f["labels"].max() for f in detector(images, sizes)) > CLASSES
    for embeddings, mask, message in [
        (torch.randn(6, 23), BASE, r"shape \(6, 23\), the model needs \[classes \+ 1, 24\]"),
        (torch.randn(5, 24), BASE, "5 class embeddings for 5 classes"),
        (torch.cat([torch.zeros(1, 24), vocabulary()[1:]]), BASE, r"rows \[0\] are zero"),
    ]:
        with pytest.raises(ValueError, match=message):
            detector.set_vocabulary(embeddings, mask)


def test_errors_of_use():
    clip = tiny_clip()
    with pytest.raises(ValueError, match=r"model.blocks is \[1, 2, 5\]: .* below the last one, 5"):
        make(clip, blocks=[1, 2, 5])
    config = tiny_config()
    config.data.image_size = 100
    with pytest.raises(ValueError, match="data.image_size is 100: give a multiple of 16"):
        build_detector(config, clip, vocabulary(), BASE)
    detector = make(clip).train()
    images, sizes, targets = batch()
    with pytest.raises(ValueError, match="got no targets"):
        detector(images, sizes)
    with pytest.raises(ValueError, match="not base classes"):
        detector(images, sizes, [targets[0] | {"labels": torch.tensor([0, 1, 2])}, targets[1]])
    with pytest.raises(ValueError, match="no masks"):
        detector(images, sizes, [{k: t[k] for k in ("boxes", "labels")} for t in targets])
