"""What is known of timm's insides: rotary tables in float32, grouped queries, gates, poolings that are not known."""

from __future__ import annotations

import inspect

import pytest
import torch
from timm.models.eva import Eva, EvaBlock
from torch import nn

from open_clip import ImageTower, timm_blocks
from open_clip.readouts import build_readout


@pytest.mark.parametrize("kind", ["eva02", "attn_rope", "rope_mixed"])
@torch.no_grad()
def test_rotary_tables_are_made_in_float32(tiny, kind):
    """The table of a trunk in half precision, and under autocast, is that of the float32 one."""
    grid = (9, 70)  # far enough for rounded frequencies to show
    tower = tiny(kind).visual
    expected = timm_blocks.rotary_table(tower.trunk, grid)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(timm_blocks.rotary_table(tower.trunk, grid), expected)
    if kind == "rope_mixed":  # its frequencies are weights
        return
    for half in (tower.bfloat16(), tower.half(), tower.float().to(torch.bfloat16)):
        table = timm_blocks.rotary_table(half.trunk, grid)
        assert table.dtype == torch.float32 and torch.equal(table, expected)
    dense = tower.encode_dense(torch.randn(1, 3, 32, 48, dtype=torch.bfloat16), readout="kk_bare")
    assert dense.dtype == torch.bfloat16 and dense.isfinite().all()


OPTIONS = {
    "gated": {},  # an option of the blocks, which trunks do not pass on
    "qk_norm": {"attn_type": "rope", "qk_norm": True},
    "grouped": {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 2},
    "half": {"attn_type": "rope", "rope_type": "dinov3", "rope_rotate_half": True},
}


@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_attention_of_later_releases(option):
    """Where timm has it: the ordinary attention spelt out here equals the module's own, and values pass alone."""
    needed = {"gated_attn": EvaBlock} if option == "gated" else dict.fromkeys(OPTIONS[option], Eva)
    if missing := [n for n, owner in needed.items() if n not in inspect.signature(owner).parameters]:
        pytest.skip(f"this release of timm has no {', '.join(missing)}")
    torch.manual_seed(0)
    trunk = Eva(
        img_size=32, patch_size=8, num_classes=16, global_pool="token", embed_dim=48, depth=2, num_heads=4,
        use_rot_pos_emb=True, dynamic_img_size=True, scale_attn_inner=True, **OPTIONS[option],
    )  # fmt: skip
    if option == "gated":
        trunk.blocks[-1] = EvaBlock(48, 4, gated_attn=True, scale_attn_inner=True)
    for parameter in trunk.parameters():
        nn.init.normal_(parameter, std=0.3)
    tower = ImageTower(trunk, image_size=32).eval().double()
    inputs = tower.block_inputs(torch.randn(2, 3, 32, 48, dtype=torch.float64))
    block, x = trunk.blocks[-1], inputs.tokens[inputs.last]
    y = block.norm1(x)
    attention = block.attn(y, rope=inputs.table)
    bare = build_readout("vanilla_bare", tower).tokens(inputs)
    torch.testing.assert_close(bare, attention[:, 1:])
    alone = block.attn(y.reshape(-1, 1, y.shape[-1])).reshape(y.shape)  # without the table: no token is turned
    torch.testing.assert_close(timm_blocks.value_attention(block.attn, y), alone)
    if option == "gated":
        with pytest.raises(ValueError, match="no form for gated attention"):
            build_readout("proxyclip", tower)


def test_unknown_attention_and_pooling_are_refused(tiny):
    tower = tiny("vit").visual
    tower.trunk.blocks[0].attn = nn.MultiheadAttention(48, 4)
    with pytest.raises(TypeError, match="no dense reading for an attention of type MultiheadAttention"):
        tower.readout.unread(tower)
    tower = tiny("siglip").visual
    tower.trunk.attn_pool = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="no dense reading for a pooling of type Linear"):
        tower.encode_dense(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind", ["eva02", "vit"])
def test_export_with_any_number_of_images(tiny, kind, dense):
    tower = tiny(kind).visual

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tower

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.tower.encode_dense(image) if dense else self.tower(image)

    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(Call(), (torch.randn(2, 3, 32, 32),), dynamic_shapes={"image": {0: batch}})
    image = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(image), Call()(image))


class Adapted(nn.Linear):
    """A fused projection with a low-rank addition, as LoRA's packages make it."""

    def __init__(self, plain: nn.Linear, rank: int = 2) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None)
        self.load_state_dict(plain.state_dict())
        self.down, self.up = nn.Linear(plain.in_features, rank), nn.Linear(rank, plain.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.up(self.down(x))


@pytest.mark.parametrize("index", [-1, -2])
def test_an_adapted_projection_is_called(tiny, index):
    """Readings that spell attention out see what the trunk sees, with and without knowing the pictures' sizes."""
    tower, folded = tiny("vit").visual, tiny("vit").visual
    attn, image = tower.trunk.blocks[index].attn, torch.randn(2, 3, 32, 32)
    attn.qkv = Adapted(attn.qkv)
    with torch.no_grad():
        plain = folded.trunk.blocks[index].attn.qkv
        plain.weight += attn.qkv.up.weight @ attn.qkv.down.weight
        plain.bias += attn.qkv.up.weight @ attn.qkv.down.bias + attn.qkv.up.bias
    torch.testing.assert_close(tower(image), tower.trunk(image))
    for name in ("value", "qq", "csa"):
        ours, theirs = (t.encode_dense(image, readout=name) for t in (tower, folded))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    sizes, part = [(32, 16), (16, 32)], [(slice(None), slice(None, 2)), (slice(None, 2), slice(None))]
    whole, known = tower.encode_dense(image), tower.encode_dense(image, sizes=sizes)
    for i, (rows, columns) in enumerate(part):
        torch.testing.assert_close(known[i][:, rows, columns], whole[i][:, rows, columns], rtol=1e-4, atol=1e-5)
    known.square().sum().backward()
    assert attn.qkv.up.weight.grad.abs().max() > 0


def test_hooks_of_the_last_blocks_are_called(tiny):
    tower, image, seen = tiny("vit").visual, torch.randn(2, 3, 32, 32), []
    before = tower(image), tower.encode_dense(image, sizes=[(32, 16)] * 2)
    for i, block in enumerate(tower.trunk.blocks):
        block.mlp.register_forward_hook(lambda m, args, out, i=i: seen.append((i, out.shape[1])))
    torch.testing.assert_close(tower(image), before[0])
    assert seen == [(i, 17) for i in range(3)]
    after = tower.encode_dense(image, sizes=[(32, 16)] * 2)
    torch.testing.assert_close(after[..., :2], before[1][..., :2])
    assert (1, 17) in seen[3:]
