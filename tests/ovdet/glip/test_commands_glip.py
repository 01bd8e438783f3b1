"""Grounding, labelling and ODinW from their command lines, with a small model that has learned nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ovdet
from ovdet.commands import detect
from ovdet.config import format_config
from ovdet.glip import files
from ovdet.glip.assemble import config_for, load_model, load_published
from ovdet.glip.commands import ground, label, odinw
from ovdet.glip.config import GlipConfig
from ovdet.glip.data.captions import load_captions
from ovdet.glip.data.odinw import find_sets
from ovdet.glip.draw import draw
from ovdet.glip.model import GLIP
from ovdet.glip.names import write_state
from ovdet.glip.phrases import noun_phrases
from training.engine.errors import UserError


@pytest.fixture(scope="module")
def checkpoint(
    tiny: Callable[..., GLIP], config_of_tiny: Callable[..., GlipConfig], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    config = config_of_tiny()
    config.data.test_size, config.data.longest, config.train.precision = 64, 128, "fp32"
    file = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    torch.save(files.content_of(tiny(seed=3), config), file)
    return file


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos" / "a.png")
    return tmp_path / "photos" / "a.png"


def run(checkpoint: Path, photo: Path, out: Path, *more: str) -> int:
    arguments = [str(photo), "--checkpoint", str(checkpoint), "--out", str(out), "--device", "cpu"]
    return ground.run([*arguments, *more])


def test_grounding_draws_and_lists(checkpoint: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    caption = ["--caption", "a red ball near the small dog"]
    assert run(checkpoint, photo, tmp_path / "a", *caption, "--score", "0.01") == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results and {r["name"] for r in results} <= {"a red ball", "the small dog"} and "a.png" in out
    for result in results:
        x1, y1, x2, y2 = result["box"]
        assert 0 <= x1 <= x2 <= 80 and 0 <= y1 <= y2 <= 48 and 0.01 <= result["score"] <= 1
    with Image.open(tmp_path / "a" / "a.png") as picture:  # enlarged, with the caption below
        assert picture.width == 640 and picture.height > 384
    for more in (["--spans", "2-10; 16-25"], ["--phrases", "red ball; dog"]):
        assert run(checkpoint, photo, tmp_path / "b", *caption, *more, "--score", "0") == 0
        names = {r["name"] for r in json.loads((tmp_path / "b" / "results.json").read_text())}
        assert names <= {"red ball", "the small", "dog"} and names
    for names in ("dog, cat", "dog . cat . dog .", "dog. cat", str(tmp_path / "names.txt")):
        (tmp_path / "names.txt").write_text("dog\n\ncat\n", encoding="utf-8-sig")
        assert run(checkpoint, photo, tmp_path / "c", "--classes", names, "--score", "0", "--aggregation", "max") == 0
        assert {r["name"] for r in json.loads((tmp_path / "c" / "results.json").read_text())} == {"dog", "cat"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--caption", "riding along on it"], "the built-in rule finds no noun phrase"),
        (["--caption", "a dog", "--phrases", "cat"], '"cat" does not stand in the caption'),
        (["--caption", "a dog", "--spans", "2-90"], "span [2, 90] is not within the 5 characters"),
        (["--caption", "a dog", "--spans", "two"], 'give begin-end, as "0-12"'),
        (["--caption", "the dog " * 70], "tokens, but the text encoder takes 64"),
        (["--caption", "a dog", "--spans", "0-5", "--phrases", "dog"], "name the same thing"),
        (["--caption", "a dog", "--tagger", "spacy"], "needs the package spacy"),
        (["--classes", "dog", "--phrases", "dog"], "--phrases belongs to --caption"),
        (["--classes", "absent.txt"], "no such file"),
        (["--classes", " , "], "give names separated by commas"),
        (["--classes", " . ."], "names nothing"),
        (["--classes", "dog", "--score", "5"], "give a number between 0 and 1"),
        (["--classes", "dog", "--prompts", "/nowhere.json"], "/nowhere.json cannot be read"),
        (["--classes", "dog", "--set", "text.vocabulary=/nowhere"], "/nowhere does not exist"),
        (["--classes", "dog", "--set", "head.blocks=1"], "has unknown head.blocks.1"),
    ],
)
def test_faulty_input_is_one_line(
    checkpoint: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
    more: list[str], message: str,
):  # fmt: skip
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    assert run(checkpoint, photo, tmp_path / "out", *more) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], errors
    assert not (tmp_path / "out").exists()


def test_images_that_cannot_be_read(checkpoint: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "other").mkdir()
    Image.open(photo).save(tmp_path / "other" / "a.png")
    arguments = ["--checkpoint", str(checkpoint), "--classes", "dog", "--out", str(tmp_path / "out"), "--device", "cpu"]
    images = [str(photo), str(tmp_path / "other" / "a.png"), "absent.png"]
    assert ground.run([*images, *arguments]) == 0
    assert "skipped absent.png: no such file" in capsys.readouterr().out
    written = sorted(p.name for p in (tmp_path / "out").rglob("*.*"))
    assert written == ["a.png", "a.png", "results.json"]  # images of one name, in folders of their own
    assert ground.run(["absent.png", *arguments]) == 2


def test_pictures_show_boxes_and_phrases_in_colour():
    image = torch.full((3, 100, 200), 128, dtype=torch.uint8)
    caption = "a red ball near the dog"
    phrases = noun_phrases(caption)
    boxes = torch.tensor([[10.0, 10, 60, 60], [10, 10, 61, 61], [150, 50, 400, 300]])
    names = [p.text for p in phrases]
    picture = np.asarray(draw(image, boxes, [0, 0, 1], [0.9, 0.8, 0.7], names, caption=caption, phrases=phrases))
    plain = np.asarray(draw(image, boxes[:0], [], [], names, caption=caption, phrases=phrases))
    assert picture.shape == plain.shape and picture.shape[1] == 640
    colours = {tuple(c) for c in plain[330:].reshape(-1, 3)[::7]}
    assert {c for c in colours if max(c) - min(c) > 100}, "the caption's phrases are in colour"
    assert (picture[:320] != plain[:320]).any(-1).sum() > 1000


# -- labelling --------------------------------------------------------------------------------------------------------


@pytest.fixture
def captions(photo: Path, tmp_path: Path) -> Path:
    texts = ["a dog near a cat", "riding along", "the " + "red dog " * 60, "a bus", "two small balls", "a sofa"]
    images = [{"id": i, "file_name": "a.png" if i != 4 else "absent.png"} for i in range(1, 7)]
    entries = [{"id": 10 + i, "image_id": i, "caption": t} for i, t in enumerate(texts, 1)]
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"images": images, "annotations": [*entries, {"id": 99, "image_id": 77}]}))
    return file


def test_labels_come_in_shards_that_go_on(checkpoint: Path, captions: Path, photo: Path, tmp_path: Path):
    out = tmp_path / "pseudo"

    def run(*more: str) -> int:
        arguments = [str(captions), "--images", str(photo.parent), "--checkpoint", str(checkpoint), "--out", str(out)]
        return label.run([*arguments, "--device", "cpu", "--shard", "2", "--batch-size", "2", *more])

    assert run("--score", "0.02") == 0
    shards = sorted(out.glob("shard_*.jsonl"))
    assert [s.name for s in shards] == [f"shard_{i:06d}.jsonl" for i in range(3)]
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert counts["captions"] == 6 and counts["captions with boxes"] == 3
    assert counts["dropped: no noun phrase"] == counts["dropped: image cannot be read"] == 1
    assert counts["dropped: more tokens than the text encoder takes"] == 1
    records = load_captions(str(out), key="set")
    assert len(records) == 3 and len(records.boxes) == counts["boxes"] and (records.scores > 0.02).all()
    assert records.captions[0] == "a dog near a cat" and records.ids.tolist() == [11, 15, 16]
    words = set()
    for i in range(len(records)):
        for box in range(records.of(i).start, records.of(i).stop):
            words |= {records.captions[i][begin:end] for begin, end in records.spans_of(box)}
    assert words <= {"a dog", "a cat", "two small balls", "a sofa"} and len(words) >= 3
    # A shard that is missing is made again, to the byte; the others stay.
    before, stamp = shards[1].read_bytes(), shards[0].stat().st_mtime_ns
    shards[2].write_text("kept as it is\n")
    shards[1].unlink()
    assert run("--score", "0.02") == 0
    assert shards[1].read_bytes() == before and shards[0].stat().st_mtime_ns == stamp
    assert shards[2].read_text() == "kept as it is\n"


def test_labels_that_cannot_be(
    checkpoint: Path, captions: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    common = ["--images", str(photo.parent), "--checkpoint", str(checkpoint), "--device", "cpu"]
    out = ["--out", str(tmp_path / "pseudo")]
    assert label.run([str(captions), *common, *out, "--limit", "2", "--seed", "1"]) == 0

    def refused(message: str, *arguments: str) -> None:
        capsys.readouterr()
        assert label.run(list(arguments)) == 2
        assert message in capsys.readouterr().err

    refused("was made with seed 1, now it is 2", str(captions), *common, *out, "--limit", "2", "--seed", "2")
    refused("no folder of pseudo boxes", str(captions), *common, "--out", str(photo.parent))
    refused("--shard 0: give 1 or more", str(captions), *common, *out, "--shard", "0")
    (tmp_path / "bad.jsonl").write_text("{")
    refused("bad.jsonl: cannot be read", str(tmp_path / "bad.jsonl"), *common, "--out", str(tmp_path / "b"))
    (tmp_path / "bad.jsonl").write_text('{"image": "a.png"}\n')
    refused("holds no image with a caption", str(tmp_path / "bad.jsonl"), *common, "--out", str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()


def test_the_other_detectors_command_refuses_it(checkpoint: Path, photo: Path):
    with pytest.raises(UserError, match="use GLIP/ground.py"):
        detect.main([str(photo), "--checkpoint", str(checkpoint), "--classes", "dog", "--device", "cpu"])


# -- many data sets ---------------------------------------------------------------------------------------------------


@pytest.fixture
def wild(tmp_path: Path) -> Path:
    """Two data sets with three splits of three images each."""
    rng = np.random.default_rng(0)
    for name, classes in (("Ponds", ["fish", "jelly fish"]), ("Rooms", ["dog"])):
        for split in ("train", "valid", "test"):
            folder = tmp_path / "odinw" / name / split
            folder.mkdir(parents=True)
            images, annotations = [], []
            for i in range(3):
                Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
                images.append({"id": i, "file_name": f"{i}.png", "height": 48, "width": 64})
                place = {"image_id": i, "category_id": i % len(classes), "bbox": [5, 5, 20, 20], "area": 400}
                annotations.append({"id": i + 1, **place})
            categories = [{"id": i, "name": n} for i, n in enumerate(classes)]
            content = {"images": images, "annotations": annotations, "categories": categories}
            (folder / "annotations_without_background.json").write_text(json.dumps(content))
    return tmp_path / "odinw"


def test_tuning_warms_up_shortly_and_freezes_as_published(wild: Path):
    """Pre-training's 2000 steps are more than a whole run of few shots has; what is said by hand goes first."""
    config, (pond, _) = GlipConfig(), find_sets(wild, None)
    full = odinw.tuned_config(config, pond, "full", 1, 3, "glip.pt")
    assert config.train.warmup_steps == 2000 and (full.train.warmup_steps, full.image.freeze_at) == (10, 2)
    given = ["train.warmup_steps=50", "image.freeze_at=1"]
    config.train.warmup_steps, config.image.freeze_at = 50, 1
    full = odinw.tuned_config(config, pond, "full", 1, 3, "glip.pt", given)
    assert (full.train.warmup_steps, full.image.freeze_at) == (50, 1)
    assert odinw.tuned_config(config, pond, "linear_prob", 1, 3, "glip.pt").image.freeze_at == 1


