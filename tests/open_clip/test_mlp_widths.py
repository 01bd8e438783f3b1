"""MLPs of odd width computed in a padded one: timm's numbers and gradients, the same weights, aligned products."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from timm.layers import GluMlp, LayerNorm, Mlp, SwiGLU
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from open_clip.factory import build_image_tower, build_model, get_model_config
from open_clip.identity import identity
from open_clip.mlp_widths import pad_mlps, padded_width
from open_clip.weights import export_state_dict, load_state

TEXT = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
SIZES = {"image_size": 32, "layers": 3, "width": 48, "head_width": 12, "patch_size": 8}
TOWERS = {
    "eva02": {"eva_model_name": "t", "rope": True, "naiveswiglu": True, "subln": True, "mlp_ratio": 2.73},  # 131 units
    "eva02_plain": {"eva_model_name": "t", "naiveswiglu": True, "mlp_ratio": 2.73},
    "eva01": {"eva_model_name": "t", "mlp_ratio": 4.3637},  # 209
    "vit": {"mlp_ratio": 4.1},  # 196
}
NORM = partial(LayerNorm, eps=1e-6)
MLPS = {
    "plain": (Mlp, {}),
    "plain, norm": (Mlp, {"norm_layer": NORM}),
    "plain, no bias": (Mlp, {"bias": False}),
    "act(0) is not 0": (Mlp, {"act_layer": nn.Sigmoid}),
    "gated": (SwiGLU, {}),
    "gated, norm": (SwiGLU, {"norm_layer": NORM}),
    "gated, norm, no bias": (SwiGLU, {"norm_layer": NORM, "bias": False}),
    "packed": (GluMlp, {"act_layer": nn.SiLU, "gate_last": False}),
    "packed, gate last": (GluMlp, {"norm_layer": NORM}),
}


class Products(TorchDispatchMode):
    """(rows, terms, columns) of the matrix products of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[-1]
        if name in ("mm", "addmm"):
            a, b = args[-2:]
            self.seen.append((a.shape[-2], a.shape[-1], b.shape[-1]))
        return func(*args, **(kwargs or {}))


def make_mlp(kind: str, width: int = 130) -> nn.Module:
    torch.manual_seed(0)
    cls, options = MLPS[kind]
    mlp = cls(24, 2 * width if cls is GluMlp else width, **options)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mlp


def padded(module: nn.Module, pads: bool | None = True) -> nn.Module:
    other = copy.deepcopy(module)
    pad_mlps(other, pads)
    return other


