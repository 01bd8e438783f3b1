"""Dense readings on every kind of trunk: against attention spelt out, and what they do not read, by gradients."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from open_clip import timm_blocks
from open_clip.image_tower import ImageTower
from open_clip.readouts import build_readout, list_readouts
from open_clip.readouts.last_block import MIXINGS, gaussian_neighbourhood
from open_clip.weights import export_state_dict, load_state, load_weights, reference_layout

KINDS = ["eva02", "eva01", "eva_postnorm", "eva_layerscale", "vit", "layerscale", "siglip", "attn_rope", "rope_mixed"]
# One of each kind, with the numbers that some take.
NAMES = [*MIXINGS, "tokens", "multi-v:2", "gated:2", "naclip:1.5", "window:3", "proxyclip"]
FEW = ["value", "value_bare", "kk_bare", "vv", "tokens", "gated:2", "proxyclip"]  # for trunks much like others
PAIRS = [(kind, name) for kind in KINDS for name in (NAMES if kind in ("eva02", "vit") else FEW)]


def image(tower: ImageTower, count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 3, 4 * tower.patch_size, 6 * tower.patch_size, dtype=dtype)


def reading(name: str, tower: ImageTower, images: Tensor):
    """A reading by name; ``proxyclip`` with a map, and gates that are open by different amounts."""
    torch.manual_seed(2)
    if name == "proxyclip":
        return build_readout(name, tower, external=torch.randn(len(images), 5, 7, 5, dtype=images.dtype))
    readout = build_readout(name, tower)
    for parameter in readout.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return readout


@contextmanager
def attention_seen(seen: dict[str, Tensor]):
    """What timm's own last attention hands to the kernel."""
    kernel = F.scaled_dot_product_attention

    def spy(q, k, v, *args, **kwargs):
        seen.update(q=q.detach(), k=k.detach(), v=v.detach())
        return kernel(q, k, v, *args, **kwargs)

    F.scaled_dot_product_attention = spy
    try:
        yield
    finally:
        F.scaled_dot_product_attention = kernel


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_mixings_are_attention_spelt_out(tiny, kind):
    """Queries, keys and values are those that timm's own forward pass makes, turned by position as it turns them."""
    model = tiny(kind).double()
    tower, prefix = model.visual, model.visual.num_prefix_tokens
    pictures = image(tower)
    inputs = tower.block_inputs(pictures)
    block, x = tower.trunk.blocks[-1], inputs.tokens[inputs.last]
    seen: dict[str, Tensor] = {}
    with attention_seen(seen):
        tower.run_block(inputs.last, x, inputs.table)
    scale = seen["q"].shape[-1] ** -0.5
    for name, mixing in MIXINGS.items():
        if name == "value" and kind == "siglip":
            continue
        readout = build_readout(name, tower, **({"scaled": True, "rotated": True} if mixing.pairs else {}))
        logits = [scale * seen[a] @ seen[b].transpose(-2, -1) for a, b in mixing.pairs]
        if mixing.gaussian:
            rows = torch.cartesian_prod(*(torch.arange(n) for n in inputs.grid)).double()
            near = torch.exp(-torch.cdist(rows, rows).square() / 50)
            logits = [p + F.pad(near, (prefix, 0, prefix, 0)) for p in logits]
        if mixing.merged:
            logits = [sum(logits) / len(logits)]
        weights = sum(p.softmax(-1) for p in logits) if logits else torch.eye(x.shape[1], dtype=x.dtype)
        y = timm_blocks.attention_input(block, x)
        mixed = timm_blocks.finish_attention(block.attn, (weights @ seen["v"]).transpose(1, 2).flatten(2), y)
        if mixing.full:
            out = timm_blocks.finish_block(block, x, mixed)
        else:
            out = timm_blocks.attention_branch(block, mixed)
        difference = (readout.tokens(inputs) - out[:, prefix:]).abs().max()
        # The neighbourhood is made in float32, all else in float64.
        assert difference < (1e-5 if mixing.gaussian else 1e-9), f"{name}: {difference}"


