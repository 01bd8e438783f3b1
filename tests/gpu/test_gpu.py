"""What can only be seen on a GPU; without one the whole module is skipped, once."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from timm.layers import LayerNorm, SwiGLU
from torch import nn

if not torch.cuda.is_available():
    pytest.skip("no GPU is visible", allow_module_level=True)

import open_clip
from open_clip.mlp_widths import pad_mlps
from open_clip.regions import roi_features
from training.engine.attention import ATTENTIONS, prefer_attention
from training.engine.precision import PRECISIONS, make_precision
from training.kernels import Reader, attention_kernel, check_attention
from training.main import main
from training.teachers.build import build_teacher
from training.teachers.describe import TeacherSpec

GPU, ROOT = torch.device("cuda"), Path(__file__).resolve().parents[1]


def module(path: str):
    """Another file of tests, for what it checks on the CPU."""
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_of_cpu", ROOT / path)
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


Products = module("open_clip/test_mlp_widths.py").Products


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_layer_trains_in_every_precision(name):
    precision = make_precision(name, GPU)
    layer = nn.Linear(8, 8).to(GPU, precision.param_dtype)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    before = layer.weight.detach().clone()
    with precision.autocast():
        loss = layer(torch.ones(2, 8, dtype=precision.input_dtype, device=GPU)).float().square().mean()
    if precision.scaler is None:
        loss.backward()
        optimizer.step()
    else:
        precision.scaler.scale(loss).backward()
        precision.scaler.step(optimizer)
    assert not torch.equal(layer.weight, before) and (precision.scaler is not None) == (name == "amp"), name


def test_prepared_batches():
    module("training/data/test_prepare.py").test_prepared_batches("cuda")


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("name", ["ViT-Ti-8-64", "EVA02-CLIP-B-16"])
def test_regions_halt_no_gpu_and_are_those_of_the_cpu(name, drop):
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    model.visual.set_drop_padding(drop)
    patch = model.visual.patch_size
    side, sizes = 8 * patch, [(6 * patch, 8 * patch), (8 * patch, 5 * patch), (8 * patch, 8 * patch)]
    image = torch.randn(3, 3, side, side)
    boxes = [torch.tensor([[0.0, 0, w / side, h / side], [0.1, 0.1, 0.5, 0.4]]) for h, w in sizes]
    results = []
    for device in ("cpu", "cuda"):
        model.visual.zero_grad()
        model.visual.to(device)
        pixels, where = image.to(device), [b.to(device) for b in boxes]
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            regions = model.encode_pseudo_boxes(pixels, where, normalize=True, sizes=sizes)
            regions[:, 0].sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append((regions.detach().cpu(), model.visual.trunk.blocks[0].mlp.fc2.weight.grad.cpu().clone()))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def test_roi_align_is_deterministic():
    features = torch.randn(2, 32, 64, 64, device=GPU, requires_grad=True)
    low = torch.rand(2, 40, 2, device=GPU) * 0.6
    boxes = list(torch.cat([low, low + 0.3], dim=2))
    gradients = []
    for _ in range(3):
        gradients.append(torch.autograd.grad(roi_features(features, boxes).square().sum(), features)[0])
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def test_a_bfloat16_teacher_is_close_to_the_float32_one():
    torch.manual_seed(0)
    model = open_clip.create_model("EVA02-CLIP-B-16")
    crops = torch.randn(8, 3, 224, 224, device=GPU)
    full = build_teacher(TeacherSpec("crops"), model, image_size=224, device=GPU)(crops)
    half = build_teacher(TeacherSpec("crops"), model, image_size=224, device=GPU, dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        answers = half(crops.bfloat16()).float()
    assert torch.cosine_similarity(answers, full).min() > 0.998


@pytest.mark.parametrize("mixed", [False, True])
def test_mlps_of_odd_width_are_padded_by_themselves_and_err_no_more(mixed):
    """Of EVA02-CLIP-L-14: in bfloat16, and under autocast, as far from float64 as timm's own, within a quarter."""
    torch.manual_seed(0)
    plain = SwiGLU(1024, 2730, norm_layer=LayerNorm).to(GPU)
    x = torch.randn(300, 1024, device=GPU)
    ours, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()(x.double())
    assert pad_mlps(ours) == {(2730, 2752)}
    seen = []
    ours.norm.register_forward_hook(lambda m, args, y: seen.append(args[0].is_contiguous()))
    if not mixed:
        plain, ours, x = plain.bfloat16(), ours.bfloat16(), x.bfloat16()
    with torch.autocast("cuda", torch.bfloat16, enabled=mixed), Products() as products:
        ours_y = ours(x)
    with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
        errors = [(y.double() - exact).norm() for y in (ours_y, plain(x))]
    assert products.seen == [(300, 1024, 5504), (300, 2752, 1024)] and seen == [True]
    assert errors[0] <= 1.25 * errors[1]
    assert torch.equal(ours.float()(x.float()), plain.float()(x.float())), "float32 is computed as it is"


@pytest.mark.parametrize("name", [n for n in ATTENTIONS if n != "auto"])
def test_the_kernel_of_attention_that_is_asked_for_runs(name):
    q = torch.randn(2, 4, 65, 64, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    reader = Reader(open_clip.create_model("ViT-Ti-8-64").visual, 64, torch.bfloat16)
    with prefer_attention(name):
        kernel = attention_kernel(reader, GPU)
        if kernel != name:
            pytest.skip(f"{torch.cuda.get_device_name()} has no {name}: {kernel}")
        check_attention(name, {"student": reader}, GPU)
        with torch.profiler.profile() as seen:
            torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    keys = [e.key for e in seen.key_averages() if e.key.startswith("aten::_scaled_dot_product_")]
    assert keys and all(name in key for key in keys), keys


def losses(log: Path) -> list[float]:
    return [float(line.split("loss ")[1].split()[0]) for line in log.read_text().splitlines() if "loss " in line]


@pytest.mark.parametrize("extra", [[], ["--crop-on", "device"], ["--drop-padding"], ["--compile"]])
def test_the_program_trains_as_on_the_cpu(tmp_path, extra):
    from training.scenes.generate import main as generate

    data = tmp_path / "scenes"
    generate(["--out", str(data), "--train", "16", "--val", "4", "--size", "128", "--min-aspect", "0.6"])
    for device in ("cpu", "cuda"):
        flags = [] if device == "cpu" and "--compile" in extra else extra
        assert main([
            "--model", "ViT-Ti-8-64", "--det-image-size", "128", "--batch-size", "4", "--device", device, "--precision",
            "fp32", "--max-steps", "6", "--epochs", "9", "--warmup", "2", "--log-every-n-steps", "1", "--workers", "0",
            "--train-data", str(data / "annotations/instances_train2017.json"), "--train-image-root",
            str(data / "train2017"), "--logs", str(tmp_path / "logs"), "--name", device, *flags,
        ]) == 0  # fmt: skip
    cpu, gpu = (losses(tmp_path / "logs" / device / "out.log") for device in ("cpu", "cuda"))
    assert len(cpu) == len(gpu) == 6
    assert max(abs(a - b) for a, b in zip(cpu, gpu, strict=True)) < 2e-4
