"""Detection, grounding and caption sets as samples, against recorded numbers and by hand."""

from __future__ import annotations

import base64
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ovdet.data.dataset import Skipped
from ovdet.glip import tokens as tk
from ovdet.glip.config import GlipConfig
from ovdet.glip.data import packing
from ovdet.glip.data.captions import load_captions
from ovdet.glip.data.classes import ClassTexts, class_prompts
from ovdet.glip.data.dataset import Collate, TrainDataset
from ovdet.glip.data.fewshot import choose_shots
from ovdet.glip.data.grounding import load_grounding
from ovdet.glip.data.odinw import find_sets
from ovdet.glip.data.records import Builder
from ovdet.glip.data.sets import SetConfig, SetSection, open_set, training_sets
from ovdet.glip.data.sources import DetectionSource, GroundingSource
from ovdet.glip.data.transforms import names_a_side, target_size
from ovdet.glip.data.tsv import load_tsv
from ovdet.glip.prompts import ClassPrompt
from training.engine.data.parsing import parse
from training.engine.errors import UserError


@pytest.fixture
def words(small_vocabulary: Path) -> tk.WordPieces:
    return tk.WordPieces(small_vocabulary, 64)


def picture(path: Path, width: int = 60, height: int = 40, left: int = 200) -> None:
    """An image whose left half has the value ``left``."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = left
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def coco(boxes: list[tuple[int, int, list[float]]], names: dict[int, str], images: int = 2) -> dict:
    """A COCO file: (image, category, xywh) of each object."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in range(1, images + 1)],
        "annotations": [
            {"id": i, "image_id": image, "category_id": c, "bbox": box} for i, (image, c, box) in enumerate(boxes, 1)
        ],
        "categories": [{"id": c, "name": n} for c, n in names.items()],
    }


# -- recorded ---------------------------------------------------------------------------------------------------------


def test_sizes_match_the_recorded_ones(glip_golden: Path):
    table = json.loads((glip_golden / "train.json").read_text())["resize_wh_min_to_hw"]
    for (width, height), shorter, wanted in table:
        assert list(target_size(height, width, shorter, 1333)) == wanted


def test_few_shots_match_the_recorded_ones(glip_golden: Path, words: tk.WordPieces):
    content = json.loads((glip_golden / "fewshot.json").read_text())
    data = parse(content["annotations"], "fewshot.json", flag="test", labelled=True)
    assert data.category_ids.tolist() == [int(c) for c in content["json_to_contiguous"]]
    texts = ClassTexts([ClassPrompt(chr(ord("a") + i)) for i in range(len(data.category_ids))], words)
    for shots, wanted in content["kept"].items():
        source = DetectionSource(data, root=".", texts=texts, shots=int(shots))
        assert data.image_ids[source.rows].tolist() == wanted


def test_class_texts_match_the_recorded_ones(glip_golden: Path, vocabulary: Path):
    recorded = json.loads((glip_golden / "text.json").read_text())
    bert = tk.WordPieces(vocabulary, 256)
    for case in ("od_simple", "od_ordered"):
        names = recorded["od_simple"]["names"]
        texts = ClassTexts(class_prompts([int(i) for i in names], list(names.values())), bert)
        present = [int(c) - 1 for c in recorded["od_simple"]["category"]]
        text, spans = texts.write(present, np.random.default_rng(0))
        assert text == recorded[case]["caption"]
        assert [[list(spans[label])] for label in present] == recorded[case]["spans"]
    wanted = recorded["od_ordered"]["label_to_positions"]
    assert {str(label + 1): list(span) for label, span in spans.items()} == wanted


