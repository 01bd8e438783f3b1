"""Dense passes without padding, against each image by itself in plain loops; and what is left out of ordinary ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torchvision.ops import roi_align

from open_clip import build_readout, image_tower, packed_blocks
from open_clip.packed_blocks import runs
from open_clip.padding import Canvas
from open_clip.readouts import SPEC_KEY
from open_clip.weights import export_state_dict, load_state

KINDS = ["vit", "eva02", "eva01", "eva_postnorm", "layerscale", "eva_layerscale", "attn_rope", "rope_mixed", "siglip"]
SIDE, PATCH = 64, 8
# Landscape, portrait, square, and sides that are no multiple of the patch.
SIZES = {
    "mixed": [(48, 64), (64, 37), (64, 64), (48, 64)],
    "equal": [(41, 64), (43, 64)],
    "one": [(64, 20)],
    "square": [(64, 64), (64, 64)],
}


def plain_map(model, image: Tensor, size: tuple[int, int]) -> Tensor:
    """Dense map ``[D, rows, columns]`` of one image, of its own tokens: none of the packing's code is in it."""
    tower, trunk = model.visual, model.visual.trunk
    rows, columns = (-(-side // tower.patch_size) for side in size)
    side, prefix = image.shape[-1] // tower.patch_size, tower.num_prefix_tokens
    inside = [y * side + x for y in range(rows) for x in range(columns)]
    x, table = tower.embed(image[None])
    x = x[:, [*range(prefix), *(prefix + i for i in inside)]]
    for index, block in enumerate(trunk.blocks):
        turn = {}
        if table is not None:
            own = table[index] if table.dim() == 4 else table
            turn = {"rope": own[..., inside, :]}
        if index + 1 < len(trunk.blocks) or tower.pools_by_attention:
            x = block(x, **turn)
        else:  # no token sees another: each is a sequence of its own
            x = x[:, prefix:].transpose(0, 1)
            still = {n: torch.cat([torch.zeros(1, t.shape[-1] // 2), torch.ones(1, t.shape[-1] // 2)], -1)
                     for n, t in turn.items()}  # fmt: skip
            attn = block.attn
            kept, attn.num_prefix_tokens = getattr(attn, "num_prefix_tokens", None), 0
            x = block(x, **{n: t.expand(*turn[n].shape[:-2], 1, -1) for n, t in still.items()}).transpose(0, 1)
            attn.num_prefix_tokens = kept
            prefix = 0
    x = x[:, prefix:]
    x = trunk.norm(x)
    if tower.pools_by_attention:
        x = torch.cat([trunk.attn_pool(x[:, i : i + 1])[:, None] for i in range(x.shape[1])], dim=1)
    x = F.normalize(trunk.head(trunk.fc_norm(x)), dim=-1)
    return x[0].T.unflatten(1, (rows, columns))


def regions(sizes):
    """Boxes in pixels (touching the image's border among them) and masks of cells, per image."""
    boxes, masks = [], []
    for height, width in sizes:
        boxes.append(torch.tensor([[0.0, 0, width, height], [width / 3, height / 4, width, height], [3, 5, 19, 17]]))
        mask = torch.zeros(2, SIDE // PATCH, SIDE // PATCH, dtype=torch.bool)
        mask[0, : -(-height // PATCH), : -(-width // PATCH)] = True
        mask[1, 0, :2] = True
        masks.append(mask)
    return boxes, masks


@pytest.mark.parametrize("which", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_maps_boxes_and_masks_are_those_of_each_image_by_itself(tiny, kind, which):
    model, sizes = tiny(kind).double(), SIZES[which]
    if kind in ("eva02", "attn_rope", "rope_mixed", "eva_layerscale"):
        model.float()  # rotary tables are float32
    dtype = next(model.parameters()).dtype
    tower, (boxes, masks) = model.visual, regions(sizes)
    unit = tower.patch_size // PATCH
    sizes = [(height * unit, width * unit) for height, width in sizes]
    image = torch.randn(len(sizes), 3, SIDE * unit, SIDE * unit, dtype=dtype)
    expected_boxes, expected_masks = [], []
    for one, size, corners, mask in zip(image, sizes, boxes, masks, strict=True):
        dense = plain_map(model, one, size)
        # Beyond its border a map goes on as it ends, which is what torchvision's RoIAlign takes the border for.
        expected_boxes.append(roi_align(dense[None], [corners.to(dtype) / PATCH], 1, 1.0, -1, True)[..., 0, 0])
        cells = mask[:, : dense.shape[1], : dense.shape[2]]
        expected_masks.append(torch.stack([dense[:, m].mean(1) for m in cells]))
    tower.set_drop_padding(True)
    maps = model.encode_dense(image, keep_shape=True, sizes=sizes)
    for one, size, whole in zip(image, sizes, maps, strict=True):
        own = plain_map(model, one, size)
        torch.testing.assert_close(whole[:, : own.shape[1], : own.shape[2]], own, rtol=0, atol=1e-5)
    shares = [b / SIDE for b in boxes]
    got = model.encode_regions(image, shares, masks, sizes=sizes)
    torch.testing.assert_close(got[0], torch.cat(expected_boxes), rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1], torch.cat(expected_masks), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.encode_pseudo_boxes(image, shares, sizes=sizes), got[0])
    torch.testing.assert_close(model.encode_masks(image, masks, normalize=False, sizes=sizes), got[1])


@pytest.mark.parametrize("kind", ["vit", "eva02"])
def test_gradients_are_those_of_each_image_by_itself(tiny, kind):
    """Also with checkpointing."""
    model, sizes = tiny(kind), SIZES["mixed"]
    image = torch.randn(len(sizes), 3, SIDE, SIDE)
    weight = torch.randn(model.visual.embed_dim, SIDE // PATCH, SIDE // PATCH)
    sums = []
    for one, size in zip(image, sizes, strict=True):
        dense = plain_map(model, one, size)
        sums.append((dense * weight[:, : dense.shape[1], : dense.shape[2]]).sum())
    parameters = [p for n, p in model.visual.named_parameters()]
    expected = torch.autograd.grad(sum(sums), parameters, allow_unused=True)
    model.visual.set_drop_padding(True)
    for checkpointing in (False, True):
        model.visual.grad_checkpointing = checkpointing
        maps, total = model.encode_dense(image, keep_shape=True, sizes=sizes), 0
        for one, (height, width) in zip(maps, sizes, strict=True):
            part = slice(None), slice(-(-height // PATCH)), slice(-(-width // PATCH))
            total = total + (one[part] * weight[part]).sum()
        got = torch.autograd.grad(total, parameters, allow_unused=True)
        for ours, theirs in zip(got, expected, strict=True):
            if ours is None or theirs is None:  # queries and keys of the last block, which have no effect
                assert all(t is None or t.abs().max() < 1e-7 for t in (ours, theirs))
                continue
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("kind", ["vit", "eva02", "rope_mixed"])
def test_a_square_with_its_padding_and_the_image_alone_are_the_same(tiny, kind):
    """Programs that cut images to whole cells instead of padding them to a square see the same map."""
    model = tiny(kind)
    image = torch.randn(2, 3, SIDE, SIDE)
    model.visual.set_drop_padding(True)
    padded = model.encode_dense(image, keep_shape=True, sizes=[(45, SIDE)] * 2)
    alone = model.encode_dense(image[:, :, :48], keep_shape=True)
    torch.testing.assert_close(padded[:, :, :6], alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(padded[:, :, 6:], alone[:, :, 5:].expand(-1, -1, 2, -1), rtol=0, atol=1e-6)


READINGS = ["value_bare", "vanilla", "sclip", "clearclip", "naclip", "csa", "all", "multi-v:2", "gated:2", "tokens",
            "window:4"]  # fmt: skip


@pytest.mark.parametrize("name", READINGS)
@pytest.mark.parametrize("kind", ["vit", "eva02"])
def test_every_reading_of_a_packed_batch_is_that_of_single_images(tiny, kind, name):
    model, sizes = tiny(kind), SIZES["mixed"]
    model.visual.set_drop_padding(True)
    readout = build_readout(name, model.visual)
    image = torch.randn(len(sizes), 3, SIDE, SIDE)
    together = model.visual.encode_dense(image, readout=readout, sizes=sizes)
    levels = model.visual.dense_tokens(image, take=(0, 1, 2), readout=readout, sizes=sizes)[1]
    for i, (height, width) in enumerate(sizes):
        rows, columns = -(-height // PATCH), -(-width // PATCH)
        side = SIDE if max(height, width) == SIDE else None
        assert side  # the square around the image is the canvas
        alone = image[i : i + 1, :, : rows * PATCH, : columns * PATCH]
        own = model.visual.encode_dense(alone, readout=readout)
        torch.testing.assert_close(together[i : i + 1, :, :rows, :columns], own, rtol=1e-4, atol=1e-5)
        own_levels = model.visual.dense_tokens(alone, take=(0, 1, 2), readout=readout)[1]
        for level, expected in zip(levels, own_levels, strict=True):
            assert level.shape[-2:] == (8, 8)
            torch.testing.assert_close(level[i : i + 1, :, :rows, :columns], expected, rtol=1e-4, atol=1e-4)


def test_projections_of_a_packed_batch(tiny):
    model, sizes = tiny("eva02"), SIZES["mixed"]
    model.visual.set_drop_padding(True)
    image = torch.randn(len(sizes), 3, SIDE, SIDE)
    together = model.visual.block_inputs(image, sizes=sizes).projection("k")
    alone = model.visual.block_inputs(image[1:2, :, :, :40]).projection("k")
    torch.testing.assert_close(together.unflatten(1, (8, 8))[1, :, :5].flatten(0, 1), alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", SIZES)
@pytest.mark.parametrize("kind", ["vit", "eva02", "eva01", "attn_rope", "rope_mixed"])
def test_what_nobody_reads_is_left_out_and_changes_nothing(tiny, kind, which, monkeypatch):
    """The published function: regions, and gradients, with sizes and without."""
    model, sizes = tiny(kind), SIZES[which]
    image = torch.randn(len(sizes), 3, SIDE, SIDE)
    boxes, masks = regions(sizes)
    shares, called = [b / SIDE for b in boxes], []
    original = image_tower.DensePasses._read_inputs.__globals__["partial_block"]

    def counted(*args):
        called.append(args[2].shape[:2].numel())  # cells whose outputs are made
        return original(*args)

    monkeypatch.setitem(image_tower.DensePasses._read_inputs.__globals__, "partial_block", counted)
    parameters, results = list(model.visual.parameters()), []
    for given in (None, sizes):
        out = torch.cat(model.encode_regions(image, shares, masks, sizes=given))
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append((out, *torch.autograd.grad((out * weight).sum(), parameters, allow_unused=True)))
    for theirs, ours in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5 * max(1.0, theirs.abs().max().item()))
    kept = {"mixed": 7 * 8 + 8 * 6 + 64 + 7 * 8, "equal": 2 * 7 * 8, "one": 8 * 4, "square": None}[which]
    assert called == ([] if kept is None else [kept])


@pytest.mark.parametrize("dropped", [True, False])
def test_attention_of_changing_shapes_does_not_take_the_kernel_that_is_built_for_each(tiny, dropped, monkeypatch):
    """Also where it is computed again in the backward pass; the caller's own choice stands."""
    model, sizes = tiny("eva02"), SIZES["mixed"]
    model.visual.set_drop_padding(dropped)
    model.set_grad_checkpointing(True)
    seen, original = [], F.scaled_dot_product_attention

    def noted(q, k, v, *args, **kwargs):
        order = torch._C._get_sdp_priority_order()
        rank = {kernel: order.index(int(kernel)) for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)}
        seen.append((len(q) == 1 or q.shape[2] != k.shape[2], min(rank, key=rank.get)))
        return original(q, k, v, *args, **kwargs)

    image = torch.randn(len(sizes), 3, SIDE, SIDE)
    boxes = [b / SIDE for b in regions(sizes)[0]]
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    for kernels in (packed_blocks.CHANGING, ()):
        seen.clear()
        model.visual.changing_kernels = kernels
        with packed_blocks.prefer(("CUDNN_ATTENTION", *packed_blocks.CHANGING)):
            model.encode_pseudo_boxes(image, boxes, sizes=sizes).sum().backward()
        changing = {kernel for changes, kernel in seen if changes}
        assert changing == {SDPBackend.FLASH_ATTENTION if kernels else SDPBackend.CUDNN_ATTENTION}
        assert {kernel for changes, kernel in seen if not changes} <= {SDPBackend.CUDNN_ATTENTION}
        assert torch._C._get_sdp_priority_order()[0] == int(SDPBackend.FLASH_ATTENTION)  # as it was


def test_the_choice_travels_with_the_weights(tiny):
    model, other = tiny("eva02"), tiny("eva02")
    assert SPEC_KEY not in model.state_dict()
    model.visual.set_drop_padding(True)
    state = export_state_dict(model)
    load_state(other, dict(state))
    assert other.visual.drop_padding and other.visual.readout.name == "value"
    model.visual.set_readout("gated:2")
    load_state(other, export_state_dict(model))
    assert other.visual.drop_padding and other.visual.readout.name == "gated:2"
    model.visual.set_readout("value")
    model.visual.set_drop_padding(False)
    assert SPEC_KEY not in model.state_dict()
    load_state(other, dict(state))
    with pytest.raises(ValueError, match="does not fit"):
        load_state(other, {n: t for n, t in model.state_dict().items() if "norm" not in n})
    assert other.visual.drop_padding  # as it was


def test_wrong_sizes_are_refused(tiny):
    model = tiny("vit")
    model.visual.set_drop_padding(True)
    image = torch.zeros(2, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match="1 sizes for 2 images"):
        model.encode_dense(image, sizes=[(64, 64)])
    with pytest.raises(ValueError, match="image 1 takes 80x64 pixels of an input of 64x64"):
        model.encode_dense(image, sizes=[(64, 64), (80, 64)])
    with pytest.raises(ValueError, match='has no form without padding; use "v2"'):
        model.encode_pseudo_boxes(image, [torch.rand(1, 4).sort().values] * 2, extract_type="v1")
    model.visual.trunk.blocks[0].attn.proj_drop.p = 0.1
    model.encode_dense(image, sizes=[(64, 64), (64, 40)])  # in eval mode nothing is dropped
    with pytest.raises(ValueError, match="dropout"):
        model.train().encode_dense(image, sizes=[(64, 64), (64, 40)])


def test_layout_of_a_canvas():
    canvas = Canvas.of([(48, 64), (64, 37)], 2, (8, 8), 8)
    assert canvas.taken == ((6, 8), (8, 5)) and not canvas.uniform and not canvas.full
    assert Canvas.of([(48, 64), (64, 64)], 2, (8, 8), 8, margin=1).taken == ((7, 8), (8, 8))
    cells = torch.arange(128.0).view(2, 64, 1)
    there = canvas.gather(cells)
    assert there.shape == (1, 88, 1)
    back = canvas.spread(there).view(2, 8, 8)
    assert torch.equal(back[0, :6], cells.view(2, 8, 8)[0, :6]) and torch.equal(back[0, 7], back[0, 5])
    assert torch.equal(back[1, :, 6], back[1, :, 4])
    assert runs([3, 3, 5, 3]) == [(0, 3, 2), (6, 5, 1), (11, 3, 1)]
