"""Teachers as described: other architectures, widths and patches, each with the view that it wants."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer_sam import VisionTransformerSAM

from open_clip import ImageTower
from open_clip.factory import build_model
from open_clip.transform import normalize, pad_to, resize_longest
from training.data.prepare import View, prepare_batch
from training.engine.errors import UserError
from training.teachers.build import build_teacher
from training.teachers.describe import (
    CropTeacherFlags,
    DenseTeacherFlags,
    TeacherSpec,
    VisionTeacherFlags,
    crop_teacher,
    dense_teacher,
    vision_teacher,
)

TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
SIZES = {"image_size": 32, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8}


def clip(quick: bool = False, **sizes):
    torch.manual_seed(0)
    return build_model({"embed_dim": 24, "quick_gelu": quick, "vision_cfg": {**SIZES, **sizes}, "text_cfg": TEXT})


def test_the_start_model_on_crops():
    start = clip()
    teacher = build_teacher(crop_teacher(CropTeacherFlags()), start, image_size=64)
    assert teacher.view == View("crops", 32, start.visual.image_mean, start.visual.image_std) and teacher.width == 24
    crops = torch.randn(5, 3, 32, 32)
    said = teacher(crops)
    with torch.no_grad():
        torch.testing.assert_close(said, start.encode_image(crops, normalize=True))
    assert teacher(crops[:0]).shape == (0, 24) and not said.requires_grad and teacher.model.text is None
    assert not said.is_inference() and not any(m.training for m in teacher.train().modules())
    start.visual.trunk.norm.weight.data.zero_()  # the teacher is a copy
    torch.testing.assert_close(teacher(crops), said)


def test_another_clip_on_the_image(monkeypatch):
    """Another width, patch and joint space; its input is the largest multiple of its patch in the student's."""
    other = clip(patch_size=7, width=36, image_size=28)
    monkeypatch.setattr("open_clip.create_model", lambda name, pretrained: other)
    spec = dense_teacher(DenseTeacherFlags("big", "weights.pt"))
    teacher = build_teacher(spec, clip(), image_size=64)
    assert teacher.view.size == 63 and teacher.cells() == (9, 9) and teacher.model.text is not None
    with torch.no_grad():
        expected = other.encode_dense(image := torch.randn(2, 3, 63, 63), keep_shape=True)
    torch.testing.assert_close(teacher(image), expected)
    teacher.forget_texts()
    assert teacher.model.text is None
    assert build_teacher(TeacherSpec("start", readout="csa"), clip(), image_size=64).cells() == (8, 8)
    with pytest.raises(UserError, match="50 pixels for big, whose patches have 7: use 49"):
        build_teacher(dense_teacher(DenseTeacherFlags("big", "weights.pt", 50)), clip(), image_size=64)
    with pytest.raises(UserError, match="has no weights"):
        build_teacher(dense_teacher(DenseTeacherFlags("big")), clip(), image_size=64)


def test_a_foundation_model_has_as_many_cells_as_the_student():
    spec = vision_teacher(VisionTeacherFlags("test_vit", "random"))
    teacher = build_teacher(spec, clip(), image_size=64)
    assert teacher.view.size == 8 * 16 and teacher.cells() == (8, 8)
    trunk = teacher.model.trunk
    image = torch.randn(2, 3, 128, 128)
    said = teacher(image)
    assert said.shape == (2, trunk.embed_dim, 8, 8) == (2, teacher.width, 8, 8)
    native = torch.randn(1, 3, 160, 160)  # its own grid, where no positions are resized
    with torch.no_grad():
        expected = trunk.forward_features(native)[:, trunk.num_prefix_tokens :]
    torch.testing.assert_close(teacher(native).flatten(2).mT, expected, rtol=1e-4, atol=1e-5)
    smaller = vision_teacher(VisionTeacherFlags("test_vit", "random", 80))
    assert build_teacher(smaller, clip(), image_size=64).cells() == (5, 5)


def test_a_trunk_that_gives_a_map_itself(monkeypatch):
    """SAM's: windows, and a neck instead of tokens."""
    make = timm.create_model

    def small(name, **kwargs):
        sizes = {"img_size": 128, "embed_dim": 24, "depth": 2, "num_heads": 2, "neck_chans": 8}
        return make(name, global_attn_indexes=(1,), **sizes, **kwargs)

    monkeypatch.setattr(timm, "create_model", small)
    teacher = build_teacher(vision_teacher(VisionTeacherFlags("samvit_base_patch16", "random")), clip(), image_size=64)
    assert isinstance(teacher.model, VisionTransformerSAM) and not isinstance(teacher.model, ImageTower)
    said = teacher(torch.randn(2, 3, 128, 128))
    assert said.shape == (2, teacher.width, 8, 8) and len(teacher.identity()) > 32


def test_weights_from_a_file(tmp_path):
    spec = vision_teacher(VisionTeacherFlags("test_vit", "random"))
    torch.manual_seed(1)
    teacher = build_teacher(spec, clip(), image_size=64)
    torch.save(teacher.model.trunk.state_dict(), tmp_path / "trunk.pt")
    file, none = str(tmp_path / "trunk.pt"), str(tmp_path / "none.pt")
    again = build_teacher(vision_teacher(VisionTeacherFlags("test_vit", file)), clip(), image_size=64)
    assert again.identity() == teacher.identity()
    for name, weights in (("no_such_trunk", "random"), ("test_vit", none), ("test_vit2", file)):
        flags = VisionTeacherFlags(name, weights)
        with pytest.raises(UserError, match=f"--vfm {flags.vfm}: cannot be made"):
            build_teacher(vision_teacher(flags), clip(), image_size=64)


def test_what_changes_an_answer_changes_the_key():
    """Activation and heads have no weights; QuickGELU must not be taught by GELU's answers."""

    def key(model, **spec) -> str:
        return build_teacher(TeacherSpec("t", **spec), model, image_size=64).identity()

    crops = {"source": "crops", "emits": "embedding"}
    keys = [key(clip(), **crops), key(clip(quick=True), **crops), key(clip(head_width=24), **crops), key(clip()),
            key(clip(), readout="qq")]  # fmt: skip
    assert len(set(keys)) == len(keys) and key(clip(), **crops) == keys[0]
    changed = clip()
    changed.visual.trunk.norm.bias.data[3] += 1e-3
    assert key(changed, **crops) != keys[0]


def test_one_image_is_sent_and_each_has_its_view():
    """Views of other sizes and normalisations against resizing the original for each; borders stay black."""
    generator = np.random.default_rng(0)
    small = torch.from_numpy(generator.integers(0, 256, (3, 5, 8), dtype=np.uint8))
    original = F.interpolate(small[None].float(), (40, 64), mode="bicubic").clamp(0, 255).byte()[0]
    views = {
        "images": View("images", 64, (0.5,) * 3, (0.5,) * 3),
        "vfm": View("images", 56, (0.4, 0.5, 0.6), (0.2,) * 3),
    }
    batch = {"images": pad_to(resize_longest(original, 64), 64)[None], "counts": torch.zeros(1, dtype=torch.long)}
    for images in (batch["images"], [original]):
        ready = prepare_batch({**batch, "images": images}, views, torch.device("cpu"))
        for name, view in views.items():
            expected = normalize(pad_to(resize_longest(original, view.size), view.size), view.mean, view.std)
            difference = (ready[name][0] - expected).abs() * 255 * view.std[0]
            inside = int(40 * view.size / 64) - 4
            assert difference[:, :inside].mean() < 3 and difference[:, inside + 8 :].max() < 1e-3
