"""GLIP on the towers of a CLIP model of this project."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import open_clip
from ovdet.config import format_config
from ovdet.glip.assemble import read_config, start_model
from ovdet.glip.commands import train as train_command
from ovdet.glip.evaluation.flickr import parse_sentence, read_entities
from ovdet.glip.image import ClipPyramid
from ovdet.glip.losses import GroundTruth
from ovdet.glip.prompts import make_prompts
from ovdet.glip.text import ClipText
from ovdet.glip.tuning import set_training
from training.engine.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ROOT / "GLIP" / "configs" / "clip_vitti8.toml"


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the quick start's model."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(open_clip.create_model("ViT-Ti-8-64").state_dict(), file)
    return file


SWIN = (8, 16, 32, 64, 128)


@pytest.mark.parametrize(
    ("patch", "strides", "divisor"), [(8, SWIN, 32), (16, SWIN, 32), (32, SWIN, 32), (14, (7, 14, 28, 56, 112), 28)]
)
def test_levels_have_glips_strides(patch: int, strides: tuple, divisor: int):
    config = open_clip.get_model_config("ViT-Ti-8-64")
    config["vision_cfg"] |= {"patch_size": patch, "image_size": 8 * patch}
    tower = open_clip.factory.build_image_tower(config)
    pyramid = ClipPyramid(tower, [1, 3], 16)
    assert pyramid.strides == strides and pyramid.divisor == divisor
    height, width = 2 * divisor, 3 * divisor
    levels = pyramid(torch.randn(1, 3, height, width))
    assert [x.shape[-2:] for x in levels] == [(-(-height // s), -(-width // s)) for s in strides]
    with pytest.raises(ValueError, match="two ascending block indices below 5"):
        ClipPyramid(tower, [3, 5])


def test_text_states_are_those_before_pooling(clip_file: Path):
    """The state at the end token, projected, is CLIP's own text embedding, whatever stands behind it."""
    model = open_clip.create_model("ViT-Ti-8-64", clip_file)
    ids = open_clip.get_tokenizer("ViT-Ti-8-64")(["a red circle", "a blue striped star and a moon"])
    text = ClipText(model.text)
    ends = ids.argmax(1)
    cut = int(ends.max()) + 1
    states = text(ids[:, :cut], torch.arange(cut) <= ends[:, None])
    pooled = states[torch.arange(2), ends] @ model.text.text_projection
    assert torch.allclose(pooled, model.encode_text(ids), atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_towers_stay_and_all_else_learns(clip_file: Path, frozen: bool):
    config = read_config(CONFIG, [f"clip.pretrained={clip_file}", f"text.frozen={str(frozen).lower()}"])
    model = start_model(config)
    assert model.tokenizer.limit == 32
    assert not any(p.requires_grad for p in model.image.tower.parameters())
    learning = {name for name, p in model.text.named_parameters() if p.requires_grad}
    unread = {"tower.text_projection"}  # the joint space, which nothing here reads
    assert learning == (set() if frozen else set(dict(model.text.named_parameters())) - unread)
    assert all(p.requires_grad for p in model.head.parameters())
    set_training(model)
    assert not model.image.tower.training and model.text.training != frozen and model.head.training
    texts = [model.tokenizer.encode("a red circle and a blue star")] * 2
    tokens = torch.zeros(1, 32, dtype=torch.bool)
    tokens[0, 1:4] = True
    truths = [GroundTruth(torch.tensor([[5.0, 5, 40, 40]]), tokens), GroundTruth(torch.zeros(0, 4), tokens[:0])]
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    sum(model(images, [(64, 96), (50, 60)], texts, truths).values()).backward()
    # Two stages of a pyramid of five levels are reached by losses of such small boxes; every parameter is in the graph.
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    other = start_model(read_config(CONFIG, [f"clip.pretrained={clip_file}", "text.weights=random"]))
    assert torch.equal(other.image.tower.trunk.norm.weight, model.image.tower.trunk.norm.weight)
    assert not torch.equal(other.text.tower.token_embedding.weight, model.text.tower.token_embedding.weight)
    names = [f"{a} {b} {c}" for a in ("red", "blue") for b in ("striped", "dotted") for c in ("star", "moon", "ring")]
    prompts = make_prompts(names, model.tokenizer)
    assert len(prompts) > 1 and sum(len(p.labels) for p in prompts) == len(names)


def test_towers_that_do_not_fit(clip_file: Path):
    for override, message in (
        ("clip.name=", "clip.name is empty"),
        ("clip.pretrained=", "clip.pretrained is empty"),
        ("clip.pretrained=/nowhere.pt", "nowhere.pt"),
        ("image.blocks=[3,9]", "two ascending block indices"),
        ("head.text_heads=5", "multiple of the 5 heads"),
        ("clip.name=ViT-B-16-SigLIP2-256", "its tokenizer is not CLIP's own"),
    ):
        changes = [f"clip.pretrained={clip_file}", override]
        if "SigLIP" in override:
            changes = ["clip.pretrained=random", override]
        try:
            with pytest.raises(UserError, match=message) as error:
                start_model(read_config(CONFIG, changes))
        except pytest.fail.Exception:
            raise AssertionError(override) from None
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def study_data(as_module) -> ModuleType:
    return as_module("GLIP/scripts/study_data.py")


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Three images a split, in the form of the generated scenes; "red star" is held out."""
    names = {1: "red star", 2: "blue ring", 3: "red ring"}
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        images, annotations = [], []
        for i, things in enumerate(([2, 3], [2, 2], [1, 2, 2]), 1):
            Image.fromarray(np.full((64, 64, 3), 40 * i, np.uint8)).save(tmp_path / split / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "height": 64, "width": 64})
            for k, c in enumerate(things):
                place = {"image_id": i, "category_id": c, "bbox": [5 + 15 * k, 5, 20, 20], "area": 400}
                annotations.append({"id": len(annotations) + 1, **place})
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": n} for i, n in names.items()],
        }
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    (tmp_path / "annotations" / "split.json").write_text(json.dumps({"base": [], "novel": ["red star"]}))
    return tmp_path


def test_the_studys_data(study_data: ModuleType, scenes: Path):
    training, test = (
        json.loads((scenes / "annotations" / f"instances_{s}2017.json").read_text()) for s in ("train", "val")
    )
    (scenes / "glip").mkdir()
    assert study_data.write_training(training, {"red star"}, scenes / "glip") == 2
    content = json.loads((scenes / "glip" / "train.json").read_text())
    assert [i["caption"] for i in content["images"]] == ["a blue ring and a red ring", "a blue ring"]
    assert [a["tokens_positive"] for a in content["annotations"]] == [[[0, 11]], [[16, 26]], [[0, 11]], [[0, 11]]]
    assert "red star" not in (scenes / "glip" / "detection.json").read_text()
    chance = study_data.write_test(test, {"red star"}, {"blue ring"}, scenes / "glip")
    # Image 1: two things, one each; image 2 has one kind alone; image 3: the star is one of three, the rings two.
    assert chance == pytest.approx({"seen": (0.5 + 0.5 + 2 / 3) / 3, "unseen": 1 / 3, "unknown": 1 / 3, "all": 0.5})
    sentences, boxes = read_entities(scenes / "glip", ["3"])
    text, phrases = parse_sentence(sentences["3"][0])
    assert text == "a red star and a blue ring" and [p.kinds for p in phrases] == [("unseen", "unknown"), ("seen",)]
    assert boxes["3"][phrases[1].entity] == [[20, 5, 39, 24], [35, 5, 54, 24]]


def test_phrases_are_trained_and_tested(clip_file: Path, study_data: ModuleType, scenes: Path, tmp_path: Path):
    """From the study's data to recall, on the quick start's kind of model; the file holds what was trained."""
    (scenes / "glip").mkdir()
    for split, write in (("train", study_data.write_training), ("val", study_data.write_test)):
        content = json.loads((scenes / "annotations" / f"instances_{split}2017.json").read_text())
        known = [] if split == "train" else [{"blue ring"}]
        write(content, {"red star"}, *known, scenes / "glip")
    config = read_config(CONFIG, [f"clip.pretrained={clip_file}"])
    data, train = config.data, config.train
    (tmp_path / "captions.toml").write_text(
        f'[set]\nkind = "grounding"\nannotations = "{scenes}/glip/train.json"\nimages = "{scenes}/train2017"\n'
    )
    data.train_sets, data.protocol, data.sentences = [str(tmp_path / "captions.toml")], "flickr", str(scenes / "glip")
    data.val_annotations, data.val_images = str(scenes / "glip" / "val.json"), str(scenes / "val2017")
    data.sizes, data.test_size, data.workers = [64], 64, 0
    train.epochs, train.batch_size, train.warmup_steps, train.metric = 2, 2, 1, "R@1"
    (tmp_path / "config.toml").write_text(format_config(config))
    arguments = [str(tmp_path / "config.toml"), "--work-dir", str(tmp_path / "run"), "--device", "cpu"]
    assert train_command.run(arguments) == 0
    (last,) = json.loads((tmp_path / "run" / "results.json").read_text())[-1:]
    assert {"R@1", "R@1 seen", "R@10 unseen", "upper bound unknown"} <= last.keys()
    content = torch.load(tmp_path / "run" / "model_last.pt", weights_only=True)
    assert content["base"]["weights"] == str(clip_file)
    assert not any(name.startswith("image.tower.") for name in content["model"])
    assert any(name.startswith("text.") for name in content["model"])  # the text tower learns in this config
