"""The published methods against numbers recorded from their released code, and against closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from open_clip.factory import build_model
from open_clip.regions import roi_features
from open_clip.weights import export_state_dict, load_state
from training.methods import Setting, make_method
from training.methods.clim import mosaic
from training.methods.correlation import correlation_loss, semantic_loss
from training.teachers.build import build_teacher
from training.teachers.describe import TeacherSpec

DECLIP = r"(?:eva|vit_\w+)\.\w+"  # model and reading
CROPS = TeacherSpec("crops", source="crops", emits="embedding")


@pytest.fixture
def numbers(golden):
    """Reader of a file of recorded numbers; the test is skipped where it is not there."""

    def read(name: str):
        file = golden / "methods" / name
        if not file.exists():
            pytest.skip(f"{name} is not among the golden files kept in the repository")
        if file.suffix == ".json":
            return json.loads(file.read_text())
        if file.suffix == ".safetensors":
            return load_file(file)
        return {k: torch.from_numpy(v) for k, v in np.load(file).items()}

    return read


def make_model(golden: Path, kind: str):
    if not (golden / kind / "weights.safetensors").exists():
        pytest.skip(f"{kind} is not among the golden models kept in the repository")
    model = build_model(json.loads((golden / kind / "config.json").read_text()))
    load_state(model, load_file(golden / kind / "weights.safetensors"))
    return model


def teachers_of(model, size: int) -> dict:
    return {"crops": build_teacher(CROPS, model, image_size=size)}


def as_batch(data: dict, **more) -> dict:
    boxes = list(data["boxes"].float().split(data["counts"].tolist()))
    return {"images": data["images"].float(), "boxes": boxes, "crops": data["crops"].float(), "samples": len(boxes),
            **more}  # fmt: skip


def cells(dense: torch.Tensor) -> torch.Tensor:
    return dense.flatten(2).transpose(1, 2)


def run(method, *batches: dict) -> dict[str, float]:
    """Backward pass of a step; the mean of each logged quantity, and the loss."""
    method.train()
    method.begin_step(list(batches), seed=0)
    outputs = [method(batch) for batch in batches]
    for out in outputs:
        out["loss"].backward()
    total = {k: sum(o[k].item() for o in outputs) for k in outputs[0]}
    means = {n: total[f"{n}_sum"] / max(total[g], 1) for n, g in method.logged().items()}
    return {**means, "loss": total["loss"]}


def published_gradients(model) -> dict[str, torch.Tensor]:
    return export_state_dict(model, state={n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def check_gradients(model, recorded: dict, norms: dict | None = None) -> None:
    actual = published_gradients(model)
    for name, value in recorded.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()), msg=name)
    total = sum(float(g.double().norm()) ** 2 for g in actual.values()) ** 0.5
    for name, norm in (norms or {}).items():
        if norm is not None:
            assert actual[name].double().norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6 * total), name


# -- DeCLIP -----------------------------------------------------------------------------------------------------------


@pytest.mark.recorded("methods/declip.json", DECLIP)
def test_declip(golden, numbers, case):
    kind, readout = case.split(".")
    expected, data = numbers("declip.json")[case], numbers("batch.npz")
    student = make_model(golden, kind)
    student.lock_image_tower(len(student.visual.parameter_groups()))
    setting = Setting(student, teachers_of(make_model(golden, kind), data["images"].shape[-1]), readout=readout)
    method = make_method("declip", setting, context_weight=0.25)
    batch = as_batch(data, answers={"vfm": cells(data["vfm_map"])})
    out = run(method, batch)
    assert out["distance"] == pytest.approx(expected["loss_content"], abs=1e-6)
    assert 0.25 * out["context"] == pytest.approx(expected["loss_context_times_0_25"], abs=1e-6)
    assert out["loss"] == pytest.approx(expected["loss_content"] + expected["loss_context_times_0_25"], abs=2e-6)
    named = {n: p for n, p in student.named_parameters() if p.requires_grad}
    assert set(export_state_dict(student, state=named)) == set(expected["requires_grad"]) - {"logit_scale"}
    check_gradients(student, numbers(f"declip.grads.{case}.safetensors"), expected.get("grad_norm"))


def test_declip_features(golden, numbers):
    """Content map, queries and correlations of EVA, as the losses see them."""
    expected, data = numbers("declip.npz"), numbers("batch.npz")
    method = make_method("declip", Setting(make_model(golden, "eva"), {}, readout="qq"), cosine_weight=0.0)
    batch = as_batch(data)
    with torch.no_grad():
        dense, tokens = method.read(batch["images"], ("q", "k"))
        regions = method.pool_regions(dense, batch)
    for actual, name in ((dense, "map.qq"), (tokens["q"], "q"), (tokens["k"], "k"), (regions, "qq.roi")):
        torch.testing.assert_close(actual, expected[f"eva.{name}"], rtol=0, atol=2e-5, msg=name)
    q = F.normalize(tokens["q"][0], dim=-1)
    torch.testing.assert_close(q @ q.T, expected["student_correlation_0"], rtol=0, atol=1e-5)


@pytest.mark.recorded("methods/declip.json", DECLIP)
@pytest.mark.parametrize("released", [False, True])
def test_declip_with_a_foundation_model_of_another_grid(golden, numbers, case, released):
    kind, readout = case.split(".")
    expected, data = numbers("declip.json")[case]["context_other_grid"], numbers("batch.npz")
    setting = Setting(make_model(golden, kind), {}, readout=readout)
    method = make_method("declip", setting, cosine_weight=0.0, context_weight=1.0, as_released=released)
    out = run(method, as_batch(data, answers={"vfm": cells(data["vfm_map_small"])}))
    assert out["context"] == pytest.approx(expected["released" if released else "right"], abs=1e-5)


def test_csa_averages_two_correlations(golden, numbers):
    """The released code does not run for more than one image; by the facts: the mean of both correlations."""
    data, recorded = numbers("batch.npz"), numbers("declip.npz")
    method = make_method("declip", Setting(make_model(golden, "eva"), {}, readout="csa"), cosine_weight=0.0)
    vfm = cells(data["vfm_map"]).double()
    out = run(method, as_batch(data, answers={"vfm": cells(data["vfm_map"])}))
    q, k, v = (F.normalize(t.double(), dim=-1) for t in (recorded["eva.q"], recorded["eva.k"], vfm))
    expected = (v @ v.mT - (q @ q.mT + k @ k.mT) / 2).norm(dim=-1).mean()
    assert out["context"] == pytest.approx(expected.item(), abs=1e-5)


# -- correlations -----------------------------------------------------------------------------------------------------


def test_correlation_cross_entropy(numbers):
    data, expected = numbers("unirefiner.npz"), numbers("unirefiner.json")["scd"]
    own = data["scd_student"].requires_grad_()
    cells = own.shape[1]
    for one_sided, name in ((True, "scd_grad"), (False, "scd_grad_both_sides")):
        loss = correlation_loss(
            [own], data["scd_target"], "ce", temperature=expected["temperature"], one_sided=one_sided, held=7 * cells
        )
        (gradient,) = torch.autograd.grad(loss / len(own), own)
        assert loss.item() / len(own) == pytest.approx(expected["loss"], abs=1e-6)
        # The recorded tokens were of unit length already; here that is part of the loss.
        along = (data[name] * own).sum(-1, keepdim=True) * own
        torch.testing.assert_close(gradient, data[name] - along, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["l2", "mse", "ce"])
@pytest.mark.parametrize("held", [1, 5 * 13, 13 * 13, 2 * 13 * 13, 10**6])
def test_correlations_in_chunks_against_whole_matrices_in_float64(kind, held):
    generator = torch.Generator().manual_seed(0)
    own = [torch.randn(3, 13, 6, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    target = torch.randn(3, 13, 9, generator=generator, dtype=torch.float64)
    unit = [F.normalize(t, dim=-1) for t in own]
    mine, theirs = sum(u @ u.mT for u in unit) / 2, F.normalize(target, dim=-1) @ F.normalize(target, dim=-1).mT
    if kind == "l2":
        expected = (mine - theirs).norm(dim=-1).mean(-1).sum()
    elif kind == "mse":
        expected = (mine - theirs).square().mean((-1, -2)).sum()
    else:
        low, high = ([getattr(m, f)(-1, keepdim=True) for m in (mine, theirs)] for f in ("amin", "amax"))
        spread = [(m - a) / (b - a) for m, a, b in zip((mine, theirs), low, high, strict=True)]
        logs = (spread[0] / 0.2).log_softmax(-1)
        expected = -((spread[1] / 0.2).softmax(-1) * logs).sum(-1).mean(-1).sum()
    actual = correlation_loss(own, target, kind, held=held)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-8)
    for a, b in zip(torch.autograd.grad(actual, own), torch.autograd.grad(expected, own), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


# -- DenseRC ----------------------------------------------------------------------------------------------------------


@pytest.mark.recorded("methods/denserc.json", r"eva|vit_\w+", argument="kind")
def test_denserc(golden, numbers, kind):
    data, expected = numbers("denserc.npz"), numbers("denserc.json")
    data = {k.removeprefix(f"{kind}."): v for k, v in data.items() if k.startswith(f"{kind}.")}
    student = make_model(golden, kind)
    method = make_method("denserc", Setting(student, {}, readout=f"gated:{expected['layers_read']}"))
    gate = student.visual.readout.gate
    assert not gate.weight.any() and gate.weight.requires_grad
    gate.weight.data, gate.bias.data = data["gate_weight"].float(), data["gate_bias"].float()
    image = torch.from_numpy(np.load(golden / kind / "inputs.npz")["images_dense"][:1]).float()
    batch = {"images": image, "boxes": [data["boxes"].float()], "samples": 1,
             "answers": {"crops": data["target"], "vfm": cells(data["vfm_map"][None])}}  # fmt: skip
    out = run(method, batch)
    assert out["distance"] == pytest.approx(expected[kind]["semantics"], abs=2e-6)
    assert out["coherence"] == pytest.approx(expected[kind]["coherence"], abs=1e-6)
    assert out["loss"] == pytest.approx(expected[kind]["total"], abs=2e-6)
    with torch.no_grad():
        dense = method.read(image)[0]
    torch.testing.assert_close(dense[0], data["map"], rtol=0, atol=1e-5)
    for actual, name in ((gate.weight.grad, "grad_gate_weight"), (gate.bias.grad, "grad_gate_bias")):
        scale = float(data[name].abs().max())
        torch.testing.assert_close(actual.double(), data[name], rtol=1e-4, atol=1e-4 * scale)


# -- SynCLIP, DenseVLM ------------------------------------------------------------------------------------------------


@pytest.mark.recorded("methods/synclip.json", r".+")
def test_synclip_semantics(numbers, case):
    data, expected = numbers("synclip.npz"), numbers("synclip.json")[case]
    counts = data["counts"].tolist()
    texts = [data[n].split(counts) for n in ("label", "rich")]
    student = data["student"].requires_grad_()
    share = (expected["sem_ratio"], expected["spa_ratio"] if expected["use_topk"] else 0.0)
    total = torch.zeros(())
    for i in range(len(counts)):
        values, vectors = torch.linalg.eigh(data["vfm_correlation"][i].double())
        vfm = (vectors * values.clamp(min=0).sqrt()).float()  # cells with these correlations
        total = total + semantic_loss(
            student[i], data["teacher"][i], vfm, texts[0][i], texts[1][i], share=share, neighbours=expected["k"],
            kind=expected["sem_loss"],
        )  # fmt: skip
    loss = total / sum(counts)
    assert loss.item() == pytest.approx(expected["loss"], abs=2e-6)
    (gradient,) = torch.autograd.grad(loss, student)
    recorded = data[f"grad.{case}"]
    torch.testing.assert_close(gradient, recorded, rtol=1e-4, atol=1e-4 * float(recorded.abs().max()))


class Regions(torch.nn.Module):
    """Stands for student or teacher of DenseVLM: its regions are given."""


@pytest.mark.recorded("methods/densevlm.npz", r"(.+)\.student")
def test_densevlm(golden, numbers, case, monkeypatch):
    data, expected = numbers("densevlm.npz"), numbers("densevlm.json")[case]
    given = {who: data[f"{case}.{who}"] for who in ("student", "teacher")}
    monkeypatch.setattr("training.methods.densevlm.roi_features", lambda dense, boxes: given["teacher"])
    classes = len(data["text_student"])

    def step(things: int, released: bool) -> tuple[dict, torch.Tensor]:
        own = given["student"].clone().requires_grad_()
        setting = Setting(make_model(golden, "eva"), {}, embed=lambda names, teacher=None: data[
            "text_teacher" if teacher else "text_student"])  # fmt: skip
        monkeypatch.setattr("training.methods.densevlm.read_names", lambda path: (["x"] * classes, things))
        method = make_method("densevlm", setting, names="x", as_released=released)
        method.embed_regions = lambda batch: F.normalize(own, dim=-1)
        batch = {"images": torch.zeros(1, 3, 8, 8), "boxes": [torch.zeros(len(own), 4)],
                 "answers": {"dense": torch.zeros(1, 1, 1)}}  # fmt: skip
        return {**run(method, batch), "kept": sum(method.counts(batch).values())}, own.grad

    # The number of things is not in the file: it is the one whose released loss (which takes one less) is recorded.
    found = [t for t in range(2, classes) if step(t, True)[0]["loss"] == pytest.approx(expected["released"], rel=1e-6)]
    right = [step(t, False)[0]["loss"] for t in found]
    assert any(r == pytest.approx(expected["closed_form_right_bound"], rel=1e-6) for r in right)
    out, gradient = step(found[0], True)
    recorded = data[f"{case}.grad"]
    torch.testing.assert_close(gradient, recorded, rtol=1e-4, atol=1e-4 * float(recorded.abs().max()))
    assert out["kept"] == expected["kept"]


def test_densevlm_with_nothing_kept_is_zero(golden):
    """The released loss is NaN there."""
    model = make_model(golden, "eva")
    width = model.embed_dim
    setting = Setting(model, {}, embed=lambda names, teacher=None: torch.randn(5, width))
    import training.methods.densevlm as module

    names, module.read_names = module.read_names, lambda path: (["x"] * 5, 3)
    try:
        method = make_method("densevlm", setting, names="x", threshold=1.0)
    finally:
        module.read_names = names
    side = method.student.visual.patch_size * 4
    batch = {"images": torch.randn(1, 3, side, side), "boxes": [torch.tensor([[0.0, 0.0, 0.5, 0.5]])],
             "answers": {"dense": torch.randn(1, 16, width)}}  # fmt: skip
    assert run(method, batch)["loss"] == 0
    assert all(p.grad is not None and not p.grad.any() for p in method.student.parameters() if p.requires_grad)


# -- FineCLIP, CLIM ---------------------------------------------------------------------------------------------------


def fineclip_batch(numbers) -> dict:
    data, own = numbers("batch.npz"), numbers("fineclip.npz")
    regions = len(data["boxes"])
    return as_batch(
        {**data, "images": own["images"]}, captions=data["captions"], captions_of=torch.arange(len(own["images"])),
        region_captions=data["region_captions"], region_captions_of=torch.arange(regions),
    )  # fmt: skip


def test_fineclip(golden, numbers):
    expected, batch = numbers("fineclip.json"), fineclip_batch(numbers)
    rows = len(batch["crops"]) + expected["padding_rows"]
    released = make_method(
        "fineclip", Setting(make_model(golden, "eva")), as_released=True, max_boxes=rows // len(batch["boxes"])
    )
    out = run(released, batch)
    assert out["distance"] == pytest.approx(expected["losses"]["distill"], abs=1e-6)
    assert out["captions"] == pytest.approx(expected["losses"]["global_itc"], abs=1e-6)
    assert out["region_captions"] == pytest.approx(expected["losses"]["region_itc"], abs=2e-6)
    named = {n: p for n, p in released.student.named_parameters() if p.grad is not None}
    published = export_state_dict(released.student, state=named)
    assert set(published) == set(expected["grad_norm"]) and not set(published) & set(expected["without_gradient"])
    check_gradients(released.student, numbers("fineclip.grads.safetensors"), expected["grad_norm"])
    right = run(make_method("fineclip", Setting(make_model(golden, "eva"))), batch)
    assert right["region_captions"] == pytest.approx(expected["region_itc_right"], abs=2e-6)


def test_fineclip_distils_from_the_live_student(golden, numbers):
    expected = numbers("fineclip.json")["distill_grad_norm_live_teacher"]
    student = make_model(golden, "eva")
    method = make_method("fineclip", Setting(student), caption_weight=0.0, region_caption_weight=0.0)
    run(method, fineclip_batch(numbers))
    check_gradients(student, {}, expected)


def test_clim(golden, numbers):
    data, expected = numbers("clim.npz"), numbers("clim.json")
    student = make_model(golden, "vit_gelu")
    unlocked = {n for n in expected["requires_grad"] if n != "logit_scale"}
    blocks = {n.split("resblocks.")[1].split(".")[0] for n in unlocked}
    student.lock_image_tower(len(blocks))
    size = expected["mosaics"][0][-1]
    images, texts = data["images"].float(), data["texts"].long()
    sides = tuple(math.isqrt(n) for n in expected["cells"])
    parts, step = images[: sum(expected["cells"])].split(expected["cells"]), size // data["mosaics"].shape[-1]
    pictures, boxes = zip(*(mosaic(*pair) for pair in zip(parts, sides, strict=True)), strict=True)
    for picture, recorded in zip(pictures, data["mosaics"], strict=True):
        small = F.interpolate(picture[None], (size, size), mode="bicubic")[0, :, ::step, ::step]
        torch.testing.assert_close(small.half().float(), recorded.float(), rtol=0, atol=2e-3)
    method = make_method("clim", Setting(student), mosaic_size=size, mosaics=sides)
    with torch.no_grad():
        torch.testing.assert_close(method.embed_pairs(images), data["features"], rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat(boxes), data["boxes"].float(), rtol=0, atol=1e-6)
    out = run(method, {"images": images, "texts": texts})
    assert out["loss"] == pytest.approx(expected["loss"], abs=5e-6)
    named = {n: p for n, p in student.named_parameters() if p.requires_grad}
    assert set(export_state_dict(student, state=named)) == set(expected["requires_grad"])
    check_gradients(student, numbers("clim.grads.safetensors"), expected["grad_norm"])
    used = sum(expected["cells"])
    # A batch that the mosaics use up, which the released code cannot take.
    assert np.isfinite(run(method, {"images": images[:used], "texts": texts[:used]})["loss"])


def test_roi_features_of_two_grids_agree(golden):
    """DenseVLM reads the same boxes from maps of other patch sizes: boxes are in 0..1, so they need no change."""
    ramp = torch.linspace(0, 1, 24)[None, None, None].expand(1, 1, 24, 24).contiguous()
    box = [torch.tensor([[0.25, 0.25, 0.75, 0.75]])]
    assert roi_features(ramp, box).item() == pytest.approx(roi_features(ramp[..., ::2, ::2], box).item(), abs=0.03)
