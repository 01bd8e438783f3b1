"""Published files to detector files and back: every name, shape and value; and nothing in a file is executed."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import open_clip
from open_clip.factory import build_model
from open_clip.weights import export_state_dict
from ovdet import files
from ovdet.config import config_to_dict
from ovdet.fvit.assemble import load_vit, read_config
from ovdet.fvit.detector import Detector, build_detector
from ovdet.fvit.published import EMBEDDINGS, UNUSED, VIT, from_published, to_published
from ovdet.fvit.published_file import StandIn, read_published
from training.engine.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "F-ViT" / "configs").glob("ov_*.toml"))


@pytest.fixture(scope="module")
def tool(as_module) -> ModuleType:
    return as_module("tools/convert_detector.py")


def test_there_are_twelve_configs():
    assert len(CONFIGS) == 12


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_name_and_shape_of_the_published_files(golden: Path, path: Path):
    """Both ways without a missing or left-over name, at full size; tensors without memory have names and shapes."""
    file = golden / "fvit" / "state_dict_shapes.json"
    if not file.is_file():
        pytest.skip("recorded names of the published files are not there: set CLIPSELF_GOLDEN")
    recorded = json.loads(file.read_text())
    entries = next(v["entries"] for k, v in recorded.items() if path.stem.startswith(k))
    config = read_config(str(path), [])
    with torch.device("meta"):
        clip = build_model(open_clip.get_model_config(config.model.name))
        detector = Detector(config, clip.visual)
        published = {k: torch.empty(shape, dtype=getattr(torch, kind)) for k, (shape, kind, _) in entries.items()}
    own = detector.trainable_state_dict()
    mine = from_published(published, own)
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in own.items()}
    vit = {k.removeprefix("visual."): v for k, v in export_state_dict(clip).items() if k.startswith("visual.")}
    others = sum(k.startswith((VIT, UNUSED)) or k == EMBEDDINGS for k in published)
    assert len(mine) + others == len(published) and others == len(vit) + 3
    back = to_published(mine, vit, published[EMBEDDINGS].T)
    assert {k: (v.shape, v.dtype) for k, v in back.items()} == {k: (v.shape, v.dtype) for k, v in published.items()}
    trained = sum(p.numel() for p in detector.parameters() if p.requires_grad)
    whole = next(v["trained_parameters"] for k, v in recorded.items() if path.stem.startswith(k))
    assert trained == whole - sum(published[f"{UNUSED}{leaf}"].numel() for leaf in ("weight", "bias"))


TINY = """
[model]
name = "tiny-eva/config.json"
pretrained = "vit.pt"
blocks = [0, 1, 2]
channels = 8
box_convs = 1
mask_convs = 2
{model}
[data]
image_size = 64
novel = ["b c"]
val_annotations = "val.json"
"""


@pytest.fixture(scope="module", params=["", "masks = true\nrpn_norm = true"], ids=["boxes", "masks"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, the weights of a tiny model, a validation file and a detector file."""
    folder = tmp_path_factory.mktemp("convert")
    vision = {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 16, "mlp_ratio": 2.0,
              "eva_model_name": "tiny", "rope": True, "naiveswiglu": True, "subln": True}  # fmt: skip
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    (folder / "tiny-eva").mkdir()
    (folder / "tiny-eva" / "config.json").write_text(
        json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text})
    )
    names = ["a", "b c", "d"]
    (folder / "val.json").write_text(
        json.dumps({"images": [{"id": 1, "file_name": "x.jpg"}], "annotations": [],
                    "categories": [{"id": i + 1, "name": n} for i, n in enumerate(names)]})
    )  # fmt: skip
    (folder / "tiny.toml").write_text(TINY.format(model=request.param))
    torch.manual_seed(0)
    clip = build_model(json.loads((folder / "tiny-eva" / "config.json").read_text()))
    torch.save({"state_dict": export_state_dict(clip)}, folder / "vit.pt")
    config = read_config(str(folder / "tiny.toml"), [])
    vit = load_vit(config)
    detector = build_detector(config, vit.model, torch.ones(2, 24), torch.ones(1, dtype=torch.bool))
    for value in detector.trainable_state_dict().values():
        value.copy_(torch.rand(value.shape) * 10)
    content = files.detector_content(
        detector, vit=vit.identity, config=config_to_dict(config), names=["a", "b c", "d"], novel=[0, 1, 0]
    )
    files.save(content, folder / "detector.pt")
    return folder