def run(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and all gradients."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape).sin()).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def make_tower(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = build_model({"embed_dim": 24, "vision_cfg": {**SIZES, **TOWERS[kind]}, "text_cfg": TEXT}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.ndim else None
    return model


def test_widths():
    assert [padded_width(w) for w in (2730, 2048, 4304, 1, 8, 209)] == [2752, 2048, 4304, 64, 8, 256]


@pytest.mark.parametrize("kind", MLPS)
def test_outputs_and_gradients_are_those_of_timm(kind):
    plain = make_mlp(kind)
    ours = padded(plain)
    assert type(ours) is not type(plain) and list(ours.state_dict()) == list(plain.state_dict())
    x = 3 * torch.randn(2, 5, 24) + 5  # units far from mean 0: a norm over zeros would show
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        theirs, mine = run(plain.to(dtype), x.to(dtype)), run(ours.to(dtype), x.to(dtype))
        for a, b in zip(theirs, mine, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert (a - b).abs().max() <= bound * a.abs().max().clamp(min=1)


@pytest.mark.parametrize("kind", MLPS)
def test_half_precision_errs_as_without_padding(kind):
    """In bfloat16, and under autocast: as far from float64 as timm's own, within a quarter; types are the same."""
    plain, x = make_mlp(kind), torch.randn(64, 24)
    ours = padded(plain)
    exact = run(copy.deepcopy(plain).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(plain, x), run(ours, x)
    half = run(plain.bfloat16(), x.bfloat16()), run(ours.bfloat16(), x.bfloat16())
    for theirs, mine in (mixed, half):
        for a, b, truth in zip(theirs, mine, exact, strict=True):
            assert a.dtype == b.dtype
            assert (b.double() - truth).norm() <= 1.25 * (a.double() - truth).norm() + 1e-12


@pytest.mark.parametrize("kind", TOWERS)
def test_a_tower_keeps_everything_but_the_way_it_computes(kind):
    model = make_tower(kind).double()
    assert pad_mlps(model.visual.trunk, False) == model.visual.padded_widths
    image = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    before = identity(model), export_state_dict(model)
    read = {
        "global": lambda m: m.encode_image(image[..., :32]),
        "dense": lambda m: m.encode_dense(image),
        "checkpointing": lambda m: (m.set_grad_checkpointing(True), m.encode_dense(image))[1],
    }
    results = {}
    for pads in (False, True):
        pad_mlps(model.visual.trunk, pads)
        for name, how in read.items():
            model.zero_grad()
            y = how(model)
            (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            results[name, pads] = {"": y.detach(), **grads}
        model.set_grad_checkpointing(False)
    for name in read:
        theirs, mine = results[name, False], results[name, True]
        assert theirs.keys() == mine.keys()
        for key, a in theirs.items():
            assert (a - mine[key]).abs().max() <= 1e-12 * a.abs().max().clamp(min=1), (name, key)
    after = identity(model), export_state_dict(model)
    assert before[0] == after[0] and list(before[1]) == list(after[1])
    assert all(torch.equal(t, after[1][n]) for n, t in before[1].items())
    other = make_tower(kind).double()  # what the padded one saves goes strictly into another, and back
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    load_state(other, after[1], source="test")
    assert identity(other) == before[0]
    model.load_state_dict(other.state_dict(), strict=True)


def test_a_step_of_training_is_that_of_the_unpadded_model():
    """Weight decay, clipping and moments see the real weights alone."""
    weights = []
    for pads in (False, True):
        model = make_tower("eva02").double().visual
        pad_mlps(model.trunk, pads)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.2)
        for seed in range(3):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            model(torch.randn(2, 3, 32, 32, dtype=torch.float64)).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        weights.append(model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-9, atol=1e-10)


def test_a_cpu_computes_as_before():
    model = make_tower("eva02").visual
    assert model.padded_widths == {(131, 192)}
    with Products() as seen, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(1, 3, 32, 32))
    assert any(131 in shape for shape in seen.seen) and not any(192 in shape for shape in seen.seen)


def imagined_gpu() -> None:
    """Skip where fake tensors need a driver."""
    try:
        with FakeTensorMode():
            torch.full_like(torch.empty(1, device="cuda"), 1)
            nn.Conv2d(1, 1, 1, device="cuda")(torch.empty(1, 1, 2, 2, device="cuda"))
    except RuntimeError as error:
        pytest.skip(f"no imagined GPU with torch {torch.__version__}: {str(error).splitlines()[0]}")


def misaligned(products: Products) -> set[tuple[int, int, int]]:
    """Products with a side that is neither a multiple of 8 nor the number of tokens, which is what the image makes it.

    Two images of 24 x 24 cells: 577 tokens each, of which the last block reads the first, or all but the first.
    """
    assert len(products.seen) >= 24
    tokens = {2 * 577, 2 * 576, 2, 577}
    return {shape for shape in products.seen if any(side % 8 and side not in tokens for side in shape)}


def l14() -> nn.Module:
    """Two blocks of L/14 at 336 pixels, without memory; all its blocks are alike."""
    config = get_model_config("EVA02-CLIP-L-14-336")
    config["vision_cfg"]["layers"] = 2
    with torch.device("meta"):
        return build_image_tower(config).bfloat16()


@pytest.mark.parametrize("pads", [None, False])
def test_all_products_of_l14_are_aligned_on_a_gpu(pads):
    """Of its own accord there, forward; without padding the check sees them."""
    imagined_gpu()
    visual = l14()
    pad_mlps(visual.trunk, pads)
    with FakeTensorMode(allow_non_fake_inputs=True), Products() as seen, torch.no_grad():
        for module in visual.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="cuda")))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer, device="cuda"))
        for read in (visual, visual.encode_dense):
            read(torch.empty(2, 3, 336, 336, device="cuda", dtype=torch.bfloat16))
    odd = misaligned(seen)
    assert odd == set() if pads is None else {2730 in shape for shape in odd} == {True}, odd


def test_all_products_of_l14_are_aligned_backward():
    """On the meta device, as no backward pass runs on an imagined GPU."""
    for pads in (True, False):
        visual = l14()
        assert pad_mlps(visual.trunk, pads) == {(2730, 2752)}
        with Products() as seen:
            for read in (visual, visual.encode_dense):
                read(torch.empty(2, 3, 336, 336, device="meta", dtype=torch.bfloat16)).sum().backward()
        odd = misaligned(seen)
        assert odd == set() if pads else {2730 in shape for shape in odd} == {True}, odd


def test_compiled_whole_and_the_same():
    plain = make_mlp("gated, norm")
    ours, x = padded(plain), torch.randn(4, 24)
    compiled = copy.deepcopy(ours)
    compiled.compile(backend="aot_eager", fullgraph=True)
    for a, b in zip(run(ours, x), run(compiled, x), strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(run(ours, x), run(compiled, x), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-1)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_wrapped_for_many_processes(one_process, how):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if how == "fsdp" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"torch {torch.__version__} divides no model on CPUs")
    image, results = torch.randn(2, 3, 32, 32, dtype=torch.float64), []
    for wrapped in (False, True):
        tower = make_tower("eva02").double().visual
        pad_mlps(tower.trunk, wrapped)
        module = tower
        if wrapped and how == "ddp":
            module = nn.parallel.DistributedDataParallel(tower)
        elif wrapped:
            mesh = init_device_mesh("cpu", (1,))
            for block in tower.trunk.blocks[:-1]:
                fully_shard(block, mesh=mesh)
            module = fully_shard(tower, mesh=mesh)
        y = module(image)
        y.square().sum().backward()
        grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in tower.parameters()]
        results.append([y.detach(), *grads])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-10 * a.abs().max().clamp(min=1)