def test_sampled_negatives_have_the_recorded_distribution(glip_golden: Path, vocabulary: Path):
    recorded = json.loads((glip_golden / "text.json").read_text())
    random, draws = recorded["od_random"], recorded["od_random"]["draws"]
    names = recorded["queries"]["coco"][0]["names"]
    bert = tk.WordPieces(vocabulary, 256)
    asked, share = random["random_sample_negative"], random["control_probabilities"][2]
    texts = ClassTexts(class_prompts(range(1, len(names) + 1), names), bert, negatives=asked, full=share)
    present = [i - 1 for i in draws[0]["positives_kept"]]
    rng, counts = np.random.default_rng(0), []
    for _ in range(400):
        text, spans = texts.write(present, rng)
        counts.append(len(spans))
        assert set(present) <= set(spans) and len(bert.encode(text).ids) <= 256
        assert all(text[b:e] == texts.classes[label].name for label, (b, e) in spans.items())
    # The recorded set has one class more, the background, which is no class here.
    most = min(asked, len(names))
    every, recorded_every = np.array(counts), np.array([d["categories"] for d in draws])
    for low, high in ((0, 0.5), (0.5, 0.95), (0.95, 2)):  # shares of texts with few, many, and (nearly) all names
        ours = np.mean((every > low * most) & (every <= high * most))
        theirs = np.mean((recorded_every > low * most) & (recorded_every <= high * most))
        assert abs(ours - theirs) < 3 * (0.25 / len(draws)) ** 0.5
    assert abs(every.mean() - recorded_every.mean()) < 3 * recorded_every.std() / len(draws) ** 0.5


# -- texts of classes -------------------------------------------------------------------------------------------------


def test_negatives_stop_where_there_is_no_room(words: tk.WordPieces):
    names = [f"{a} {b}" for a in ("red", "blue", "green", "big") for b in ("cat", "dog", "bus", "man", "car", "ball")]
    texts = ClassTexts([ClassPrompt(n) for n in names], words, negatives=85)
    rng = np.random.default_rng(0)
    for _ in range(20):
        text, spans = texts.write(list(range(10)), rng)
        assert set(range(10)) <= set(spans) and len(words.encode(text).ids) <= words.limit
    # More present than fit: some are left out, with their boxes.
    text, spans = texts.write(list(range(len(names))), rng)
    assert 10 < len(spans) < len(names) and len(words.encode(text).ids) <= words.limit
    with pytest.raises(UserError, match="24 class names need 73 tokens, but the text encoder takes 64"):
        ClassTexts([ClassPrompt(n) for n in names], words)


def test_order_and_background(words: tk.WordPieces):
    classes = class_prompts([0, 1, 4], ["__background__", "hot_air balloon (big)", "cat"])
    assert classes[0] is None and classes[1].name == "hot air balloon "
    assert class_prompts([0, 1], ["dog", "background"]) == [ClassPrompt("dog"), ClassPrompt("background")]
    texts = ClassTexts(class_prompts([0, 1, 2], ["dog", "cat", "bus"]), words, shuffle=True)
    rng = np.random.default_rng(0)
    orders = {texts.write([0], rng)[0] for _ in range(50)}
    assert len(orders) == 6 and all(sorted(o.split(". ")) == ["bus", "cat", "dog"] for o in orders)
    with pytest.raises(UserError, match="no class besides the background"):
        ClassTexts([None], words)


# -- sources ----------------------------------------------------------------------------------------------------------


def test_detection_samples(tmp_path: Path, words: tk.WordPieces):
    for i in (1, 2, 3):
        picture(tmp_path / f"{i}.png")
    boxes = [(1, 7, [10, 5, 20, 10]), (1, 0, [50, 30, 20, 20]), (1, 7, [5, 5, 1, 10]), (2, 3, [0, 0, 60, 40])]
    data = parse(coco(boxes, {0: "big_dog", 3: "cat", 7: "bus"}, images=3), "x.json", flag="test", labelled=True)
    texts = ClassTexts(class_prompts(data.category_ids.tolist(), data.names), words)
    source = DetectionSource(data, root=str(tmp_path), texts=texts)
    assert len(source) == 2 and source.shot_counts() == {"bus": 1, "big_dog": 1, "cat": 1}
    assert len(DetectionSource(data, root=str(tmp_path), texts=texts, keep_empty=True)) == 3
    dataset = TrainDataset([source], [2], words, sizes=[80], longest=1000, flip=0.0, seed=0)
    assert len(dataset) == 4
    sample = dataset[0, 0]
    assert sample["image"].shape == (3, 80, 120) and sample["image_id"] == 1
    # x2 = x + w - 1, cut off at the image, then scaled by 2.
    assert sample["truth"].boxes.tolist() == [[20, 10, 58, 28], [100, 60, 118, 78]]
    named = [words._engine.id_to_token(i) for i in sample["text"].ids]
    found = [[named[t] for t in row.nonzero()[:, 0].tolist()] for row in sample["truth"].tokens]
    assert found == [["bus"], ["big", "dog"]] and sample["truth"].tokens.shape == (2, 64)
    mirrored = TrainDataset([source], [1], words, sizes=[40], longest=1000, flip=1.0, seed=0)[0, 0]
    assert mirrored["truth"].boxes.tolist() == [[30, 5, 49, 14], [0, 30, 9, 39]]
    assert mirrored["image"][0, 0, 0] == 0 and mirrored["image"][0, 0, -1] == 200
    assert torch.equal(dataset[3, 1]["image"], dataset[3, 3]["image"])  # the copy
    with pytest.raises(UserError, match="no image has an object"):
        empty = parse(coco([], {1: "a"}), "x.json", flag="t", labelled=True)
        DetectionSource(empty, root="", texts=ClassTexts([ClassPrompt("a")], words))


