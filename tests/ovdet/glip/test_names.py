"""Names and shapes of the published networks, and files of all layouts, read and written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovdet.config import load_config
from ovdet.glip import files, names
from ovdet.glip.build import count_parameters, on_meta
from ovdet.glip.config import GlipConfig
from ovdet.glip.model import GLIP
from training.engine.errors import UserError

CONFIGS = Path(__file__).resolve().parents[3] / "GLIP" / "configs"


class Sized:
    """A tokenizer of which only the size is asked."""

    size, limit, padding = 30522, 256, 0


def published(path: str) -> GLIP:
    pytest.importorskip("transformers")
    return on_meta(load_config(GlipConfig, CONFIGS / path), Sized())


def recorded_names(folder: Path) -> tuple[dict[str, list[int]], dict[str, int]]:
    path = folder / "names_glip_t.json"
    if not path.is_file():
        pytest.skip("needs the recorded names")
    content = json.loads(path.read_text())
    return content["names"], content["elements"]


def large(recorded: dict[str, list[int]]) -> dict[str, list[int]]:
    """Names and shapes of Swin-L and eight blocks, from those of Swin-T and six."""
    result = {}
    for name, shape in recorded.items():
        if name.startswith("backbone.body."):
            table = name.endswith("relative_position_bias_table")
            index = name.endswith("relative_position_index")
            shape = [529, 2 * shape[1]] if table else [144, 144] if index else [2 * s for s in shape]
            if name.endswith("patch_embed.proj.weight"):
                shape = [192, 3, 4, 4]
        elif "fpn_inner" in name and name.endswith("weight"):
            shape = [shape[0], 2 * shape[1], 1, 1]
        result[name] = shape
        block = re.match(r"(backbone\.body\.layers\.2\.blocks\.)5(\..*)", name)
        for further in range(6, 18) if block else ():
            result[f"{block[1]}{further}{block[2]}"] = shape
        tower = re.match(r"(rpn\.head\.dyhead_tower\.)(15|16|17)(\..*)", name)
        for further in (3, 6) if tower else ():
            result[f"{tower[1]}{int(tower[2]) + further}{tower[3]}"] = shape
    return result


@pytest.mark.parametrize("config", ["glip_t_b.toml", "glip_t.toml", "glip_l.toml"])
def test_names_and_shapes_are_the_published_ones(glip_golden: Path, config: str):
    recorded, elements = recorded_names(glip_golden)
    wanted = large(recorded) if config == "glip_l.toml" else recorded
    model = published(config)
    ours = {names.to_glip(name, fusion=True): list(value.shape) for name, value in model.state_dict().items()}
    assert len(ours) == len(model.state_dict())
    assert ours == {name: shape for name, shape in wanted.items() if not names.IGNORED.search(name)}
    if config != "glip_l.toml":
        left_out = sum(torch.Size(s).numel() for n, s in recorded.items() if n.endswith("relative_position_index"))
        assert count_parameters(model) == sum(elements.values()) - left_out
        assert (
            count_parameters(model.head) == elements["rpn.head"]
            and count_parameters(model.text) == elements["language"]
        )


def test_late_fusion_has_the_same_names_without_fusion(glip_golden: Path):
    recorded, _ = recorded_names(glip_golden)
    wanted = {}
    for name, shape in recorded.items():
        tower = re.match(r"rpn\.head\.dyhead_tower\.(\d+)\.(.*)", name)
        if tower and int(tower[1]) % 3 != 2:
            continue
        wanted[f"rpn.head.dyhead_tower.{int(tower[1]) // 3}.{tower[2]}" if tower else name] = shape
    model = published("glip_t_a.toml")
    ours = {names.to_glip(name, fusion=False): list(value.shape) for name, value in model.state_dict().items()}
    assert ours == {name: shape for name, shape in wanted.items() if not names.IGNORED.search(name)}


@pytest.mark.parametrize("layout", ["glip", "mmdet", "own"])
@pytest.mark.parametrize("fusion", [True, False])
def test_files_go_out_and_come_back(tmp_path: Path, tiny: Callable[..., GLIP], layout: str, fusion: bool):
    model, other = tiny(seed=0, fusion=fusion, classifier=3), tiny(seed=1, fusion=fusion, classifier=3)
    written = names.write_state(model.state_dict(), layout, fusion=fusion)
    if layout == "glip":  # as the reference writes it
        written = {f"module.{k}": v for k, v in written.items()}
        written["module.rpn.anchor_generator.cell_anchors.0"] = torch.zeros(1, 4)
        written["module.language_backbone.body.model.embeddings.position_ids"] = torch.zeros(1, 512)
        written["module.backbone.body.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    key = "state_dict" if layout == "mmdet" else "model"
    torch.save({key: written, "iteration": 5, "optimizer": {"state": {}}}, tmp_path / "file.pth")
    before = other.head.cls_logits.weight.clone()
    assert files.load_whole(other, tmp_path / "file.pth") == layout
    for name, value in model.state_dict().items():
        if layout == "mmdet" and name == "head.cls_logits.weight":  # not in these files
            assert torch.equal(other.state_dict()[name], before)
        elif not name.startswith("head.cls_logits"):
            assert torch.equal(other.state_dict()[name], value), name


def test_whole_files_with_a_tuned_prompt(tmp_path: Path, tiny: Callable[..., GLIP]):
    """The published layout's and our own; a model that is to be tuned takes one without, and keeps its zeros."""
    tuned, other = tiny(seed=0), tiny(seed=1)
    torch.save({"model": names.write_state(tuned.state_dict(), "glip", fusion=True)}, tmp_path / "plain.pth")
    width = tuned.text.width
    tuned.prompt, other.prompt = (nn.Parameter(torch.full((1000, width), v)) for v in (0.5, 0.0))
    files.load_whole(other, tmp_path / "plain.pth")
    assert not other.prompt.any()
    for layout in ("glip", "own"):
        other.prompt.data.zero_()
        torch.save({"model": names.write_state(tuned.state_dict(), layout, fusion=True)}, tmp_path / "tuned.pth")
        assert files.load_whole(other, tmp_path / "tuned.pth") == layout
        assert (other.prompt == 0.5).all()


