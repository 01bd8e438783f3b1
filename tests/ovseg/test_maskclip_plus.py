"""MaskCLIP+: labels that are filled in, losses and network, against the released code's numbers and closed forms."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import open_clip
from ovseg.data.sets import Unusable
from ovseg.dense import DenseReader
from ovseg.maskclip_plus import __main__ as program
from ovseg.maskclip_plus import task
from ovseg.maskclip_plus.data import Augmentation, Photographs, TrainingSamples, collate
from ovseg.maskclip_plus.fill import TO_FILL, fill_labels, give_labels, mark_unlabelled
from ovseg.maskclip_plus.losses import distillation_loss, segmentation_loss
from ovseg.maskclip_plus.network import Student, class_logits
from ovseg.refine import key_smoothing, prompt_denoising
from training.engine.errors import UserError


@pytest.fixture()
def case(golden, recorded):
    arrays = recorded("maskclip_plus.npz")
    facts = json.loads((golden / "dense_labels" / "maskclip_plus.json").read_text())
    return arrays, facts


def test_golden_labels(case):
    arrays, facts = case
    labels, features, embeddings = (arrays[k] for k in ("labels", "features", "class_embeddings"))
    labels, unseen, every = labels[:, 0].long(), facts["unseen"], range(len(embeddings))
    unit = F.normalize(features, dim=1)
    own = class_logits(features, embeddings[unseen])
    assert torch.equal(fill_labels(labels, own, unseen), arrays["self_training"][:, 0].long())
    guided = class_logits(unit, embeddings[unseen])
    assert torch.equal(fill_labels(labels, guided, unseen), arrays["guided"][:, 0].long())

    free = mark_unlabelled(torch.where(labels == TO_FILL, 0, labels))
    cosine = class_logits(unit, embeddings)
    assert torch.equal(fill_labels(free, cosine, every), arrays["guided_all_classes"][:, 0].long())
    refined = key_smoothing(prompt_denoising(cosine, 0.5), arrays["keys"], 1.0, "released")
    assert torch.equal(fill_labels(free, refined, every), arrays["guided_all_classes_pd50_ks100"][:, 0].long())


def test_golden_loss(case):
    arrays, facts = case
    logits = class_logits(arrays["features"], arrays["class_embeddings"])
    torch.testing.assert_close(logits, arrays["decoder_logits"], atol=1e-5, rtol=1e-5)
    labels = arrays["guided"][:, 0].long()
    total, count = segmentation_loss(logits, labels)
    assert float(total / count) == pytest.approx(facts["loss_over_labelled_pixels"], rel=1e-5)
    assert float(total / labels.numel()) == pytest.approx(facts["loss_over_all_pixels"], rel=1e-5)


def test_a_confidence_cut_never_touches_annotated_pixels():
    """The published cut compares cosines and removes annotated pixels too; here: a probability, unlabelled pixels."""
    labels = torch.tensor([[[TO_FILL, TO_FILL, 3, 255]]])
    scores = torch.tensor([[0.10, 0.0, 0.0, 0.0], [0.0, 0.01, 0.0, 0.0]]).view(1, 2, 1, 4)
    assert fill_labels(labels, scores, [5, 7], confidence=0.9).tolist() == [[[5, 255, 3, 255]]]
    assert fill_labels(labels, scores, [5, 7]).tolist() == [[[5, 7, 3, 255]]]
    sums = torch.tensor([[3.0, 2.0, 0.0, 0.0], [1.0, 2.0, 0.0, 0.0]]).view(1, 2, 1, 4)
    assert fill_labels(labels, sums, [5, 7], confidence=0.6, probability=True).tolist() == [[[5, 255, 3, 255]]]


def test_what_is_withheld():
    labels = torch.tensor([[0, 1, 2, 255]], dtype=torch.uint8)
    assert mark_unlabelled(labels).tolist() == [[-1, -1, -1, 255]]
    assert mark_unlabelled(labels, [2]).tolist() == [[0, 1, -1, 255]]
    nothing = torch.tensor([[[0, 1]]])
    assert torch.equal(fill_labels(nothing, torch.zeros(1, 1, 1, 1), [4]), nothing)  # the release crashes here
    with pytest.raises(ValueError, match="scores of 1 classes for 2"):
        fill_labels(nothing, torch.zeros(1, 1, 1, 1), [4, 5])


def test_labels_that_are_found_elsewhere():
    labels = torch.tensor([[TO_FILL, 3], [255, TO_FILL]])
    assert give_labels(labels, torch.tensor([1, 0], dtype=torch.uint8), [5, 7]).tolist() == [[7, 3], [255, 5]]
    assert give_labels(labels, torch.tensor([1, 0]), [5, 7], torch.tensor([True, False])).tolist() == [
        [255, 3],
        [255, 5],
    ]


def small_teaching(recipe: task.Recipe, classes: int = 5) -> task.Teaching:
    """A random teacher and a random student for ``classes`` random class vectors."""
    torch.manual_seed(0)
    teacher = open_clip.create_model("ViT-Ti-8-64").eval().requires_grad_(False)
    embeddings = F.normalize(torch.randn(classes, teacher.embed_dim), dim=-1)
    return task.Teaching(Student(embeddings, backbone="lraspp_mobilenet_v3_large"), teacher, recipe, range(classes))


@pytest.mark.parametrize("guided", [True, False])
def test_scores_are_made_in_float32_under_autocast(guided, monkeypatch):
    """As a GPU trains: the network in bfloat16, whatever decides a label as it is outside of autocast."""
    teaching = small_teaching(task.Recipe(smooth=1.0))
    teaching.guided = guided
    calls = []
    for name in ("class_logits", "key_smoothing"):
        original = getattr(task, name)

        def spy(*args, original=original):
            calls.append((original, args, original(*args)))
            return calls[-1][2]

        monkeypatch.setattr(task, name, spy)
    batch = {"images": torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)}
    batch["labels"] = torch.zeros(2, 64, 64, dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = teaching(batch)["loss"]
    loss.backward()
    assert [original.__name__ for original, _, _ in calls] == ["class_logits"] + guided * [
        "class_logits",
        "key_smoothing",
    ]
    for original, args, result in calls:
        assert result.dtype == torch.float32 and torch.equal(result, original(*args))


@pytest.mark.parametrize("smooth", [None, 1.0])
def test_a_teacher_that_drops_padding_reads_the_photograph_alone(smooth, monkeypatch):
    """Whatever fills a sample up to the square: as if the photograph stood there by itself."""
    teaching = small_teaching(task.Recipe(smooth=smooth))
    (teacher,), seen = teaching._teacher, []
    teacher.visual.set_drop_padding(True)
    fill = task.fill_labels

    def noted(labels, scores, *arguments, **options):
        seen.append(scores)
        return fill(labels, scores, *arguments, **options)

    monkeypatch.setattr(task, "fill_labels", noted)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    batch = {"images": images, "labels": torch.zeros(2, 64, 64, dtype=torch.uint8), "sizes": [(40, 64), (64, 24)]}
    teaching(batch)
    batch["images"] = images.clone()
    batch["images"][0, :, 40:], batch["images"][1, :, :, 24:] = 0, 255
    teaching(batch)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-5)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (teacher.visual.image_mean, teacher.visual.image_std))
    reader = DenseReader(teacher, [None], keys=True)
    for scores, image, (height, width) in zip(seen[0], images, batch["sizes"], strict=True):
        maps, keys = reader(((image[:, :height, :width] / 255 - mean) / std)[None])
        alone = class_logits(maps[None], teaching.student.embeddings)
        alone = key_smoothing(alone, keys, smooth) if smooth else alone
        torch.testing.assert_close(scores[None, :, : height // 8, : width // 8], alone, rtol=1e-4, atol=1e-4)
        assert torch.equal(scores[:, -1, -1], scores[:, height // 8 - 1, width // 8 - 1])  # the border, repeated


def test_samples_say_what_of_them_is_a_photograph():
    class Small:
        def __getitem__(self, index):
            image = torch.zeros(3, 30, 60, dtype=torch.uint8)
            return {"image": image, "labels": torch.zeros(30, 60, dtype=torch.uint8), "index": index}

    augmentation = Augmentation(crop=32, long_side=40, short_side=40, scales=(1.0, 1.0), recolour=False)
    sample = TrainingSamples(Small(), augmentation, seed=0)[0, 0]
    assert sample["size"] == (20, 32) and (sample["labels"][:20] == 0).all() and (sample["labels"][20:] == 255).all()
    assert collate([sample, Unusable("x", "y")], 32)["sizes"] == [(20, 32)] * 2
    assert collate([Unusable("x", "y")], 32)["sizes"] == [(32, 32)]


def test_processes_draw_their_own_dropout():
    teaching, drawn = small_teaching(task.Recipe()), []
    for rank in (0, 1, 0):
        dist = SimpleNamespace(distributed=False, device=torch.device("cpu"), rank=rank)
        task.MaskClipPlus(teaching, None, dist, source="", about={}, seed=3).begin_step([{}], step=7)
        drawn.append(float(torch.rand(())))
    assert drawn[0] == drawn[2] != drawn[1]


def test_images_are_known_by_their_names(tmp_path):
    """Wherever they lie; others, or as many in another order, are others."""

    def short(*names):
        return program.images_in_short(Photographs([str(tmp_path / name) for name in names]))

    assert short("a/x/1.jpg", "a/y/1.jpg") == short("b/c/x/1.jpg", "b/c/y/1.jpg") != short("a/x/1.jpg", "a/y/2.jpg")
    assert short("a/1.jpg").startswith("1 (") and short("1.jpg", "2.jpg") != short("2.jpg", "1.jpg")


def test_distillation_leaves_ignored_pixels_out():
    features = torch.full((1, 2, 2, 2), 3.0)
    teacher = torch.ones(1, 2, 1, 1)
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    labels[0, :, :2] = 255
    total, count = distillation_loss(features, teacher, labels)
    assert float(total) == 2 * 8 * 2 and int(count) == 2 * 8


def test_student_learns_a_background_and_nothing_else_of_its_classifier():
    embeddings = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    student = Student(embeddings, background=0).eval()
    image = torch.randn(1, 3, 40, 56)
    features = student.features(image)
    logits = student(image)
    assert features.shape == (1, 8, 5, 7) and logits.shape == (1, 3, 5, 7)
    torch.testing.assert_close(logits[:, 1:], class_logits(features, embeddings[1:]))
    own = F.normalize(student.background_vector, dim=0)
    torch.testing.assert_close(logits[:, 0], torch.einsum("bdhw,d->bhw", features, own))
    names = dict(student.named_parameters())
    assert "background_vector" in names and "embeddings" not in names
    assert "background_vector" not in dict(Student(embeddings).named_parameters())
    with pytest.raises(UserError, match="use resnet50, resnet101"):
        Student(embeddings, backbone="vgg")


@pytest.mark.parametrize(
    "backbone, stride", [("resnet50", 8), ("mobilenet_v3_large", 16), ("lraspp_mobilenet_v3_large", 8)]
)
def test_a_student_labels_images_of_any_size(tmp_path, backbone, stride):
    """Written, read again and used: the cells of a constant answer lie on the whole image."""
    from ovseg.classes import parse_classes
    from ovseg.maskclip_plus.network import StudentSegmenter, load_student, release_of
    from ovseg.protocols import Protocol

    embeddings = torch.eye(3, 8)
    student = Student(embeddings, backbone=backbone).eval()
    classes = parse_classes(["a,b|other,c"])
    torch.save(release_of(student, classes, mean=(0.5,) * 3, std=(0.2,) * 3), tmp_path / "student.pt")
    again, about = load_student(tmp_path / "student.pt")
    assert about["classes"] == ["a", "b", "c"] and again.stride == stride
    segmenter = StudentSegmenter(again, classes, Protocol(short_side=40), mean=about["mean"], std=about["std"])
    image = torch.randint(0, 256, (3, 45, 61), dtype=torch.uint8)
    last = [again.head[-1]] if backbone != "lraspp_mobilenet_v3_large" else [
        again.head.low_classifier, again.head.high_classifier
    ]  # fmt: skip
    with torch.no_grad():
        for convolution in last:
            convolution.weight.zero_()
            convolution.bias.copy_(torch.eye(8)[1])
    found = segmenter(image, confidence=True)["default"]
    assert found.labels.shape == (45, 61) and (found.labels == 1).all()
    (tmp_path / "none.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        load_student(tmp_path / "none.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="holds no student"):
        load_student(tmp_path / "other.pt")


def test_statistics_of_the_small_student_follow_its_weights():
    """Those of the first norm, after thirty passes over one batch, are the batch's."""
    torch.manual_seed(0)
    student = Student(F.normalize(torch.randn(5, 16), dim=1), backbone="mobilenet_v3_large").train()
    norm = next(m for m in student.modules() if isinstance(m, torch.nn.BatchNorm2d))
    seen = []
    norm.register_forward_pre_hook(lambda module, given: seen.append(given[0].mean(dim=(0, 2, 3))))
    images = torch.rand(4, 3, 64, 64) + 2
    with torch.no_grad():
        for _ in range(30):
            student(images)
    torch.testing.assert_close(norm.running_mean, seen[0], rtol=0.05, atol=1e-4)


def test_a_backbone_starts_from_weights_of_torchvision(tmp_path):
    """A classifier's file in torchvision's names; one of another network is refused in one line."""
    from torchvision.models import mobilenet_v3_large

    student = Student(torch.eye(3, 8), backbone="lraspp_mobilenet_v3_large")
    source = mobilenet_v3_large(weights=None)
    torch.save(source.state_dict(), tmp_path / "mobilenet.pth")
    student.load_backbone(tmp_path / "mobilenet.pth")
    torch.testing.assert_close(student.backbone["4"].block[0][0].weight, source.features[4].block[0][0].weight)
    with pytest.raises(UserError, match=r"mobilenet.pth: no weights of torchvision's resnet50"):
        Student(torch.eye(3, 8)).load_backbone(tmp_path / "mobilenet.pth")