@pytest.mark.parametrize("kind", ["eva02", "vit", "siglip"])
@torch.no_grad()
def test_ordinary_readings_are_timms(tiny, kind):
    tower = tiny(kind).double().visual
    pictures = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    features = tower.trunk.forward_features(pictures)[:, tower.num_prefix_tokens :]
    torch.testing.assert_close(tower.encode_dense(pictures, False, readout="tokens"), features)
    inputs = tower.block_inputs(pictures)
    table = inputs.table
    ordinary = tower.run_block(inputs.last, inputs.tokens[inputs.last], table)[:, tower.num_prefix_tokens :]
    torch.testing.assert_close(build_readout("vanilla", tower).tokens(inputs), ordinary)
    if kind == "siglip":
        assert torch.equal(tower.encode_dense(pictures), tower.encode_dense(pictures, readout="vanilla"))


@pytest.mark.parametrize("kind", ["eva02", "vit"])
def test_declip_form_differs_on_eva_only(tiny, kind):
    tower = tiny(kind).double().visual
    with torch.no_grad():
        published, ordinary = (tower.encode_dense(image(tower), readout=name) for name in ("qq", "clearclip"))
        other = build_readout("qq", tower, scaled=True, rotated=True, normalized=True)
        torch.testing.assert_close(tower.encode_dense(image(tower), readout=other), ordinary)
    assert torch.allclose(published, ordinary) == (kind == "vit")
    assert build_readout("qq", tower).normalized == (kind == "vit")


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_what_is_not_read_is_exactly_what_gets_no_gradient(tiny, kind, name):
    tower = tiny(kind).double().visual
    pictures = image(tower)
    readout = reading(name, tower, pictures)
    unread = readout.unread(tower)
    dense = tower.encode_dense(pictures, readout=readout)
    (dense * torch.randn_like(dense)).sum().backward()
    whole = {u.name for u in unread if not u.index}
    parts = {n: [u.index for u in unread if u.name == n] for n in {u.name for u in unread if u.index}}
    assert not whole & set(parts)
    for parameter in tower.named_parameters():
        n, gradient = parameter[0], parameter[1].grad
        if n in whole:
            assert gradient is None or not gradient.any(), f"{n} is read"
            continue
        assert gradient is not None and gradient.any(), f"{n} is not read"
        for index in parts.get(n, []):
            assert not gradient[index].any(), f"{n}{index} is read"
            gradient[index] = 1.0
        if n in parts:
            # The rows of the three projections, for instance: none of them is left out besides.
            shares = gradient.chunk(3) if "qkv" in n else gradient.chunk(2) if "kv" in n else [gradient]
            assert all(share.any() for share in shares), f"more of {n} is not read"
    assert all(p.grad is not None and p.grad.any() for p in readout.parameters())


@pytest.mark.parametrize("kind", ["eva02", "vit"])
def test_a_trunk_of_one_block_has_prefix_tokens_that_values_never_meet(tiny, kind):
    tower = tiny(kind, layers=1).double().visual
    unread = tower.readout.unread(tower)
    tower.encode_dense(image(tower)).sum().backward()
    assert {"trunk.cls_token", "trunk.pos_embed"} <= {u.name for u in unread}
    for u in unread:
        assert u.parameter.grad is None or not u.parameter.grad[u.index].any(), u.name
    assert tower.trunk.pos_embed.grad[:, 1:].any()


@pytest.mark.parametrize("name", [*FEW, "naclip", "window:3", "multi-v:2"])
@pytest.mark.parametrize("kind", ["eva02"])
def test_gradient_checkpointing_changes_no_reading(tiny, kind, name):
    tower = tiny(kind).double().visual
    pictures = image(tower, count=1)
    readout = reading(name, tower, pictures)
    results = []
    for enable in (False, True):
        tower.grad_checkpointing = enable
        tower.zero_grad()
        dense = tower.encode_dense(pictures, readout=readout)
        dense.square().mul(torch.arange(dense.shape[1])[:, None, None]).sum().backward()
        results.append([dense.detach(), *(p.grad for p in tower.parameters() if p.grad is not None)])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("kind", ["eva02", "vit", "siglip"])
@torch.no_grad()
def test_many_readings_of_one_pass(tiny, kind):
    tower = tiny(kind).double().visual
    pictures = image(tower)
    given = [None, *(reading(n, tower, pictures) if n in ("gated:2", "proxyclip") else n for n in NAMES)]
    embeds = []
    tower.trunk.patch_embed.proj.register_forward_hook(lambda *_: embeds.append(1))
    many = tower.encode_dense_many(pictures, given)
    assert len(embeds) == 1 and list(many) == [None, *NAMES]
    for one, dense in zip(given, many.values(), strict=True):
        torch.testing.assert_close(dense, tower.encode_dense(pictures, readout=one))