def test_merging_in_unfolds_order():
    """MMDetection's merging unfolds 2 x 2 cells; timm's concatenates them: equal after the change of order."""
    from timm.models.swin_transformer import PatchMerging

    torch.manual_seed(0)
    ours = PatchMerging(6)
    nn.init.normal_(ours.norm.weight)
    nn.init.normal_(ours.norm.bias)
    place = "image.swin.body.layers_1.downsample."
    state = {place + name: value for name, value in ours.state_dict().items()}
    theirs = names.write_state(state, "mmdet", fusion=True)
    assert set(theirs) == {f"backbone.stages.0.downsample.{n}" for n in ours.state_dict()}
    weights = {name.rpartition("downsample.")[2]: value for name, value in theirs.items()}
    x = torch.randn(2, 4, 6, 6)
    unfolded = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)  # [B, cells, 4 C]
    merged = F.layer_norm(unfolded, (24,), weights["norm.weight"], weights["norm.bias"]) @ weights["reduction.weight"].T
    assert torch.allclose(ours(x).flatten(1, 2), merged, atol=1e-5)


def test_files_that_do_not_fit_are_refused(tmp_path: Path, tiny: Callable[..., GLIP]):
    model = tiny()
    state = names.write_state(model.state_dict(), "glip", fusion=True)

    def refused(content: object, *words: str) -> None:
        torch.save(content, tmp_path / "bad.pth")
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(UserError) as error:
            files.load_whole(model, tmp_path / "bad.pth")
        text = str(error.value)
        assert "bad.pth" in text and "\n" not in text and all(word in text for word in words), text
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    less = dict(state)
    del less["rpn.head.bias0"], less["rpn.head.log_scale"]
    refused({"model": less}, "lacks rpn.head.log_scale, rpn.head.bias0 (2 in all)")
    refused({"model": state | {"rpn.tunable_linear.weight": torch.zeros(1000, 8)}}, "has unknown rpn.tunable_linear")
    refused({"model": state | {"rpn.head.bias0": torch.zeros(3)}}, "other shapes", "rpn.head.bias0 (3,)")
    refused({"model": {"visual.proj": torch.zeros(1)}}, "holds no GLIP")
    refused({"model": {}}, "no weights")
    refused([1, 2], "holds no weights by name")
    (tmp_path / "page.pth").write_text("<html>")
    with pytest.raises(UserError, match="page.pth"):
        files.load_whole(model, tmp_path / "page.pth")
    with pytest.raises(UserError, match="no such file"):
        files.load_whole(model, tmp_path / "absent.pth")
    late = tiny(fusion=False)
    torch.save({"model": state}, tmp_path / "fused.pth")
    with pytest.raises(UserError, match="has unknown"):
        files.load_whole(late, tmp_path / "fused.pth")