def test_shots_follow_the_seed():
    classes_of = {i: [i % 5, (i * 7) % 5] for i in range(1, 200)}
    chosen = {seed: choose_shots(classes_of, range(5), 3, seed) for seed in (3, 30, 300)}
    assert len({tuple(c) for c in chosen.values()}) == 3
    assert chosen[3] == choose_shots(dict(reversed(classes_of.items())), range(5), 3, 3)
    for ids in chosen.values():
        assert all(sum(c in classes_of[i] for i in ids) >= 3 for c in range(5)) and len(ids) <= 15
    assert choose_shots({5: [], 7: [1]}, [1], 0) == [7]


def test_grounding_files(tmp_path: Path, words: tk.WordPieces, caplog: pytest.LogCaptureFixture):
    caption = "the man on the left holds a dog"
    good = {"image_id": 1, "bbox": [5, 5, 20, 20], "tokens_positive": [[0, 7], [11, 19]]}
    bad = {
        "phrase whose span is outside of the caption": good | {"tokens_positive": [[26, 40]]},
        "box without a phrase": good | {"tokens_positive": []},
        "box of zero or negative size": good | {"bbox": [5, 5, 0, 20]},
        "phrase of white space": good | {"tokens_positive": [[3, 4]]},
        "box without four numbers": good | {"bbox": [1, 2]},
        "annotation of an image that is not listed": good | {"image_id": 9},
        "phrase whose span is no pair of whole numbers": good | {"tokens_positive": [["a", "b"]]},
        "annotation without an image": {"bbox": [1, 1, 2, 2]},
    }
    content = {
        "images": [
            {"id": 1, "file_name": "a.png", "caption": caption},
            {"id": 2, "file_name": "b.png", "caption": "nothing here"},
            {"id": 3, "file_name": "c.png"},
        ],
        "annotations": [good, *bad.values(), good | {"tokens_positive": [28, 31]}],
    }
    path = tmp_path / "g.json"
    path.write_text(json.dumps(content))
    records = load_grounding(str(path), key="set")
    assert records.skipped == {reason: 1 for reason in bad} | {"image without a caption": 1}
    assert all(reason in caplog.text for reason in bad)
    picture(tmp_path / "a.png")
    source = GroundingSource(records, root=str(tmp_path), tokenizer=words)
    assert len(records) == 2 and len(source) == 1
    sample = TrainDataset([source], [1], words, sizes=[40], longest=1000, flip=1.0, seed=0)[0, 0]
    assert sample["image"][0, 0, 0] == 200, "a caption that speaks of left is not mirrored"
    rows = [row.nonzero()[:, 0].tolist() for row in sample["truth"].tokens]
    assert rows == [[1, 2, 4, 5], [9]]  # "holds" is two pieces
    content["annotations"] = list(bad.values())
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no caption has a phrase with a box"):
        GroundingSource(load_grounding(str(path), key="set"), root="", tokenizer=words)
    content["images"] = [{"id": 1, "file_name": "a.png"}]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="holds no image with a caption"):
        load_grounding(str(path), key="set")
    with pytest.raises(UserError, match="no such file"):
        load_grounding(str(tmp_path / "absent.json"), key="set")


def test_sources_of_a_mixed_set(tmp_path: Path):
    images = [{"id": i, "file_name": "a.png", "caption": "a dog", "data_source": s} for i, s in enumerate("xyz")]
    (tmp_path / "g.json").write_text(json.dumps({"images": images, "annotations": []}))
    records = load_grounding(str(tmp_path / "g.json"), key="set", folders={"x": "one", "y": "two/three"})
    assert [records.images[i] for i in range(2)] == ["one/a.png", "two/three/a.png"]
    assert records.skipped == {"image of the source 'z', which has no folder": 1}


