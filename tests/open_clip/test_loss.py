"""Losses against their definitions in float64, alone and over two processes; zero-shot classifiers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import open_clip
from open_clip import ClipLoss, DistillClipLoss, SigLipLoss
from open_clip.prompts import average_prompts

N, D = 6, 5


def features(seed: int) -> list[torch.Tensor]:
    """Images and texts of unit length, float64."""
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(N, D, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2)]


SCALE, BIAS = torch.tensor(7.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)


def clip_by_definition(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    total = 0.0
    for a, b in ((images, texts), (texts, images)):
        for i in range(len(a)):
            scores = torch.stack([(scale * a[i] @ b[j]).exp() for j in range(len(b))])
            total = total - (scores[i] / scores.sum()).log()
    return total / (2 * len(images))


def siglip_by_definition(images, texts, scale, bias) -> torch.Tensor:
    total = 0.0
    for i in range(len(images)):
        for j in range(len(texts)):
            sign = 1.0 if i == j else -1.0
            total = total - F.logsigmoid(sign * (scale * images[i] @ texts[j] + bias))
    return total / len(images)


def test_alone():
    images, texts = features(0)
    torch.testing.assert_close(ClipLoss()(images, texts, SCALE), clip_by_definition(images, texts, SCALE))
    expected = siglip_by_definition(images, texts, SCALE, BIAS)
    torch.testing.assert_close(SigLipLoss()(images, texts, SCALE, BIAS), expected)
    assert list(SigLipLoss()(images, texts, SCALE, BIAS, output_dict=True)) == ["contrastive_loss"]
    # A softmax does not see a bias that all columns share.
    torch.testing.assert_close(ClipLoss()(images, texts, SCALE, BIAS), ClipLoss()(images, texts, SCALE))
    labels = SigLipLoss().get_ground_truth("cpu", torch.float64, 3)
    assert labels.tolist() == [[1, -1, -1], [-1, 1, -1], [-1, -1, 1]]


def test_a_teacher():
    images, texts = features(0)
    own, teacher = ClipLoss()(images, texts, SCALE), features(1)
    out = DistillClipLoss()(images, texts, SCALE, *teacher, SCALE, output_dict=True)
    torch.testing.assert_close(out["contrastive_loss"], own)
    student, wanted = SCALE * images @ texts.T, SCALE * teacher[0] @ teacher[1].T
    total = sum(-(w.softmax(1) * s.log_softmax(1)).sum() / N for w, s in ((wanted, student), (wanted.T, student.T)))
    torch.testing.assert_close(out["distill_loss"], total / 2)
    itself = DistillClipLoss()(images, texts, SCALE, images, texts, SCALE)[1]
    assert itself < out["distill_loss"]  # no distribution has a smaller cross-entropy to one than itself


LOSSES = {
    "clip": lambda rank, world: ClipLoss(gather_with_grad=True, rank=rank, world_size=world),
    "clip local": lambda rank, world: ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world),
    "clip without": lambda rank, world: ClipLoss(rank=rank, world_size=world),
    "siglip": lambda rank, world: SigLipLoss(rank=rank, world_size=world, dist_impl="bidir"),
}


def one_process(rank: int, file: str, out: str) -> None:
    """Loss and gradients of half of the rows."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    results = {}
    for name, make in LOSSES.items():
        images, texts = (f[3 * rank : 3 * rank + 3].clone().requires_grad_() for f in features(0))
        loss = make(rank, 2)(images, texts, SCALE, BIAS if name == "siglip" else None)
        loss.backward()
        results[name] = loss.detach(), images.grad, texts.grad
    torch.save(results, f"{out}{rank}.pt")
    dist.destroy_process_group()


def test_over_two_processes(tmp_path, in_processes):
    """The mean over processes is the loss of all rows; so are the gradients, where they are gathered."""
    in_processes(one_process, 2, str(tmp_path / "store"), str(tmp_path / "rank"))
    parts = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]
    images, texts = (f.clone().requires_grad_() for f in features(0))
    for name in LOSSES:
        images.grad = texts.grad = None
        loss = (
            siglip_by_definition(images, texts, SCALE, BIAS) if name == "siglip" else ClipLoss()(images, texts, SCALE)
        )
        loss.backward()
        torch.testing.assert_close(torch.stack([p[name][0] for p in parts]).mean(), loss.detach())
        gradients = [torch.cat([p[name][i] for p in parts]) / 2 for i in (1, 2)]
        if name == "clip without":
            # Rows of the other process count as constants there, so each gets its gradient once, not twice.
            gradients = [2 * g for g in gradients]
        torch.testing.assert_close(gradients[0], images.grad)
        torch.testing.assert_close(gradients[1], texts.grad)


def test_the_loss_of_training_arguments():
    args = SimpleNamespace(
        model="ViT-B-16", distill=False, siglip=False, rank=0, world_size=1, local_loss=True, gather_with_grad=True
    )
    made = open_clip.create_loss(args)
    assert type(made) is ClipLoss and made.local_loss and made.gather_with_grad
    args.siglip, args.loss_dist_impl = True, "gather"
    assert open_clip.create_loss(args).dist_impl == "gather"
    args.distill = True
    assert type(open_clip.create_loss(args)) is DistillClipLoss
    args.model = "coca_ViT-B-32"
    with pytest.raises(ValueError, match="captioning loss"):
        open_clip.create_loss(args)
    with pytest.raises(ValueError, match="torch.distributed only"):
        ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="use bidir, shift, reduce or gather"):
        SigLipLoss(dist_impl="ring")


# -- zero-shot classifiers --------------------------------------------------------------------------------------------


def test_prompts_and_class_names():
    prompts = [template("X") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert len(set(prompts)) == 80 and all("X" in p and p.endswith(".") and "{" not in p for p in prompts)
    assert {t("X") for t in open_clip.SIMPLE_IMAGENET_TEMPLATES} <= set(prompts)
    assert {"a photo of a X.", "itap of the X.", "the X in a video game.", "a jpeg corrupted photo of a X."} < set(
        prompts
    )
    assert len(open_clip.IMAGENET_CLASSNAMES) == 1000 and open_clip.IMAGENET_CLASSNAMES[0] == "tench"


@torch.no_grad()
def test_a_classifier():
    model = open_clip.create_model("ViT-Ti-8-64", load_weights=False).eval()
    tokenizer, names = open_clip.get_tokenizer("ViT-Ti-8-64"), ["cat", "Traffic Light", "dog"]
    templates = ["a {}.", "{} there"]
    made = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates, num_classes_per_batch=2)
    each = torch.stack([model.encode_text(tokenizer([t.format(n) for t in templates])) for n in names])
    torch.testing.assert_close(made, average_prompts(each).T)
    legacy = open_clip.build_zero_shot_classifier_legacy(model, tokenizer, names, [t.format for t in templates])
    torch.testing.assert_close(made, legacy)
    assert made.shape == (128, 3) and made.is_contiguous()
    half = open_clip.build_zero_shot_classifier(model.bfloat16(), tokenizer, names, templates)
    assert (model.encode_image(torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16)) @ half).shape == (1, 3)
