"""Preparation of open-vocabulary files from official ones, sound and faulty."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from ovdet.commands import prepare_open_vocabulary
from ovdet.data.annotations import load_annotations
from training.engine.errors import UserError


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    return prepare_open_vocabulary


def official(prepare: ModuleType) -> dict:
    """A file with the 65 classes and two unused ones; image i holds class i and, if i is odd, class 0."""
    split = prepare.read_split(prepare.OV_COCO)
    names = [*split["base"], *split["novel"], "stop sign", "hot dog"]
    annotations = [{"id": 1000 + i, "image_id": i, "category_id": 3 * i + 1, "bbox": [0, 0, 5, 5]} for i in range(67)]
    annotations += [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 3, 3]} for i in range(1, 67, 2)]
    return {
        "info": {"year": 2017},
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(70)],
        "annotations": annotations,
        "categories": [{"id": 3 * i + 1, "name": name} for i, name in enumerate(names)],
    }


def test_open_vocabulary_coco(tmp_path: Path, prepare: ModuleType, capsys: pytest.CaptureFixture):
    file = tmp_path / "instances_train2017.json"
    file.write_text(json.dumps(official(prepare)))
    prepare.main(["coco", "--train", str(file), "--val", str(file), "--out", str(tmp_path / "out")])
    stem = tmp_path / "out" / "instances_train2017"
    base, both = (json.loads(Path(f"{stem}_{suffix}.json").read_text()) for suffix in ("base", "ov65"))
    assert len(base["categories"]) == 48 and len(both["categories"]) == 65
    novel = {c["id"] for c in both["categories"]} - {c["id"] for c in base["categories"]}
    assert len(novel) == 17 and not novel & {a["category_id"] for a in base["annotations"]}
    # 48 images of base classes, and the odd ones among the others, which hold class 0 as well.
    assert {i["id"] for i in base["images"]} == set(range(48)) | set(range(49, 67, 2))
    assert {i["id"] for i in both["images"]} == set(range(65)) | {65}
    prepare.main(["coco", "--train", str(file), "--out", str(tmp_path / "whole"), "--all-images"])
    whole = json.loads((tmp_path / "whole" / "instances_train2017_base.json").read_text())
    assert len(whole["images"]) == 70 and whole["annotations"] == base["annotations"]
    assert base["info"] == {"year": 2017} and "48 classes" in capsys.readouterr().out
    names = json.loads(prepare.OV_COCO.read_text())
    assert names["base"][:2] == ["person", "bicycle"] and {"airplane", "umbrella"} <= set(names["novel"])


def test_lvis_without_rare_and_faulty_input(tmp_path: Path, prepare: ModuleType):
    content = official(prepare)
    for i, category in enumerate(content["categories"]):
        category["frequency"] = "rcf"[i % 3]
    file = tmp_path / "lvis_v1_train.json"
    file.write_text(json.dumps(content))
    prepare.main(["lvis", "--train", str(file)])
    kept = json.loads((tmp_path / "lvis_v1_train_norare.json").read_text())
    assert {c["frequency"] for c in kept["categories"]} == {"c", "f"}
    assert {a["category_id"] for a in kept["annotations"]} == {c["id"] for c in kept["categories"]}
    content["categories"] = content["categories"][:40]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="has no category"):
        prepare.main(["coco", "--train", str(file)])
    (tmp_path / "split.json").write_text('{"base": ["a"], "novel": ["a"]}')
    for split, message in (("split.json", "listed twice"), ("lvis_v1_train.json", "not a json with lists")):
        with pytest.raises(UserError, match=message):
            prepare.main(["coco", "--train", str(file), "--split", str(tmp_path / split)])


def test_voc(tmp_path: Path, prepare: ModuleType):
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("000001\n")
    (tmp_path / "Annotations").mkdir()
    xml = """<annotation><size><width>353</width><height>500</height></size>{}</annotation>"""
    item = "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>48</xmin><ymin>240</ymin><xmax>195</xmax>"
    item += "<ymax>371</ymax></bndbox></object>"
    (tmp_path / "Annotations" / "000001.xml").write_text(
        xml.format(item.format("tvmonitor", 0) + item.format("dog", 1))
    )
    prepare.main(["voc", "--root", str(tmp_path), "--out", str(tmp_path / "out.json")])
    a = load_annotations(str(tmp_path / "out.json"), key="k")
    assert a.boxes.tolist() == [[47, 239, 195, 371]] * 2 and a.crowd.tolist() == [False, False]
    written = json.loads((tmp_path / "out.json").read_text())["annotations"]
    assert [entry["difficult"] for entry in written] == [0, 1]
    assert [a.names[i] for i in a.labels] == ["tv monitor", "dog"] and len(a.names) == 20
    prepare.main(["voc", "--root", str(tmp_path), "--out", str(tmp_path / "first.json"), "--first", "12"])
    first = json.loads((tmp_path / "first.json").read_text())
    assert len(first["categories"]) == 12 and [a["category_id"] for a in first["annotations"]] == [12]
    (tmp_path / "Annotations" / "000001.xml").write_text(xml.format(item.format("unicorn", 0)))
    with pytest.raises(UserError, match="000001.xml"):
        prepare.main(["voc", "--root", str(tmp_path), "--out", str(tmp_path / "out.json")])


def test_faulty_official_files(tmp_path: Path, prepare: ModuleType, caplog: pytest.LogCaptureFixture):
    file = tmp_path / "a.json"
    split = tmp_path / "split.json"
    split.write_text('{"base": ["cat"], "novel": ["dog"]}')
    sound = {
        "images": [{"id": 1, "file_name": "1.jpg"}, {"id": [2], "file_name": "2.jpg"}],
        "annotations": [
            {"image_id": 1, "category_id": 1}, {"image_id": [1], "category_id": 1}, {"image_id": 1, "category_id": [1]},
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }  # fmt: skip
    command = ["coco", "--train", str(file), "--split", str(split)]
    file.write_text(json.dumps(sound))
    prepare.main(command)
    kept = json.loads((tmp_path / "a_base.json").read_text())
    assert len(kept["images"]) == len(kept["annotations"]) == 1
    assert "1 of its 2 images are left out" in caplog.text and "2 of its 3 annotations" in caplog.text
    for change, message in [
        ({"categories": [{"id": [1], "name": "cat"}]}, "no number as id"),
        ({"categories": [{"id": 1, "name": ["cat"]}]}, "no text as name"),
        ({"annotations": []}, "no image of it has an object"),
    ]:
        file.write_text(json.dumps({**sound, **change}))
        with pytest.raises(UserError, match=message):
            prepare.main(command)
    for base in ('"cat"', "[1]", "null"):
        split.write_text(f'{{"base": {base}, "novel": []}}')
        with pytest.raises(UserError, match='"base" is .*; give a list of names'):
            prepare.main(command)


def test_faulty_voc(tmp_path: Path, prepare: ModuleType, caplog: pytest.LogCaptureFixture):
    listing = tmp_path / "ImageSets" / "Main" / "test.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("a b a")
    (tmp_path / "Annotations").mkdir()
    item = "<object><name>dog</name><bndbox><xmin>{}</xmin><ymin>0</ymin><xmax>{}</xmax><ymax>9</ymax></bndbox>"
    item += "</object>"
    boxes = "".join(item.format(*x) for x in ((0, 5), (-4, 5), ("nan", 5), (7, 5), (1, 1)))
    for name, side in (("a", 9), ("b", 0)):
        size = f"<size><width>{side}</width><height>9</height></size>"
        (tmp_path / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{boxes}</annotation>")
    command = ["voc", "--root", str(tmp_path), "--out", str(tmp_path / "out.json")]
    prepare.main(command)
    written = json.loads((tmp_path / "out.json").read_text())
    assert [i["file_name"] for i in written["images"]] == ["a.jpg"]
    assert [a["bbox"] for a in written["annotations"]] == [[0, 0, 5, 9], [0, 0, 1, 9]]
    for reason in ("3 objects whose box", "1 images of size 0", "1 images that are listed again"):
        assert reason in caplog.text
    for content, message in ((b"b", "no image of it"), (b"\xff\xfe", "not readable as UTF-8")):
        listing.write_bytes(content)
        with pytest.raises(UserError, match=message):
            prepare.main(command)