def test_captions_that_clips_tokenizer_would_change_are_skipped(tmp_path: Path):
    builder, tokenizer = Builder("x"), tk.ClipPairs()
    for i, text in enumerate(("a man  and a dog", "a man and a dog")):
        builder.add(i, "a.png", text, [((0, 0, 9, 9), 1.0, [(2, 5)])])
    picture(tmp_path / "a.png")
    source = GroundingSource(builder.finish("set"), root=str(tmp_path), tokenizer=tokenizer)
    dataset = TrainDataset([source], [1], tokenizer, sizes=[40], longest=1000, flip=0.0, seed=0)
    assert "double spaces" in dataset[0, 0].reason and not isinstance(dataset[0, 1], Skipped)


def test_samples_that_cannot_be(tmp_path: Path, words: tk.WordPieces):
    builder = Builder("x")
    builder.add(1, "a.png", "dog " * 70, [((0, 0, 9, 9), 1.0, [(0, 3)])])
    builder.add(2, "absent.png", "a dog", [((0, 0, 9, 9), 1.0, [(2, 5)])])
    builder.add(3, "../a.png", "a dog", [((0, 0, 9, 9), 1.0, [(2, 5)])])
    builder.add(4, "a.png", "a dog", [((70, 0, 90, 9), 1.0, [(2, 5)]), ((5, 5, 20, 20), 1.0, [(0, 1)])])
    picture(tmp_path / "a.png")
    source = GroundingSource(builder.finish("set"), root=str(tmp_path), tokenizer=words)
    dataset = TrainDataset([source], [1], words, sizes=[40], longest=1000, flip=0.0, seed=0)
    reasons = [dataset[0, i] for i in range(3)]
    assert all(isinstance(r, Skipped) for r in reasons)
    assert "has 72 tokens, but the text encoder takes 64" in reasons[0].reason
    assert "no such file" in reasons[1].reason and "out of the image root" in reasons[2].reason
    sample = dataset[0, 3]  # the box outside of the image goes with its phrase, the other stays with its own
    assert sample["truth"].boxes.tolist() == [[5, 5, 19, 19]] and sample["truth"].tokens[0, :3].tolist() == [0, 1, 0]
    batch = Collate(32)([*reasons, sample])
    assert batch["images"].shape == (1, 3, 64, 64) and batch["sizes"] == [(40, 60)] and len(batch["skipped"]) == 3
    assert batch["images"][:, :, 40:].max() == 0
    empty = Collate(32)(reasons)
    assert empty["images"] is None and empty["samples"] == 0


def record(**changes: object) -> dict:
    start = {"image": "a.png", "caption": "a dog near a cat", "bboxes": [[0, 0, 9, 9], [0, 0, 9, 8], [5, 5, 30, 30]],
             "scores": [0.9, 0.8, 0.4], "tokens_positive": [[[2, 5]], [[2, 5]], [[13, 16]]]}  # fmt: skip
    return start | changes


def test_caption_files(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps([record()]))
    records = load_captions(str(tmp_path / "a.json"), key="set")
    assert records.boxes.tolist() == [[0, 0, 9, 9], [0, 0, 9, 8], [5, 5, 30, 30]]
    assert [records.spans_of(i) for i in range(3)] == [[(2, 5)], [(2, 5)], [(13, 16)]]
    confident = load_captions(str(tmp_path / "a.json"), key="set", score=0.5)
    assert len(confident.boxes) == 2
    single = load_captions(str(tmp_path / "a.json"), key="set", overlap=0.6)
    assert single.boxes.tolist() == [[0, 0, 9, 9], [5, 5, 30, 30]]
    nested = record(bboxes=[[[0, 0, 9, 9], [0, 0, 9, 8]], [[5, 5, 30, 30]]], scores=[[0.9, 0.8], [0.4]],
                    tokens_positive=[[2, 5], [13, 16]])  # fmt: skip
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "0.jsonl").write_text(json.dumps(nested) + "\n" + json.dumps(record(tokens_positive=[])) + "\n")
    (shards / "1.jsonl").write_text("[]\n" + json.dumps(record(caption=" ")) + "\n" + json.dumps(record(scores=[1])))
    records = load_captions(str(shards), key="set")
    assert records.boxes.tolist() == [[0, 0, 9, 9], [0, 0, 9, 8], [5, 5, 30, 30]]
    assert records.scores.tolist() == pytest.approx([0.9, 0.8, 0.4])
    assert records.skipped["record that is no object"] == 1
    assert records.skipped["record whose boxes and phrases do not pair up"] == 1
    with pytest.raises(UserError, match="no such file"):
        load_captions(str(tmp_path / "absent.jsonl"), key="set")
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(UserError, match="bad.jsonl: cannot be read"):
        load_captions(str(tmp_path / "bad.jsonl"), key="set")