def test_small_files_hold_what_was_trained(tmp_path: Path, tiny: Callable[..., GLIP]):
    model, config = tiny(seed=0), GlipConfig()
    content = files.content_of(model, config, part=["head.bias0", "head.log_scale"])
    other = tiny(seed=0)
    with torch.no_grad():
        other.head.bias0 += 1
    files.load_part(other, content, "small.pt")
    assert torch.equal(other.head.bias0, model.head.bias0)
    with pytest.raises(UserError, match="other weights"):
        files.load_part(tiny(seed=1), content, "small.pt")
    torch.save(content, tmp_path / "small.pt")
    with pytest.raises(UserError, match="only what was trained"):
        files.load_whole(model, tmp_path / "small.pt")


def swin_by_the_book(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Swin's detection body written out: pad, shift, attend within windows, shift back, cut."""
    body, maps = model.body, []
    x = body["patch_embed"](images)
    for stage in range(4):
        layer = body[f"layers_{stage}"]
        x = layer.downsample(x)
        for block in layer.blocks:
            number, height, width, channels = x.shape
            window, shift = block.window_size[0], block.shift_size[0]
            y = F.pad(block.norm1(x), (0, 0, 0, -width % window, 0, -height % window))
            regions = torch.zeros(y.shape[1:3])
            for i, rows in enumerate((slice(0, -window), slice(-window, -shift or None), slice(-shift, None))):
                for j, columns in enumerate((slice(0, -window), slice(-window, -shift or None), slice(-shift, None))):
                    if shift:
                        regions[rows, columns] = 3 * i + j
            y = y.roll((-shift, -shift), (1, 2))
            out = torch.zeros_like(y)
            for top in range(0, y.shape[1], window):
                for left in range(0, y.shape[2], window):
                    tokens = y[:, top : top + window, left : left + window].flatten(1, 2)
                    q, k, v = block.attn.qkv(tokens).unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
                    logits = q * block.attn.scale @ k.mT + block.attn._get_rel_pos_bias()
                    place = regions[top : top + window, left : left + window].flatten()
                    logits = logits - 100.0 * (place[:, None] != place)
                    part = block.attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
                    out[:, top : top + window, left : left + window] = part.unflatten(1, (window, window))
            x = x + out.roll((shift, shift), (1, 2))[:, :height, :width]
            x = x + block.mlp(block.norm2(x))
        if stage:
            maps.append(model.norms[stage - 1](x).permute(0, 3, 1, 2))
    return maps


@pytest.mark.parametrize(("window", "size"), [(4, (96, 64)), (3, (64, 96)), (7, (32, 64))])
def test_swin_pads_first(window: int, size: tuple[int, int]):
    from ovdet.glip.swin import Swin

    torch.manual_seed(0)
    swin = Swin(16, [2, 2, 2, 2], [1, 2, 2, 4], window).eval()
    for parameter in swin.parameters():
        nn.init.normal_(parameter, std=0.3)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        for got, wanted in zip(swin(images), swin_by_the_book(swin, images), strict=True):
            assert torch.allclose(got, wanted, atol=1e-4)
    assert [x.shape[2:] for x in swin(images)] == [(size[0] // s, size[1] // s) for s in (8, 16, 32)]


def test_frozen_stages_stay_as_they_are():
    from ovdet.glip.swin import Swin

    swin = Swin(16, [2, 2, 2, 2], [1, 2, 2, 4], 4, freeze_at=2)
    frozen = {name for name, p in swin.named_parameters() if not p.requires_grad}
    published = {names._swin(name, "layers") for name in frozen}
    assert {n.split(".")[0] + "." + n.split(".")[1] for n in published} == {
        "patch_embed.proj",
        "patch_embed.norm",
        "layers.0",
    }
    assert "layers.0.downsample.reduction.weight" in published
    assert swin.train() is swin and not swin.body["layers_0"].training and swin.body["layers_1"].blocks.training


def test_swin_writes_its_attention_out(monkeypatch: pytest.MonkeyPatch):
    """No fused kernel: cuDNN's gives the bias of positions no gradient, and plans anew for each number of windows."""
    from ovdet.glip.swin import Swin

    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: pytest.fail("attention is fused"))
    swin = Swin(16, [2, 2, 2, 2], [1, 2, 2, 4], 4).eval()  # no stochastic depth
    sum(x.sin().sum() for x in swin(torch.randn(1, 3, 64, 96))).backward()
    biases = [p.grad for n, p in swin.named_parameters() if n.endswith("relative_position_bias_table")]
    assert len(biases) == 8 and all(grad.any() for grad in biases)