@pytest.mark.parametrize("kind", ["eva02", "vit", "siglip"])
def test_windows_are_blocks_on_cuts_of_the_grid(tiny, kind):
    """A grid of 4 x 6 in windows of 3: two whole ones above, two of one row below; one by one, in a plain loop."""
    tower = tiny(kind).double().visual
    pictures, prefix, size = image(tower), tower.num_prefix_tokens, 3
    depth = len(tower.trunk.blocks)
    with torch.no_grad():
        x, table = tower.embed(pictures)
        for i in range(depth - (kind != "siglip")):
            if i == 1:
                x = tower.run_block(i, x, table)
                continue
            cells, out, prefixes = x[:, prefix:].unflatten(1, (4, 6)), torch.zeros_like(x[:, prefix:]), []
            out = out.unflatten(1, (4, 6))
            for top in (0, 3):
                for left in (0, 3):
                    cut = cells[:, top : top + size, left : left + size]
                    rotary = timm_blocks.rotary_table(tower.trunk, tuple(cut.shape[1:3]))
                    y = tower.run_block(i, torch.cat([x[:, :prefix], cut.flatten(1, 2)], 1), rotary)
                    prefixes.append(y[:, :prefix])
                    out[:, top : top + size, left : left + size] = y[:, prefix:].unflatten(1, cut.shape[1:3])
            x = torch.cat([torch.stack(prefixes).mean(0), out.flatten(1, 2)], dim=1)
        x = x[:, prefix:] if kind == "siglip" else timm_blocks.value_block(tower.trunk.blocks[-1], x[:, prefix:])
        readout = build_readout("window:3", tower, global_blocks=[1])
        torch.testing.assert_close(tower.dense_tokens(pictures, readout=readout)[0], x)
        whole = build_readout("window", tower, global_blocks=[])
        if kind != "eva02":  # positions of a rotary trunk are those within the window
            torch.testing.assert_close(tower.encode_dense(pictures, readout=whole), tower.encode_dense(pictures))


def test_published_global_blocks(tiny):
    tower = tiny("vit", layers=12).visual
    assert build_readout("window", tower).global_blocks == [2, 5, 8, 11]


@torch.no_grad()
def test_proxyclip_of_an_image_hinges_on_no_other_and_is_finite_on_uniform_ones(tiny):
    tower = tiny("vit").double().visual
    pictures = image(tower)
    maps = torch.stack([torch.randn(5, 4, 6), torch.ones(5, 4, 6)]).double()
    maps[1, :, 0, 0] = torch.tensor([-1.0, 0.5, 0.5, 0.5, -0.5])  # one cell unlike all others, mean near 1
    readout = build_readout("proxyclip", tower, external=maps)
    both = tower.encode_dense(pictures, readout=readout)
    for i in (0, 1):
        alone = tower.encode_dense(pictures[i : i + 1], readout=readout.bound(maps[i : i + 1]))
        torch.testing.assert_close(both[i : i + 1], alone)
    assert both.isfinite().all()
    finer = readout.bound(torch.randn(2, 3, 8, 10).double())
    assert tower.encode_dense(pictures, readout=finer).shape[-2:] == (8, 10)


def test_neighbourhood_of_naclip():
    near = gaussian_neighbourhood((2, 3), 1.5, 1, torch.zeros(1))
    assert not near[0].any() and not near[:, 0].any()
    assert near[1, 1] == 1 and near[1, 2 + 3].item() == pytest.approx(torch.tensor(-2 / 4.5).exp().item())


def test_gates_begin_at_the_ungated_sum(tiny):
    tower = tiny("eva02").double().visual
    with torch.no_grad():
        gated = tower.encode_dense(image(tower), readout=build_readout("gated:3", tower))
        plain = tower.encode_dense(image(tower), readout="multi-v:3")
    torch.testing.assert_close(gated, plain, atol=1e-5, rtol=0)  # up to the eps of the norms


@pytest.mark.parametrize("kind", ["eva02", "vit", "siglip"])
def test_a_spec_builds_the_same_reading(tiny, kind):
    tower = tiny(kind).visual
    readings = [build_readout(name, tower) for name in NAMES]
    readings += [
        build_readout("csa", tower, scaled=True, rotated=False, normalized=False),
        build_readout("proxyclip", tower, beta=1.0, gamma=2.0),
        build_readout("window:2", tower, global_blocks=[0]),
    ]
    for readout in readings:
        again = build_readout(tower=tower, **readout.spec())
        assert again.spec() == readout.spec() and type(again) is type(readout)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kind", ["eva02", "vit", "siglip"])