def test_tsv_sets(tmp_path: Path, words: tk.WordPieces):
    pytest.importorskip("yaml")
    rows = []
    for i in range(3):
        buffer = io.BytesIO()
        Image.fromarray(np.full((40, 60, 3), 50 * (i + 1), np.uint8)).save(buffer, format="PNG")
        rows.append(f"key{i}\t{base64.b64encode(buffer.getvalue()).decode()}\n")
    (tmp_path / "img.tsv").write_text("".join(rows))
    labels = "".join(f"key{i}\t{json.dumps(record(image=None, id=i + 5))}\n" for i in range(3))
    (tmp_path / "label.tsv").write_text(labels)
    offsets = np.cumsum([0, *(len(line) + 1 for line in labels.splitlines()[:-1])])
    (tmp_path / "label.lineidx").write_text("\n".join(map(str, offsets)))
    (tmp_path / "lines.txt").write_text("2\n0\n")
    (tmp_path / "set.yaml").write_text("img: img.tsv\nlabel: label.tsv\nlinelist: lines.txt\n")
    records, pictures = load_tsv(str(tmp_path / "set.yaml"), key="set")
    assert records.ids.tolist() == [7, 5] and records.images[0] == "key2"
    source = GroundingSource(records, root="", tokenizer=words, pictures=pictures)
    dataset = TrainDataset([source], [1], words, sizes=[40], longest=1000, flip=0.0, seed=0)
    assert [int(dataset[0, i]["image"].max()) for i in range(2)] == [150, 50]
    section = SetSection(kind="captions", annotations=str(tmp_path / "set.yaml"))
    assert len(open_set(SetConfig(set=section), words)) == 2
    (tmp_path / "img.tsv").write_text(rows[0] + "key1\tno base 64!\n" + rows[2])
    records, pictures = load_tsv(str(tmp_path / "set.yaml"), key="set")
    with pytest.raises(ValueError, match="holds no base64"):
        pictures.rows["key2"] = 1
        pictures.content("key2")
    (tmp_path / "set.yaml").write_text("img: absent.tsv\nlabel: label.tsv\n")
    with pytest.raises(UserError, match="absent.tsv: no such file"):
        load_tsv(str(tmp_path / "set.yaml"), key="set")


def test_packing(words: tk.WordPieces):
    rng = np.random.default_rng(0)
    numbers = [packing.draw_number(rng) for _ in range(4000)]
    assert abs(np.mean(np.array(numbers) == 20) - 0.3) < 0.03
    assert abs(np.mean(np.array(numbers) == 0) - (0.4 + 0.3 / 20)) < 0.03
    caption, spans = "a dog near a cat", [[(2, 5)], [(2, 5), (13, 16)]]
    places = set()
    for _ in range(30):
        text, moved = packing.pack(caption, spans, lambda: "the  red bus", 20, words, rng)
        assert len(words.encode(text).ids) <= words.limit < len(words.encode(text + ". the red bus").ids)
        assert [[text[b:e] for b, e in group] for group in moved] == [["dog"], ["dog", "cat"]]
        places.add(moved[0][0][0])
    assert len(places) > 3
    assert packing.pack(caption, spans, lambda: "x", 0, words, rng) == (caption, spans)


def test_sides():
    assert all(names_a_side(t) for t in ("the LEFT one", "rightmost dog", "on the right"))
    assert not any(names_a_side(t) for t in ("bright lights", "leftover", "a dog"))


# -- files that name sets ---------------------------------------------------------------------------------------------


