"""Every layout in and out, containers, wrong files and unsafe files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import open_clip
from open_clip.factory import build_model
from open_clip.weight_files import save_weights
from open_clip.weights import detect_layout, export_state_dict, load_state, load_state_dict_file, load_weights

ROOT = Path(__file__).parents[2]
KINDS = [("eva", "eva"), ("vit_gelu", "openai"), ("vit_quickgelu", "openai")]


def fresh(folder: Path, seed: int = 1) -> open_clip.CLIP:
    torch.manual_seed(seed)
    return build_model(json.loads((folder / "config.json").read_text()))


def reference_state(golden: Path, kind: str) -> dict[str, torch.Tensor]:
    file = golden / kind / "weights.safetensors"
    if not file.is_file():
        pytest.skip(f"{kind} is not among the golden files kept in the repository")
    return load_file(file)


@pytest.mark.parametrize(("kind", "layout"), KINDS)
def test_round_trip_gives_the_reference_file_back(golden, kind, layout):
    state = reference_state(golden, kind)
    model = fresh(golden / kind)
    load_state(model, state)
    out = export_state_dict(model)
    assert detect_layout(out) == layout
    assert {k: v.shape for k, v in out.items()} == {k: v.shape for k, v in state.items()}
    for name, value in state.items():
        # Rotary tables are computed anew; everything else is copied.
        tolerance = 1e-6 if "rope" in name else 0
        torch.testing.assert_close(out[name], value, rtol=0, atol=tolerance)


@pytest.mark.parametrize("container", ["bare", "state_dict", "model", "module", "prefixed", "nested", "safetensors"])
@pytest.mark.parametrize("layout", ["reference", "timm"])
@pytest.mark.parametrize("kind", ["eva", "vit_quickgelu"])
def test_every_container_of_every_layout_loads(golden, tmp_path, kind, layout, container):
    source = fresh(golden / kind)
    load_state(source, reference_state(golden, kind))
    state = export_state_dict(source, None if layout == "reference" else "timm")
    path = tmp_path / "weights.pt"
    if container == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    else:
        prefixed = {f"module.{k}": v for k, v in state.items()}
        torch.save(
            {
                "bare": state,
                "state_dict": {"epoch": 3, "name": "x", "state_dict": prefixed, "optimizer": {"state": {}}},
                "model": {"model": state},
                "module": {"module": state, "epoch": 1},
                "prefixed": prefixed,
                "nested": {"model": {"state_dict": state}},
            }[container],
            path,
        )
    target = fresh(golden / kind, seed=2)
    load_weights(target, path)
    for (name, a), b in zip(source.state_dict().items(), target.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_text_prefix_of_custom_text_vit_loads(golden):
    state = reference_state(golden, "vit_quickgelu")
    renamed = {(k if k.startswith("visual.") or k == "logit_scale" else f"text.{k}"): v for k, v in state.items()}
    model = fresh(golden / "vit_quickgelu")
    load_state(model, {**renamed, "context_length": torch.tensor(77), "input_resolution": torch.tensor(64)})
    torch.testing.assert_close(model.text.ln_final.weight, state["ln_final.weight"])


def test_wrong_file_says_what_differs_and_loads_nothing(golden):
    state = reference_state(golden, "eva")
    model = fresh(golden / "eva")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    broken = dict(state)
    del broken["visual.norm.weight"]
    broken["visual.cls_token"] = torch.zeros(1, 1, 7)
    broken["visual.extra"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        load_state(model, broken, source="file.pt")
    text = str(error.value)
    assert "file.pt" in text and "visual.trunk.norm.weight" in text and "visual.trunk.extra" in text
    width = state["visual.cls_token"].shape[-1]
    assert f"cls_token (1, 1, 7) instead of (1, 1, {width})" in text and "\n" not in text
    with pytest.raises(ValueError, match="another architecture"):
        load_state(model, reference_state(golden, "vit_quickgelu"))
    with pytest.raises(ValueError, match="not a CLIP checkpoint"):
        load_state(model, {"fc.weight": torch.zeros(2)})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/open_clip_pickle_ran_code"),))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_that_runs_code_is_refused(tmp_path, writer):
    marker = Path("/tmp/open_clip_pickle_ran_code")
    marker.unlink(missing_ok=True)
    path = tmp_path / "evil.pt"
    if writer == "torch":
        torch.save({"state_dict": {"a": torch.zeros(1)}, "x": Payload()}, path)
    else:
        path.write_bytes(pickle.dumps({"a": Payload()}))
    with pytest.raises(RuntimeError, match="evil.pt cannot be loaded"):
        load_state_dict_file(path)
    assert not marker.exists()


def test_damaged_and_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.pt does not exist"):
        load_state_dict_file(tmp_path / "no.pt")
    for name, content in [("a.pt", b"not a checkpoint"), ("b.safetensors", b"\x00" * 64)]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RuntimeError, match=f"{name} cannot be loaded"):
            load_state_dict_file(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "d.pt")
    with pytest.raises(RuntimeError, match="holds no state dict"):
        load_state_dict_file(tmp_path / "d.pt")


def test_create_model_with_eva_and_cache_dir(golden, tmp_path):
    open_clip.add_model_config(golden / "eva" / "config.json", "golden-eva")
    file = golden / "eva" / "weights.safetensors"
    model = open_clip.create_model("golden-eva", pretrained="eva", cache_dir=file)
    assert torch.equal(model.visual.trunk.cls_token, reference_state(golden, "eva")["visual.cls_token"])
    grid = (3, 5)  # no size of any draw
    size = tuple(n * model.visual.patch_size for n in grid)
    resized = open_clip.create_model("golden-eva", pretrained=file, force_image_size=size, precision="bf16")
    assert resized.visual.trunk.pos_embed.shape == (1, 1 + 3 * 5, model.visual.width)
    assert resized.logit_scale.dtype == torch.bfloat16
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_clip.create_model("golden-eva", pretrained="eva", cache_dir=tmp_path / "none.pt")
    with pytest.raises(ValueError, match="neither a file nor a tag"):
        open_clip.create_model("golden-eva", pretrained="nope")
    with pytest.raises(ValueError, match="did you mean EVA02-CLIP-B-16"):
        open_clip.create_model("EVA02-CLIP-B16")
    with pytest.raises(ValueError, match='precision is "fp8"'):
        open_clip.create_model("golden-eva", precision="fp8")


def test_convert_weights_tool(golden, tmp_path, capsys, as_module):
    kind = golden / "vit_quickgelu"
    config = tmp_path / "golden-vit.json"
    config.write_text((kind / "config.json").read_text())
    tool = as_module("tools/convert_weights.py")

    def run(*args) -> tuple[int, str]:
        return tool.main(["--model", str(config), *map(str, args)]), capsys.readouterr().err

    there, back = tmp_path / "timm.pt", tmp_path / "back.safetensors"
    assert run(kind / "weights.safetensors", there, "--layout", "timm")[0] == 0
    assert run(there, back)[0] == 0
    expected, actual = reference_state(golden, "vit_quickgelu"), load_file(back)
    assert set(actual) == set(expected) and all(torch.equal(actual[k], expected[k]) for k in expected)
    status, error = run(there, back)
    assert status == 2 and "exists" in error
    status, error = run(there, tmp_path / "x.pt", "--layout", "eva")
    assert status == 2 and 'no "eva" layout' in error and not (tmp_path / "x.pt").exists()
    # A file that does not say how it is read gets to say so, and for others it need not.
    named, plain = tmp_path / "named.safetensors", tmp_path / "plain.safetensors"
    assert run(there, named, "--readout", "csa")[0] == 0
    made = build_model(json.loads(config.read_text()))
    load_weights(made, named)
    assert made.visual.readout.name == "csa"
    made.visual.set_readout("gated:2")
    save_weights(export_state_dict(made), named, "golden-vit")
    assert set(load_file(named)) > set(expected)
    assert run(named, plain, "--readout", "none")[0] == 0
    assert set(load_file(plain)) == set(expected)
    status, error = run(named, tmp_path / "x.pt", "--readout", "nonsense")
    assert status == 2 and "nonsense" in error and not (tmp_path / "x.pt").exists()
