"""Fusion, dynamic blocks and the head against numbers recorded from the reference, and against plain loops."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ovdet.glip.dyconv import DyConv, DynamicReLU, deformable
from ovdet.glip.fusion import BiAttention, FusionBlock, _limits_act
from ovdet.glip.head import GroundingHead, HeadOptions, Text, flatten_levels
from ovdet.glip.names import to_glip

LEVELS = 5
# The recorded numbers are float32: against the same formulas in float64 they are off by up to 3e-6 in one block, and by
# 2e-5 after two.
TOLERANCE = {"rtol": 0, "atol": 5e-6}


def levels(content: dict[str, Tensor], key: str) -> list[Tensor]:
    """``key0``, ``key1``, ... of a file."""
    return [content[f"{key}{i}"] for i in range(LEVELS)]


def load_part(
    module: torch.nn.Module, content: dict[str, Tensor], prefix: str, below: str, *, fusion: bool = True
) -> None:
    """Load the recorded weights ``w/*`` of a part of the head, all of them and nothing else.

    Args:
        prefix: place of the part in our model; below: in the reference's head.
    """
    names = {name: to_glip(prefix + name, fusion=fusion) for name in module.state_dict()}
    names = {name: "w/" + recorded.removeprefix("rpn.head." + below) for name, recorded in names.items()}
    assert set(names.values()) == {key for key in content if key.startswith("w/")}
    module.load_state_dict({name: content[recorded] for name, recorded in names.items()})


def deformable_by_loops(x: Tensor, offset_mask: Tensor, kernel: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """The published kernel's arithmetic, number by number, on its flat map of offsets."""
    number, channels, height, width = x.shape
    h, w = -(-height // stride), -(-width // stride)
    out = torch.zeros(number, len(kernel), h, w, dtype=x.dtype)

    def sample(image: int, y: float, z: float) -> Tensor:
        value = torch.zeros(channels, dtype=x.dtype)
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(z), math.floor(z) + 1):
                if 0 <= row < height and 0 <= column < width:
                    value += x[image, :, row, column] * (1 - abs(y - row)) * (1 - abs(z - column))
        return value

    for image in range(number):
        offsets = offset_mask[image, :18].flatten()
        weights = offset_mask[image, 18:].sigmoid().flatten()
        for i in range(h):
            for j in range(w):
                for tap in range(9):
                    dy = offsets[((2 * tap) * h + i) * w + j].item()
                    dx = offsets[((2 * tap + 1) * h + i) * w + j].item()
                    y, z = i * stride - 1 + tap // 3 + dy, j * stride - 1 + tap % 3 + dx
                    if y > -1 and z > -1 and y < height and z < width:
                        weight = weights[(tap * h + i) * w + j]
                        out[image, :, i, j] += kernel[:, :, tap // 3, tap % 3] @ sample(image, y, z) * weight
    return out + bias[:, None, None]


def random_deformable(x: tuple[int, ...], grid: tuple[int, int], outputs: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    shapes = (x, (x[0], 27, *grid), (outputs, x[1], 3, 3), (outputs,))
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize(
    ("x", "grid", "stride"), [((2, 3, 3, 4), (3, 4), 1), ((1, 3, 2, 3), (4, 5), 1), ((2, 3, 5, 4), (3, 2), 2)]
)
def test_deformable_convolution_is_the_published_arithmetic(x: tuple, grid: tuple, stride: int):
    image, offset_mask, kernel, bias = random_deformable(x, grid)
    got = deformable(image, offset_mask[:, :18], offset_mask[:, 18:].sigmoid(), kernel, bias, stride)
    assert torch.allclose(got, deformable_by_loops(image, offset_mask, kernel, bias, stride), atol=1e-12)


@pytest.mark.recorded("glip/deform.npz", r"(\w+)/x")
def test_deformable_convolution_matches_the_recorded_one(arrays, case: str):
    content = {k.partition("/")[2]: v for k, v in arrays("deform.npz").items() if k.startswith(f"{case}/")}
    offsets, weights = content["offset_mask"].split((18, 9), dim=1)
    stride = int(case.partition("stride")[2] or 1)
    got = deformable(content["x"], offsets, weights.sigmoid(), content["weight"], content["bias"], stride)
    assert torch.allclose(got, content["y"], **TOLERANCE)


@pytest.mark.parametrize("stable", [False, True])
def test_fusion_matches_the_recorded_one(arrays, stable: bool):
    content = arrays("fusion.npz")
    prefix = "stable_softmax_2d/out/" if stable else "out/"
    visual, width = len(content["w/gamma_v"]), len(content["w/attn.v_proj.bias"])
    block = FusionBlock(visual, len(content["w/gamma_l"]), width, stable=stable).eval()
    load_part(block, content, "head.blocks.0.fusion.", "dyhead_tower.0.b_attn.")
    maps, mask = levels(content, "visual"), content["mask"].bool()
    seen, read = block(flatten_levels(maps), content["lang"], mask)
    assert torch.allclose(seen, flatten_levels(levels(content, prefix + "visual")), **TOLERANCE)
    assert torch.allclose(read, content[prefix + "lang"], **TOLERANCE)
    inputs = block.norm_v(flatten_levels(maps)), block.norm_l(content["lang"])
    gains = block.attn(*inputs, mask)
    for gain, name in zip(gains, ("delta_v", "delta_l"), strict=True):
        assert torch.allclose(gain, content[prefix + name], **TOLERANCE)
    if not stable:  # logits beyond the limits
        with torch.no_grad():
            block.attn.v_proj.weight *= 1e4
            block.attn.l_proj.weight *= 1e3
            gains = block.attn(*inputs, mask)
        for gain, name in zip(gains, ("delta_v", "delta_l"), strict=True):
            assert torch.allclose(gain, content["clamped/" + name], **TOLERANCE)


def test_fused_attention_is_the_plain_one():
    """Values and gradients in float64; where a limit may act the plain form is taken."""
    torch.manual_seed(0)
    block = BiAttention(12, 10, 16, heads=4).double().eval()
    visual, text = torch.randn(2, 9, 12, dtype=torch.float64), torch.randn(2, 5, 10, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[3], [5]])
    results = []
    for fused in (True, False):
        block.fused = fused
        inputs = visual.clone().requires_grad_(), text.clone().requires_grad_()
        gains = block(*inputs, mask)
        sum(gain.sin().sum() for gain in gains).backward()
        results.append([*gains, *(i.grad for i in inputs), block.l_proj.weight.grad.clone()])
        block.zero_grad()
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    large = torch.full((1, 1, 2, 4), 200.0)
    assert _limits_act(large, large) and not _limits_act(large, large / 10) and _limits_act(large * torch.nan, large)


def test_fused_attention_does_not_take_the_kernel_that_is_built_for_each_shape(monkeypatch):
    """Cells and tokens are as many as the pictures and prompts of a batch have."""
    first, original = [], F.scaled_dot_product_attention

    def noted(*args, **kwargs):
        first.append(torch._C._get_sdp_priority_order()[0])
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    block = BiAttention(12, 10, 16, heads=4).eval()
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        block(torch.randn(2, 9, 12), torch.randn(2, 5, 10), torch.ones(2, 5, dtype=torch.bool))
    assert first == [int(SDPBackend.FLASH_ATTENTION)] * 2


def test_logits_beyond_the_limit_do_no_harm_in_bfloat16():
    """Of one huge logit the softmax is a choice of one: the token, and the cell, of the largest product."""
    block = BiAttention(4, 4, 4, heads=1).eval()
    identity, zero = torch.eye(4), torch.zeros(4)
    for linear in block.children():
        linear.weight.data, linear.bias.data = identity.clone(), zero.clone()
    block.v_proj.weight.data *= 1e4
    block.l_proj.weight.data *= 1e4
    visual, text = torch.eye(4)[None, :3].requires_grad_(), torch.eye(4)[None, [2, 0, 1]].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        seen, read = block(visual, text, torch.ones(1, 3, dtype=torch.bool))
    assert torch.equal(seen.float(), torch.eye(4)[None, :3]) and torch.equal(read.float(), text)
    (seen.sum() + read.sum()).backward()
    assert visual.grad.isfinite().all() and text.grad.isfinite().all()


def test_padding_tokens_are_read_by_nobody():
    """So that texts need no padding beyond the longest of a batch."""
    torch.manual_seed(0)
    options = HeadOptions(
        channels=16, text_width=8, blocks=2, fusion_width=16, fusion_heads=2, text_heads=2, text_hidden=16, groups=4
    )
    head = GroundingHead(options).eval()
    maps = [torch.randn(2, 16, h, w) for h, w in ((8, 6), (4, 3), (2, 2), (1, 1), (1, 1))]
    hidden, mask = torch.randn(2, 7, 8), torch.arange(7) < torch.tensor([[4], [5]])
    long = head(maps, Text(hidden, mask))
    short = head(maps, Text(hidden[:, :5], mask[:, :5]))
    assert torch.allclose(long.tokens[..., :5][0][:, :4], short.tokens[0][:, :4], atol=1e-6)
    assert torch.allclose(long.boxes, short.boxes, atol=1e-6)
    assert torch.allclose(long.centerness, short.centerness, atol=1e-6)


def groups_of(content: dict[str, Tensor], error: Callable[[int], float]) -> int:
    """The number of groups, which the recorded arrays do not say: the one that fits best."""
    width = content["visual0"].shape[1]
    return min((g for g in range(1, width) if width % g == 0), key=error)


def test_dynamic_block_matches_the_recorded_one(arrays):
    content = arrays("dyconv.npz")
    maps, wanted = levels(content, "visual"), levels(content, "out")

    def error(groups: int) -> float:
        block = DyConv(maps[0].shape[1], groups=groups).eval()
        load_part(block, content, "head.blocks.0.dyconv.", "dyhead_tower.2.")
        with torch.no_grad():
            return max((a - b).abs().max().item() for a, b in zip(block(maps), wanted, strict=True))

    assert error(groups_of(content, error)) < TOLERANCE["atol"]
    assert torch.allclose(F.hardsigmoid(content["h_sigmoid/x"]), content["h_sigmoid/y"], **TOLERANCE)
    relu = DynamicReLU(content["dyrelu/x"].shape[1])
    relu.load_state_dict({k.removeprefix("w/relu."): v for k, v in content.items() if k.startswith("w/relu.")})
    assert torch.allclose(relu(content["dyrelu/x"]), content["dyrelu/y"], **TOLERANCE)


def test_aligned_offsets_meet_their_own_place():
    """With the same weights, the aligned form convolves the enlarged coarser map, the released one the small one."""
    torch.manual_seed(0)
    maps = [torch.randn(1, 8, s, s) for s in (8, 4, 2)]
    released, aligned = DyConv(8, groups=2), DyConv(8, groups=2, offsets="aligned")
    aligned.load_state_dict(released.state_dict())
    for block in (released, aligned):  # without offsets and at full weight the forms differ in order alone
        torch.nn.init.zeros_(block.offset.weight)
        torch.nn.init.constant_(block.offset.bias, 0.0)
        block.offset.bias.data[18:] = 100.0
    level, finest = maps[1], aligned(maps)[0]
    enlarged = F.interpolate(level, size=(8, 8), mode="bilinear", align_corners=True)
    conv = aligned.convs[0]
    view = conv.norm(F.conv2d(enlarged, conv.conv.weight, conv.conv.bias, padding=1))
    own = aligned.convs[1]
    views = [own.norm(F.conv2d(maps[0], own.conv.weight, own.conv.bias, padding=1)), view]
    gates = [F.hardsigmoid(F.relu(aligned.scale_attention(v.mean((2, 3), keepdim=True)))) for v in views]
    wanted = aligned.relu((views[0] * gates[0] + views[1] * gates[1]) / 2)
    assert torch.allclose(finest, wanted, atol=1e-5)
    assert not torch.allclose(released(maps)[0], finest, atol=1e-2)
    with pytest.raises(ValueError, match="released, aligned"):
        DyConv(8, offsets="other")


@pytest.mark.parametrize("name", ["head_fused", "head_late"])
def test_head_matches_the_recorded_one(arrays: Callable, glip_golden: Path, name: str):
    content = arrays(f"{name}.npz")
    fusion = name == "head_fused"
    shapes = json.loads((glip_golden / f"{name}_names.json").read_text())
    assert {k: list(v.shape) for k, v in content.items() if k.startswith("w/")} == {f"w/{k}": v for k, v in shapes}
    maps, width = levels(content, "visual"), content["hidden"].shape[-1]
    blocks = sum(k.endswith("offset.bias") for k in content)
    sizes = {}
    if fusion:
        sizes = {
            "fusion_width": len(content["w/dyhead_tower.0.b_attn.attn.v_proj.bias"]),
            "text_hidden": len(content["w/dyhead_tower.1.intermediate.dense.bias"]),
        }
    text = Text(content["hidden"], content["mask"].bool())

    def head(groups: int) -> GroundingHead:
        options = HeadOptions(
            channels=maps[0].shape[1], text_width=width, blocks=blocks, fusion=fusion, text_heads=4, groups=groups,
            levels=LEVELS, classifier=len(content["w/cls_logits.bias"]), **sizes,
        )  # fmt: skip
        made = GroundingHead(options).eval()
        load_part(made, content, "head.", "", fusion=fusion)
        return made

    @torch.no_grad()
    def error(groups: int) -> float:
        return (head(groups).tower(maps, text)[0][0] - content["out/tower0"]).abs().max().item()

    made = head(groups_of(content, error))
    with torch.no_grad():
        tower, read = made.tower(maps, text)
        out = made.predict(tower, read)
    close = {"rtol": 0, "atol": 2e-5}
    for got, wanted in zip(tower, levels(content, "out/tower"), strict=True):
        assert torch.allclose(got, wanted, rtol=0, atol=4e-5)
    assert torch.allclose(read.hidden, content["out/hidden"], **close)
    for i, (features, part) in enumerate(zip(tower, split(out, tower), strict=True)):
        tokens, boxes, centerness = part
        assert torch.allclose(tokens, content[f"out/dot{i}"], **close)
        assert torch.allclose(boxes, content[f"out/reg{i}"].flatten(2).transpose(1, 2), **close)
        assert torch.allclose(centerness, content[f"out/ctr{i}"].flatten(1), **close)
        assert torch.allclose(made.cls_logits(features), content[f"out/cls{i}"], **close)
    assert out.grids == [tuple(x.shape[-2:]) for x in maps]


def split(out, maps) -> list[tuple[Tensor, Tensor, Tensor]]:
    """A head's output by level."""
    sizes = [x.shape[2] * x.shape[3] for x in maps]
    parts = (out.tokens.split(sizes, 1), out.boxes.split(sizes, 1), out.centerness.split(sizes, 1))
    return list(zip(*parts, strict=True))