@pytest.mark.parametrize("name", ["gated:3", "csa"])
def test_the_weights_name_their_reading(tiny, tmp_path, kind, name, suffix):
    model, pictures = tiny(kind), image(tiny(kind).visual, dtype=torch.float32)
    plain = export_state_dict(model)
    assert not any("readout" in n for n in plain)
    model.visual.set_readout(name)
    for parameter in model.visual.readout.parameters():
        torch.nn.init.normal_(parameter)
    for layout in {reference_layout(model), "timm"}:
        state = {n: t.contiguous() for n, t in export_state_dict(model, layout).items()}
        file = tmp_path / f"{layout}{suffix}"
        save_file(state, file) if suffix == ".safetensors" else torch.save({"state_dict": state}, file)
        other = tiny(kind)
        load_weights(other, file)
        assert other.visual.readout.spec() == model.visual.readout.spec()
        assert set(other.state_dict()) == set(model.state_dict())
        with torch.no_grad():
            expected = model.encode_dense(pictures)
            assert torch.equal(other.encode_dense(pictures), expected)
            assert torch.equal(other.encode_dense(pictures, readout=name.partition(":")[0]), expected)
    load_state(other, plain)  # a file that names no reading leaves the model its own
    assert other.visual.readout.name == name


@pytest.mark.parametrize("name", ["csa", "gated:2"])
@pytest.mark.parametrize("strict", [False, True])
def test_plain_load_state_dict_takes_the_reading_over(tiny, name, strict):
    """In a module of one's own, too."""
    model, pictures = tiny("vit"), torch.randn(1, 3, 32, 48)
    model.visual.set_readout(name)
    model.visual.set_drop_padding(True)
    for parameter in model.visual.readout.parameters():
        torch.nn.init.normal_(parameter)
    other = tiny("vit")
    for target in (tiny("vit"), torch.nn.Sequential(other), other.visual):
        prefix = {torch.nn.Sequential: "0.", type(model): ""}.get(type(target))
        state = model.visual.state_dict() if prefix is None else {prefix + n: t for n, t in model.state_dict().items()}
        kept = dict(state)
        target.load_state_dict(state, strict=strict)
        tower = target if prefix is None else target[0].visual if prefix else target.visual
        assert tower.readout.spec() == model.visual.readout.spec() and tower.drop_padding
        assert torch.equal(tower.encode_dense(pictures), model.visual.encode_dense(pictures))
        assert state == kept and set(target.state_dict()) == set(state)
        other.visual.set_readout("value")
        other.visual.set_drop_padding(False)


def test_a_model_that_got_its_default_back_writes_none(tiny):
    model = tiny("vit")
    model.visual.set_readout("qq")
    named = model.state_dict()
    model.visual.set_readout("value")
    assert "visual.readout_spec" not in model.state_dict()
    load_state(model, named)
    assert model.visual.readout.name == "qq"
    model.visual.set_readout("value", normalized=False)
    assert "visual.readout_spec" in model.state_dict()