def test_prepared_choices_of_images_and_prompts_of_a_set_are_taken(wild: Path, tmp_path: Path):
    pond, room = find_sets(wild, None)
    prepared = wild / "Ponds" / "train" / "fewshot_train_shot1_seed30.json"
    prepared.write_text((wild / "Ponds" / "train" / "annotations_without_background.json").read_text())
    for seed, file, shots in ((30, prepared, 0), (3, pond.splits["train"][0], 1)):
        tuned = odinw.tuned_config(GlipConfig(), pond, "full", 1, seed, "glip.pt")
        assert (tuned.data.train_annotations, tuned.data.shots, tuned.data.copies) == (str(file), shots, 8)
    (tmp_path / "Ponds.json").write_text("{}")
    assert odinw.test_values(pond, "test", tmp_path)["data.prompts"] == str(tmp_path / "Ponds.json")
    assert "data.prompts" not in odinw.test_values(room, "test", tmp_path)


def test_many_data_sets_are_tested_and_tuned(
    checkpoint: Path, wild: Path, tiny: Callable[..., GLIP], tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    out = tmp_path / "out"
    common = [str(wild), "--checkpoint", str(checkpoint), "--out", str(out), "--device", "cpu"]
    fast = ["data.workers=0", "data.sizes=[64]", "train.warmup_steps=1"]
    assert odinw.run([*common, *fast]) == 0
    assert "zero_shot, AP of 1 seed(s)" in capsys.readouterr().out
    board = json.loads((out / "leader_board_zero_shot.json").read_text())
    assert set(board) == {"Ponds", "Rooms"} and all(isinstance(v, list) for v in board.values())
    monkeypatch.setattr(odinw, "EPOCHS", 2)
    tune = ["--mode", "language_prompt_v2", "--shots", "1", "--seeds", "3", "30", "--sets", "Ponds"]
    assert odinw.run([*common, *fast, *tune]) == 0
    board = json.loads((out / "leader_board_language_prompt_v2_1.json").read_text())
    assert set(board["Ponds"]) == {"3", "30"}
    run = out / "Ponds" / "language_prompt_v2_1_3"
    config = torch.load(run / "run" / "model_best.pt", weights_only=True)["config"]
    assert config["data"]["copies"] == 8 and config["train"]["lr"] == 0.05 and config["train"]["stop_patience"] == 8
    means = json.loads((out / "metrics_language_prompt_v2_1.json").read_text())["means"]
    assert set(means) == {"AP of 1 sets"}
    # What is there is not run again.
    stamp = (run / "test" / "metrics.json").stat().st_mtime_ns
    assert odinw.run([*common, *fast, *tune]) == 0
    assert (run / "test" / "metrics.json").stat().st_mtime_ns == stamp
    # Nor is it taken for that of another model, other settings, or other prompts; and nothing of it is lost.
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "Ponds.json").write_text('{"fish": {"suffix": ", which is flat"}}')
    other = tmp_path / "other.pt"
    torch.save(torch.load(checkpoint) | {"model": tiny(seed=4).state_dict()}, other)
    for more, what in (
        (["--checkpoint", str(other)], "Ponds/zero_shot was made with other weights"),
        (["test.score=0.9"], "Ponds/zero_shot was made with other test.score (test.score: 0.05, now 0.9)"),
        (["--prompts", str(tmp_path / "prompts")], "Ponds/zero_shot was made with other data.prompts"),
        ([*tune, "--checkpoint", str(other)], "Ponds/language_prompt_v2_1_3 was made with other weights"),
        (["train.batch_size=3", *tune], "Ponds/language_prompt_v2_1_3 was made with other train.batch_size"),
    ):
        capsys.readouterr()
        assert odinw.run([*common, *fast, *more]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1 and what in errors[0] and "give another folder, or delete this one" in errors[0]
    assert (run / "test" / "metrics.json").stat().st_mtime_ns == stamp
    capsys.readouterr()
    assert odinw.run([*common, "--shots", "1"]) == 2 and "--shots needs --mode" in capsys.readouterr().err
    assert odinw.run([*common, "--sets", "Seas"]) == 2 and "lacks Seas" in capsys.readouterr().err


def test_a_file_is_a_detector(checkpoint: Path, photo: Path, tiny: Callable[..., GLIP], config_of_tiny, tmp_path: Path):
    detector = ovdet.load_detector(checkpoint, device="cpu", overrides=["test.score=0.0"])
    found = detector([photo, np.asarray(Image.open(photo))], ["dog", "red_ball"], batch_size=2)
    assert len(found) == 2 and found[0]["size"] == (48, 80) and set(found[0]["names"]) == {"dog", "red ball"}
    for key in ("boxes", "scores", "labels"):
        assert np.allclose(found[0][key], found[1][key], atol=1e-5)
    texts = detector.model.encoded_texts
    detector(photo, ["dog", "red_ball"])
    assert detector.model.encoded_texts == texts, "the same classes are encoded once"
    grounded = detector.ground(photo, "a dog near a red ball", ["dog", "red ball"])
    assert [p.text for p in grounded["phrases"]] == ["dog", "red ball"] and (np.diff(grounded["scores"]) <= 0).all()
    with pytest.raises(ValueError, match=r"classes are the text 'cat, dog': give a list of names"):
        detector(photo, "cat, dog")
    with pytest.raises(ValueError, match=r"phrases are the text 'dog': give a list of them, such as \['dog'\]"):
        detector.ground(photo, "a dog near a red ball", "dog")
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size is {size}: give 1 or more"):
            detector(photo, ["dog"], batch_size=size)
    # A released file has no config of its own.
    released = {"model": write_state(tiny(seed=3).state_dict(), "glip", fusion=True)}
    torch.save(released, tmp_path / "released.pth")
    config = config_of_tiny()
    config.data.test_size, config.data.longest, config.train.precision, config.test.score = 64, 128, "fp32", 0.0
    (tmp_path / "config.toml").write_text(format_config(config))
    same = load_published(tmp_path / "released.pth", tmp_path / "config.toml", device="cpu")
    assert np.allclose(same(photo, ["dog", "red_ball"])[0]["scores"], found[0]["scores"], atol=1e-5)


def test_images_are_turned_as_the_config_says(
    checkpoint: Path, photo: Path, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """By default they are not: annotations mostly mean images as they are stored."""
    lying, exif = Image.open(photo), Image.Exif()
    exif[0x0112] = 6  # of a camera that was held upright
    lying.save(photo, exif=exif)
    for given, size in (([], (48, 80)), (["data.exif=true"], (80, 48))):
        detector = ovdet.load_detector(checkpoint, device="cpu", overrides=["test.score=0.0", *given])
        for picture in (photo, Image.open(photo)):
            assert detector(picture, ["dog"])[0]["size"] == size and detector.ground(picture, "a dog")["size"] == size
        out = tmp_path / f"drawn{len(given)}"
        assert run(checkpoint, photo, out, "--classes", "dog", *(["--set", *given] if given else [])) == 0
        with Image.open(out / "a.png") as drawn:
            assert (drawn.width > drawn.height) == (size[1] > size[0])
        folder = tmp_path / f"labels{len(given)}"
        words = [str(captions), "--images", str(photo.parent), "--checkpoint", str(checkpoint), "--score", "0"]
        assert label.run([*words, "--out", str(folder), "--device", "cpu", *given]) == 0
        edges = np.concatenate([r.reshape(-1, 4).max(0)[None] for r in _boxes(folder)]).max(0)
        assert edges[2] <= size[1] and edges[3] <= size[0] and edges[2 + (size[0] > size[1])] > 48
    capsys.readouterr()
    assert label.run([*words, "--out", str(tmp_path / "labels0"), "--device", "cpu", "data.exif=true"]) == 2
    assert "was made with exif False, now it is True" in capsys.readouterr().err


def _boxes(folder: Path) -> list[np.ndarray]:
    lines = (folder / "shard_000000.jsonl").read_text().splitlines()
    return [np.array(json.loads(line)["bboxes"]) for line in lines]


def test_settings_that_differ_from_the_training_are_named(checkpoint: Path, caplog: pytest.LogCaptureFixture):
    load_model(config_for(checkpoint, None, ["test.score=0.5"]), checkpoint)
    assert "was trained with" not in caplog.text
    load_model(config_for(checkpoint, None, ["head.offsets=aligned", "image.drop_path=0.5"]), checkpoint)
    assert 'was trained with head.offsets="released"; the config at hand differs' in caplog.text