def test_set_files(tmp_path: Path, words: tk.WordPieces):
    picture(tmp_path / "pictures" / "1.png")
    (tmp_path / "a.json").write_text(json.dumps(coco([(1, 1, [5, 5, 20, 20])], {1: "x1", 2: "x2"}, images=1)))
    (tmp_path / "set.toml").write_text(
        '[set]\nkind = "detection"\nannotations = "a.json"\nimages = "pictures"\ncopies = 3\nnames = ["dog", "cat"]\n'
    )
    config = GlipConfig(path=str(tmp_path / "config.toml"))
    config.data.train_sets = ["set.toml"]
    (found,) = training_sets(config)
    source = open_set(found, words)
    assert found.set.copies == 3 and source.read(0, np.random.default_rng(0)).text == "dog. cat"
    config.data.train_annotations = str(tmp_path / "a.json")
    with pytest.raises(UserError, match="both data.train_sets and"):
        training_sets(config)
    config.data.train_sets = []
    config.data.train_images = str(tmp_path / "pictures")
    (own,) = training_sets(config)
    assert open_set(own, words).read(0, np.random.default_rng(0)).text == "x1. x2"
    own.set.names = ["dog"]
    with pytest.raises(UserError, match="1 names for 2 classes"):
        open_set(own, words)
    config.data.train_annotations = ""
    with pytest.raises(UserError, match="neither data.train_sets nor"):
        training_sets(config)
    config.data.train_sets = ["absent.toml"]
    with pytest.raises(UserError, match="absent.toml does not exist"):
        training_sets(config)
    (tmp_path / "set.toml").write_text('[set]\nkind = "video"\nannotations = "a.json"\n')
    config.data.train_sets = ["set.toml"]
    with pytest.raises(UserError, match="set.kind is 'video', but must be"):
        training_sets(config)


def test_wild_folders(tmp_path: Path):
    for place in ("Aquarium/Aquarium Combined.coco", "Raccoon"):
        for split in ("train", "valid", "test"):
            folder = tmp_path / place / split
            folder.mkdir(parents=True)
            (folder / "annotations_without_background.json").write_text("{}")
    (tmp_path / "Raccoon" / "test" / "annotations_without_background.json").unlink()
    (tmp_path / "notes").mkdir()
    sets = {s.name: s for s in find_sets(tmp_path)}
    assert set(sets) == {"Aquarium", "Raccoon"} and set(sets["Raccoon"].splits) == {"train", "valid"}
    file, root = sets["Aquarium"].splits["valid"]
    assert file.parent == root and root.name == "valid"
    assert [s.name for s in find_sets(tmp_path, ["Raccoon"])] == ["Raccoon"]
    with pytest.raises(UserError, match="lacks pothole"):
        find_sets(tmp_path, ["Raccoon", "pothole"])
    with pytest.raises(UserError, match="holds no data set"):
        find_sets(tmp_path / "notes")
    with pytest.raises(UserError, match="does not exist"):
        find_sets(tmp_path / "absent")


def test_samples_depend_on_seed_epoch_and_index(tmp_path: Path, words: tk.WordPieces):
    picture(tmp_path / "1.png")
    data = parse(coco([(1, 1, [5, 5, 20, 20])], {1: "dog", 2: "cat", 3: "bus"}, images=1), "x", flag="t", labelled=True)
    texts = ClassTexts(class_prompts([1, 2, 3], data.names), words, negatives=3)
    source = DetectionSource(data, root=str(tmp_path), texts=texts)

    def sample(seed: int, epoch: int) -> tuple:
        dataset = TrainDataset([source], [1], words, sizes=[40, 50, 60], longest=1000, flip=0.5, seed=seed)
        item = dataset[epoch, 0]
        return tuple(item["text"].ids), tuple(item["truth"].boxes[0].tolist())

    assert sample(1, 2) == sample(1, 2)
    assert len({sample(s, e) for s in range(3) for e in range(5)}) > 5


def test_sets_can_be_sent_to_other_processes(tmp_path: Path, words: tk.WordPieces):
    picture(tmp_path / "a.png")
    builder = Builder("x")
    builder.add(1, "a.png", "a dog", [((5, 5, 20, 20), 1.0, [(2, 5)])])
    source = GroundingSource(builder.finish("set"), root=str(tmp_path), tokenizer=words, packing=True)
    dataset = TrainDataset([source], [1], words, sizes=[40], longest=50, flip=0.5, seed=0)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[0, 0]["text"] == dataset[0, 0]["text"]
    assert torch.equal(copy[0, 0]["image"], dataset[0, 0]["image"])