def test_a_failed_load_changes_no_reading(tiny):
    model, other = tiny("vit"), tiny("vit")
    other.visual.set_readout("gated:2")
    state = other.state_dict()
    state["visual.readout.gate.weight"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"visual.readout.gate.weight \(3, 3\) instead of \(4, 48\)"):
        load_state(model, state)
    assert model.visual.readout.name == "value" and "visual.readout_spec" not in model.state_dict()
    state["visual.readout_spec"] = torch.tensor(list(b'{"name": "valeu"}'), dtype=torch.uint8)
    with pytest.raises(ValueError, match='weights.pt: dense reading "valeu" is unknown: did you mean value'):
        load_state(model, state, source="weights.pt")
    state["visual.readout_spec"] = torch.arange(5)
    with pytest.raises(ValueError, match="weights.pt: its visual.readout_spec names no dense reading"):
        load_state(model, state, source="weights.pt")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("qqq", {}, 'dense reading "qqq" is unknown: did you mean qq'),
        ("zzz", {}, 'dense reading "zzz" is unknown: use one of all, clearclip'),
        ("qq:3", {}, "qq takes no number"),
        ("multi-v:x", {}, "a number, its layers, belongs after the colon"),
        ("multi-v:9", {}, "multi-v of 9 layers: the trunk has 1 to 3"),
        ("gated:1.5", {}, "gated of 1.5 layers: the trunk has 1 to 3"),
        ("naclip:0", {}, "std of naclip is 0.0: give the width of its Gaussian in cells, above 0"),
        ("window:0", {}, "window of the reading has 0 cells a side"),
        ("window", {"global_blocks": [7]}, "global block 7 does not exist"),
        ("value", {"scaled": False}, "the reading value compares no tokens"),
        ("qq", {"std": 2.0}, "the reading qq has no Gaussian"),
        ("tokens", {"beta": 1.0}, "the reading tokens has no option beta: it has normalized"),
    ],
)
def test_wrong_readings_are_refused_in_one_line(tiny, name, options, message):
    with pytest.raises(ValueError) as error:
        build_readout(name, tiny("vit").visual, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_wrong_calls_are_refused_in_one_line(tiny):
    model = tiny("vit")
    pictures = image(model.visual, dtype=torch.float32)
    boxes = [torch.tensor([[0.0, 0.0, 1.0, 1.0]])] * 2
    calls = [
        (lambda: model.encode_dense(pictures, readout="gated:2"), "has weights of its own: make it the model's"),
        (lambda: model.encode_dense(pictures, readout="proxyclip"), "build it with external=map"),
        (lambda: model.encode_dense(pictures, readout=build_readout("proxyclip", model.visual, external=pictures[:1])),
         r"a map of (1, 3, 32, 48) for 2 images"),
        (lambda: model.encode_pseudo_boxes(pictures, boxes, extract_type="v1", readout="qq"), 'for the reading "qq"'),
        (lambda: model.encode_masks(pictures, [], mask_attn=True, readout="qq"), 'no use for the reading "qq"'),
        (lambda: model.visual.block_inputs(pictures, [3]), "blocks [3] do not exist: the trunk has blocks 0 to 2"),
        (lambda: model.visual.block_inputs(pictures, [0]).projection("q"), "did not keep the input of block 2"),
        (lambda: model.visual.block_inputs(pictures).projection("x"), 'projection is "x"'),
        (lambda: model.visual.encode_dense_many(
            pictures, ["qq", build_readout("qq", model.visual, normalized=False)]), 'two readings are named "qq"'),
    ]  # fmt: skip
    for call, message in calls:
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_trunk_is_refused_when_it_is_read(tiny):
    model = tiny("vit")
    block = model.visual.trunk.blocks[1]
    model.visual.trunk.blocks[1] = torch.nn.Sequential(block)
    assert model.encode_image(image(model.visual, dtype=torch.float32)).isfinite().all()
    with pytest.raises(TypeError, match="no dense reading for a block of type Sequential"):
        model.encode_dense(image(model.visual, dtype=torch.float32))


def test_region_calls_take_a_reading(tiny):
    model = tiny("eva02")
    pictures = image(model.visual, dtype=torch.float32)
    boxes = [torch.tensor([[0.0, 0.0, 0.5, 1.0]]), torch.zeros(0, 4)]
    masks = [torch.zeros(0, 4, 6, dtype=torch.bool), torch.rand(2, 4, 6) > 0.5]
    with torch.no_grad():
        regions = model.encode_regions(pictures, boxes, masks, normalize=True, readout="csa")
        alone = (
            model.encode_pseudo_boxes(pictures, boxes, normalize=True, readout="csa"),
            model.encode_masks(pictures, masks, readout="csa"),
        )
        rois, _ = model.encode_rois_and_image(pictures, boxes, readout="csa")
        model.visual.set_readout("csa")
        own = model.encode_regions(pictures, boxes, masks, normalize=True)
    for one, two, three in zip(regions, alone, own, strict=True):
        torch.testing.assert_close(one, two)
        assert torch.equal(one, three)
    torch.testing.assert_close(rois, regions[0])
    assert list_readouts() == sorted(list_readouts())


def test_locking_leaves_the_gate_to_train(tiny):
    model = tiny("vit")
    model.visual.set_readout("gated:2")
    model.lock_image_tower(1)
    assert all(p.requires_grad for p in model.visual.readout.parameters())
    model.lock_image_tower(0)
    assert not any(p.requires_grad for p in model.visual.parameters())