def test_there_and_back(small: Path, tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = str(small / "tiny.toml")
    tool.main([config, str(small / "detector.pt"), str(tmp_path / "a.pth")])
    published = torch.load(tmp_path / "a.pth", weights_only=True)
    assert published["meta"]["CLASSES"] == ("a", "b c", "d")
    assert published["state_dict"][EMBEDDINGS].shape == (24, 4)
    tool.main(
        [config, str(tmp_path / "a.pth"), str(tmp_path / "b.pt"), "--embeddings", str(tmp_path / "e.npy"),
         "--write-vit", str(tmp_path / "vit.pt")]
    )  # fmt: skip
    first, second = files.load(small / "detector.pt"), files.load(tmp_path / "b.pt")
    assert first["detector"].keys() == second["detector"].keys()
    assert all(torch.equal(v, second["detector"][k]) for k, v in first["detector"].items())
    assert (second["base"], second["novel"]) == (["a", "d"], ["b c"])
    assert first["vit"]["hash"] == second["vit"]["hash"] and second["vit"]["weights"] == str(tmp_path / "vit.pt")
    assert np.allclose(np.linalg.norm(np.load(tmp_path / "e.npy"), axis=1), 1, atol=1e-5)
    with pytest.raises(UserError, match="b.pt exists"):
        tool.main([config, str(tmp_path / "a.pth"), str(tmp_path / "b.pt")])


@pytest.mark.slow
def test_full_size_values(golden: Path, tool: ModuleType, tmp_path: Path):
    """A published file of full size with random values, through the command line and back: equal to the last bit."""
    file = golden / "fvit" / "state_dict_shapes.json"
    if not file.is_file():
        pytest.skip("recorded names of the published files are not there: set CLIPSELF_GOLDEN")
    entries = json.loads(file.read_text())["ov_coco_vitb16"]["entries"]
    generator = torch.Generator().manual_seed(0)
    state = {k: torch.randn(shape, generator=generator) if kind == "float32" else torch.tensor(7)
             for k, (shape, kind, _) in entries.items()}  # fmt: skip
    clip = open_clip.create_model("EVA02-CLIP-B-16")
    vit = {f"backbone.{k}": v for k, v in export_state_dict(clip).items() if k.startswith("visual.")}
    state |= {k: v for k, v in vit.items() if "rope" in k}
    names = [f"c{i}" for i in range(65)]
    torch.save({"state_dict": state, "meta": {"CLASSES": tuple(names)}}, tmp_path / "a.pth")
    torch.save({"state_dict": export_state_dict(clip)}, tmp_path / "clip.pt")
    np.save(tmp_path / "e.npy", state[EMBEDDINGS].T.numpy())
    config = str(next(path for path in CONFIGS if path.stem.startswith("ov_coco_vitb16")))
    values = ['data.novel=["c3"]', "data.val_annotations=none.json"]
    weights = [f"model.cache_dir={tmp_path / 'clip.pt'}"]
    tool.main([config, str(tmp_path / "a.pth"), str(tmp_path / "b.pt"), "--write-vit", str(tmp_path / "v.pt"), *values,
               *weights])  # fmt: skip
    tool.main([config, str(tmp_path / "b.pt"), str(tmp_path / "c.pth"), *values, "model.cache_dir=",
               f"model.pretrained={tmp_path / 'v.pt'}", f"data.embeddings={tmp_path / 'e.npy'}"])  # fmt: skip
    back = torch.load(tmp_path / "c.pth", weights_only=True)["state_dict"]
    assert back.keys() == state.keys()
    free = (EMBEDDINGS, f"{UNUSED}weight", f"{UNUSED}bias")  # brought to unit length; not kept
    assert all(torch.equal(back[k], v) for k, v in state.items() if k not in free)
    unit = torch.nn.functional.normalize(state[EMBEDDINGS], dim=0)
    assert torch.allclose(back[EMBEDDINGS], unit, atol=1e-6)


def test_what_does_not_fit_is_refused(small: Path, tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config, out = str(small / "tiny.toml"), str(tmp_path / "out.pt")
    tool.main([config, str(small / "detector.pt"), str(tmp_path / "a.pth")])
    state = torch.load(tmp_path / "a.pth", weights_only=True)["state_dict"]
    name = "roi_head.bbox_head.fc_reg.bias"
    vit = "backbone.visual.norm.bias"
    narrow = {EMBEDDINGS: state[EMBEDDINGS][:, 1:], f"{UNUSED}bias": state[f"{UNUSED}bias"][1:]}
    bad = {
        "lacks roi_head.bbox_head.fc_reg.bias": {k: v for k, v in state.items() if k != name},
        "has unknown neck.more": {**state, "neck.more": torch.zeros(1)},
        "has other shapes of roi_head.bbox_head.fc_reg.bias": {**state, name: torch.zeros(5)},
        "another ViT": {**state, "backbone.visual.norm.bias": state["backbone.visual.norm.bias"] + 1},
        "all_embeddings": {k: v for k, v in state.items() if k != EMBEDDINGS},
        "bad.pth has embeddings of 2 classes, but data.val_annotations val.json lists 3": {**state, **narrow},
        "bad.pth: 1 of 4 values of .*fc_reg.bias are NaN": {**state, name: torch.tensor([0, 1, torch.nan, 3])},
        "of backbone.visual.norm.bias are NaN or infinite": {**state, vit: state[vit] + torch.inf},
        "no published detector: it has no roi_head": {k: v for k, v in state.items() if k.startswith(VIT)},
        r"no published detector: it has no backbone.visual": {k: v for k, v in state.items() if k.startswith("roi_")},
    }
    for message, content in bad.items():
        torch.save({"state_dict": content}, tmp_path / "bad.pth")
        with pytest.raises(UserError, match=message) as error:
            more = [] if message == "another ViT" else ["--write-vit", str(tmp_path / "v.pt")]
            tool.main([config, str(tmp_path / "bad.pth"), out, *more, "--embeddings", str(tmp_path / "e.npy")])
        assert "\n" not in str(error.value)
        assert not any((tmp_path / written).exists() for written in ("out.pt", "v.pt", "e.npy"))
    with pytest.raises(UserError, match="other classes"):
        torch.save({"state_dict": state, "meta": {"CLASSES": ("x", "y", "z")}}, tmp_path / "bad.pth")
        tool.main([config, str(tmp_path / "bad.pth"), out])
    with pytest.raises(UserError, match="which of its 3 classes are novel"):
        torch.save({"state_dict": state}, tmp_path / "bad.pth")
        tool.main([config, str(tmp_path / "bad.pth"), out, "data.val_annotations=nowhere.json"])
    with pytest.raises(UserError, match="temperature_kind must be linear"):
        override = ["model.temperature_kind=log"]
        content = files.load(small / "detector.pt")
        content["detector"]["classifier.log_temperature"] = content["detector"].pop("classifier.temperature")
        content["config"]["model"]["temperature_kind"] = "log"
        files.save(content, tmp_path / "log.pt")
        tool.main([config, str(tmp_path / "log.pt"), str(tmp_path / "log.pth"), *override])


def test_a_detector_of_other_settings_is_not_exported(small: Path, tool: ModuleType, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    content = files.load(small / "detector.pt")
    content["config"]["model"] |= {"anchor_offset": 0.5, "roi_finest": 0.0, "embedding_relu": False, "cache_dir": "x"}
    content["config"]["data"] |= {"pixels": "model"}
    content["config"]["test"] |= {"nms": 0.5}
    files.save(content, tmp_path / "x.pt")
    command = [str(small / "tiny.toml"), str(tmp_path / "x.pt"), str(tmp_path / "x.pth")]
    theirs = ["model.anchor_offset=0.5", "model.embedding_relu=false", "model.roi_finest=0.0", 'data.pixels="model"']
    with pytest.raises(UserError) as error:
        tool.main(command)
    assert f"x.pt was trained with {', '.join(theirs)}, but " in str(error.value)
    assert 'model.roi_finest=56.0, data.pixels="imagenet": give' in str(error.value)
    assert not (tmp_path / "x.pth").exists()
    tool.main([*command, *theirs])
    assert (tmp_path / "x.pth").is_file()
    content["detector"]["rpn.objectness.bias"][0] = torch.nan
    files.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="values of rpn.objectness.bias are NaN"):
        tool.main([*command, *theirs, "--force"])


def test_embeddings_come_in_label_order(small: Path, tool: ModuleType, tmp_path: Path, monkeypatch, capsys):
    """Not in the published file's; what the tool writes serves as data.embeddings."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config, table = str(small / "tiny.toml"), tmp_path / "e.npy"
    tool.main([config, str(small / "detector.pt"), str(tmp_path / "a.pth")])
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    wanted = content["state_dict"][EMBEDDINGS].T.clone()
    content["state_dict"][EMBEDDINGS] = content["state_dict"][EMBEDDINGS][:, [2, 0, 1, 3]]
    content["meta"]["CLASSES"] = ("D", "a", "b_c")
    torch.save(content, tmp_path / "b.pth")
    command = [config, str(tmp_path / "b.pth"), str(tmp_path / "b.pt"), "--embeddings", str(table), "--force"]
    tool.main(command)
    assert np.array_equal(np.load(table), wanted.numpy())
    assert files.load(tmp_path / "b.pt")["classes"] == ["a", "b c", "d"]
    for classes, message in ((("D", "a"), "2 classes are listed in it, but it has embeddings of 3"),
                             (("d", "a", "a"), "other classes")):  # fmt: skip
        torch.save({**content, "meta": {"CLASSES": classes}}, tmp_path / "b.pth")
        with pytest.raises(UserError, match=message):
            tool.main(command)
    del content["meta"]
    torch.save(content, tmp_path / "b.pth")
    assert "lists no classes" not in capsys.readouterr().out
    tool.main(command)
    assert "lists no classes" in capsys.readouterr().out


def test_output_paths_are_checked_first(small: Path, tool: ModuleType, tmp_path: Path, monkeypatch):
    """Nothing is read or written, and no file takes another's place."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pth").write_bytes(b"published")
    (tmp_path / "c.toml").write_text('[model]\ncache_dir = "w.pt"\n')
    (tmp_path / "w.pt").write_bytes(b"weights")
    (tmp_path / "link.pth").symlink_to("a.pth")
    (tmp_path / "sub").mkdir()
    for given, message in {
        "a.pth": "target a.pth is the same file as source a.pth",
        "sub/../link.pth": "target sub/../link.pth is the same file as source a.pth",
        "c.toml": "target c.toml is the same file as CONFIG c.toml",
        "w.pt": "target w.pt is the same file as model.cache_dir",
        "b.pt --write-vit b.pt": "--write-vit b.pt is the same file as target b.pt",
        "b.pt --write-vit a.pth": "--write-vit a.pth is the same file as source a.pth",
        "b.pt --write-vit v.npy --embeddings v.npy": "--embeddings v.npy is the same file as --write-vit v.npy",
        "b.pt --embeddings nodir/q.npy": "--embeddings nodir/q.npy: the folder nodir does not exist: make it first",
        "nodir/b.pt": "target nodir/b.pt: the folder nodir does not exist",
        "b.pt --write-vit a.pth/v.pt": "the folder a.pth does not exist",
        ".": "target . is a folder",
        "x" * 300: "File name too long; choose another name",
        "b.pt --embeddings q": "--embeddings q: give a name that ends in .npy",
    }.items():
        with pytest.raises(UserError) as error:
            tool.main(["c.toml", "a.pth", *given.split(), "--force"])
        assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "c.toml", "link.pth", "sub", "w.pt"]
    assert (tmp_path / "a.pth").read_bytes() == b"published"
    for flag in (["--write-vit", "v.pt"], ["--embeddings", "e.npy"]):
        with pytest.raises(UserError, match=f"{flag[0]}: .*detector.pt is a detector file, which has none"):
            tool.main([str(small / "tiny.toml"), str(small / "detector.pt"), "b.pth", *flag])


class Trap:
    """Unpickling it the usual way would leave a file behind."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("archive", [True, False])
def test_nothing_in_a_file_is_executed(tmp_path: Path, archive: bool):
    trap = Trap(tmp_path / "sprung")
    state = OrderedDict(a=torch.arange(3.0), b=torch.nn.Parameter(torch.ones(2)), c=torch.tensor(4))
    content = {"state_dict": state, "meta": {"CLASSES": ("x", "y"), "hook": trap, "array": np.arange(3)},
               "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}  # fmt: skip
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=archive)
    found, meta = read_published(tmp_path / "x.pth")
    assert all(torch.equal(found[k], v) for k, v in state.items()) and not found["b"].requires_grad
    assert meta["CLASSES"] == ("x", "y") and isinstance(meta["hook"], StandIn)
    (tmp_path / "y.pth").write_bytes(pickle.dumps(trap))  # before any tensor is looked for
    with pytest.raises(UserError, match="y.pth is damaged or no checkpoint"):
        read_published(tmp_path / "y.pth")
    torch.save({"state_dict": {"a": trap}}, tmp_path / "z.pth")
    with pytest.raises(UserError, match="no state dict of tensors"):
        read_published(tmp_path / "z.pth")
    assert not trap.place.exists()


def test_damaged_published_files(tmp_path: Path):
    torch.save({"state_dict": {"a": torch.randn(1000)}}, tmp_path / "x.pth")
    whole = (tmp_path / "x.pth").read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 40):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        (tmp_path / "y.pth").write_bytes(damaged)
        try:
            found, _ = read_published(tmp_path / "y.pth")
            assert torch.equal(found["a"], torch.load(tmp_path / "x.pth", weights_only=True)["state_dict"]["a"])
        except UserError as error:
            assert "y.pth" in str(error) and "\n" not in str(error)
    (tmp_path / "y.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        read_published(tmp_path / "y.pth")
