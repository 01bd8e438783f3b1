"""Dense readings against numbers of the released codes; names, counts and sizes come from the golden files."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from open_clip import CLIP
from open_clip.factory import build_model
from open_clip.readouts import build_readout, list_readouts
from open_clip.regions import roi_features
from open_clip.weights import load_state


@lru_cache
def load(folder: Path) -> tuple[CLIP, dict[str, Tensor]]:
    """(model, images by size) of a golden folder of models."""
    if not (folder / "weights.safetensors").is_file():
        pytest.skip(f"the model {folder.name} is not among the golden files kept in the repository")
    model = build_model(json.loads((folder / "config.json").read_text())).eval()
    load_state(model, load_file(folder / "weights.safetensors"))
    inputs = np.load(folder / "inputs.npz")
    images = {n.removeprefix("images_"): torch.from_numpy(v).float() for n, v in inputs.items() if "images" in n}
    return model.requires_grad_(False), images


def numbers(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        pytest.skip(f"{file.parent.name}/{file.name} is not among the golden files kept in the repository")
    return {n: torch.from_numpy(np.asarray(v)) for n, v in np.load(file).items()}


def check(name: str, actual: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    """Maps that are not of unit length are compared relative to their size."""
    atol *= max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("kind", ["vit_gelu", "vit_quickgelu"])
def test_training_free_readings_of_a_vit(golden, kind):
    expected = numbers(golden / "dense_labels" / f"readings_{kind}.npz")
    (model, images), compared = load(golden / kind), set()
    for key, value in expected.items():
        size, name, *form = key.split(".")
        pictures = images[size] if size == "native" else images[size][:1]
        tower, options = model.visual, {}
        if name == "keys_as_released":
            check(key, tower.block_inputs(pictures).projection("k", through_output=True), value)
            continue
        if "shifted_positions" in form or name.endswith("_as_released"):
            continue  # the releases' own resize, activation or epsilon
        if name.startswith("proxyclip"):
            if form != ["image0_alone"] and len(pictures) > 1:
                continue  # the release averages over the batch
            external = numbers(golden / "dense_labels" / f"readings_{kind}_external.npz")
            pictures = pictures[:1]
            options, name = {"external": external[f"{size}.{name}.external"][:1].float()}, "proxyclip"
        if form == ["unnormalised"]:
            options = {"normalized": False}
        name = "naclip:1.5" if name == "naclip_narrow" else name
        actual = tower.encode_dense(pictures, value.ndim == 4, readout=build_readout(name, tower, **options))
        check(key, actual, value)
        compared.add(name)
    assert {"value", "value_bare", "vanilla", "sclip", "clearclip", "naclip", "proxyclip", "kk_bare"} <= compared


def test_self_attention_readings_of_eva(golden):
    expected = numbers(golden / "dense_labels" / "readings_eva.npz")
    model, images = load(golden / "eva")
    scaled = {"kk_bare_scaled_rope": "kk_bare", "kk_full_scaled_rope": "kk_full"}
    as_named = {"value": "value", "vanilla": "vanilla", **scaled}
    compared = set()
    for key, value in expected.items():
        size, name = key.split(".")
        pictures = images[size] if size == "native" else images[size][:1]
        # DeCLIP's maps of EVA are recorded with unit length here.
        readout = as_named.get(name) or build_readout(name.split("_")[0], model.visual, normalized=True)
        check(key, model.encode_dense(pictures, keep_shape=True, readout=readout), value)
        compared.add(name.split("_")[0])
    assert {"value", "vanilla", "qq", "kk", "vv", "csa"} <= compared


@pytest.mark.recorded("methods/declip.npz", r"(\w+)\.map\..*", argument="kind")
def test_declip_maps_projections_and_regions(golden, kind):
    expected = numbers(golden / "methods" / "declip.npz")
    batch = numbers(golden / "methods" / "batch.npz")
    model, _ = load(golden / kind)
    tower, images = model.visual, batch["images"].float()
    boxes = list(batch["boxes"].split(batch["counts"].tolist()))
    inputs = tower.block_inputs(images)
    for key, value in expected.items():
        if not key.startswith(f"{kind}."):
            continue
        name, *form = key.split(".")[1:]
        if name == "map":
            plain = kind == "eva" and form[0] in ("maskclip", "vanilla")
            readout = build_readout(
                "value" if form[0] == "maskclip" else form[0], tower, normalized=False if plain else None
            )
            check(key, readout.map(inputs), value)
        elif name in ("q", "k", "v"):
            check(key, inputs.projection(name), value)
        elif form == ["roi"]:
            check(key, model.encode_pseudo_boxes(images, boxes, normalize=True, readout=name), value)


def test_window_branch(golden):
    expected = numbers(golden / "methods" / "clipselfv2.npz")
    images = numbers(golden / "methods" / "batch.npz")["images"].float()
    tower = load(golden / "eva")[0].visual
    windowed = expected["window_blocks"].tolist()
    readout = build_readout(
        f"window:{int(expected['window_size'])}", tower,
        global_blocks=[i for i in range(len(tower.trunk.blocks)) if i not in windowed],
    )  # fmt: skip
    check("window_map", tower.encode_dense(images, readout=readout), expected["window_map"])
    check("global_map", tower.encode_dense(images), expected["global_map"])


@pytest.mark.recorded("methods/denserc.npz", r"(\w+)\.map", argument="kind")
def test_gated_values_and_their_gradients(golden, kind):
    """DenseRC in closed form: the map, and the gate's gradient of semantics + 0.025 coherence."""
    everything = numbers(golden / "methods" / "denserc.npz")
    expected = {n.removeprefix(f"{kind}."): v for n, v in everything.items() if n.startswith(f"{kind}.")}
    facts = json.loads((golden / "methods" / "denserc.json").read_text())
    model, images = load(golden / kind)
    tower = model.visual
    tower.set_readout(f"gated:{facts['layers_read']}")
    try:
        gate = tower.readout.gate.requires_grad_(True)
        gate.load_state_dict({"weight": expected["gate_weight"], "bias": expected["gate_bias"]})
        tokens, _ = tower.dense_tokens(images["dense"][:1])
        dense = tower.project_dense(tokens).transpose(1, 2).unflatten(2, tuple(expected["map"].shape[1:]))
        check("map", dense[0].detach(), expected["map"])
        if "sum" not in expected:
            return
        check("sum", tokens[0].detach(), expected["sum"])
        regions = F.normalize(roi_features(dense, [expected["boxes"].float()]), dim=-1)
        cosine = (regions * F.normalize(expected["target"].float(), dim=-1)).sum(-1)
        check("cosine", cosine.detach(), expected["cosine"])
        ours, theirs = (F.normalize(m.flatten(1).T, dim=-1) for m in (dense[0], expected["vfm_map"]))
        loss = 1 - cosine.mean() + 0.025 * (ours @ ours.T - theirs @ theirs.T).square().mean()
        loss.backward()
        assert loss.item() == pytest.approx(facts[kind]["total"], rel=1e-5)
        for name, gradient in (("grad_gate_weight", gate.weight.grad), ("grad_gate_bias", gate.bias.grad)):
            torch.testing.assert_close(gradient.double(), expected[name], rtol=1e-4, atol=1e-6)
    finally:
        tower.set_readout("value")


def test_every_reading_is_listed():
    assert {
        "value", "value_bare", "vanilla", "vanilla_bare", "tokens", "qq", "kk", "vv", "csa", "all", "clearclip",
        "clearclip_full", "sclip", "sclip_bare", "kk_bare", "naclip", "naclip_full", "proxyclip", "multi-v", "gated",
        "window",
    } <= set(list_readouts())  # fmt: skip
