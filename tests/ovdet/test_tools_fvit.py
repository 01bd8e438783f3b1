"""Preparation of open-vocabulary files, proposals and region-text pairs, and detection of a free vocabulary."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from ovdet.config import config_to_dict
from ovdet.data.annotations import load_annotations
from ovdet.errors import UserError
from ovdet.files import detector_content, save
from ovdet.fvit.assemble import load_vit, make_detector, read_config
from ovdet.visualize import draw_detections
from ovdet.vocabulary import make_vocabulary
from training.scenes.generate import SceneOptions, write_dataset

FVIT = Path(__file__).resolve().parents[2] / "F-ViT"


def program(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"fvit_program_{Path(path).stem}", FVIT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    return program("tools/prepare_open_vocabulary.py")


# -- prepare_open_vocabulary ------------------------------------------------------------------------------------------


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
    assert a.boxes.tolist() == [[47, 239, 195, 371]] * 2 and a.crowd.tolist() == [False, True]
    assert [a.names[i] for i in a.labels] == ["tv monitor", "dog"] and len(a.names) == 20
    (tmp_path / "Annotations" / "000001.xml").write_text(xml.format(item.format("unicorn", 0)))
    with pytest.raises(UserError, match="000001.xml"):
        prepare.main(["voc", "--root", str(tmp_path), "--out", str(tmp_path / "out.json")])


# -- make_proposals and detect ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(scenes, config, an untrained detector with masks)."""
    folder = tmp_path_factory.mktemp("detector")
    write_dataset(folder / "data", train=3, val=3, options=SceneOptions(size=96, things=4))
    config_file = folder / "tiny.toml"
    config_file.write_text(
        """
        [model]
        name = "ViT-Ti-8-64"
        pretrained = ""
        cache_dir = ""
        blocks = [1, 2, 3]
        channels = 16
        box_convs = 1
        box_width = 32
        mask_convs = 1
        rpn_post_nms = 40
        masks = true
        [data]
        image_size = 96
        workers = 0
        embeddings = "unused.npy"
        [train]
        precision = "fp32"
        """
    )
    config = read_config(str(config_file), ['data.embeddings=""'])
    annotations = load_annotations(str(folder / "data" / "annotations" / "instances_val2017.json"), key="k")
    vocabulary = make_vocabulary(config, annotations)
    vit = load_vit(config)
    np.save(folder / "e.npy", np.random.default_rng(0).normal(size=(5, 128)))
    config.data.embeddings = str(folder / "e.npy")
    detector = make_detector(config, vit, vocabulary, device=torch.device("cpu"))
    content = detector_content(
        detector, vit=vit.identity, config=config_to_dict(config), base=list(vocabulary.names), novel=[]
    )
    save(content, folder / "detector.pt")
    return folder / "data", config_file, folder / "detector.pt"


def test_make_proposals(detector_file: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # of the cache of embeddings
    data, config, checkpoint = detector_file
    nouns = tmp_path / "nouns.txt"
    nouns.write_text("red circle\nblue square\n\nsky\nred circle\n")
    source = data / "annotations" / "instances_val2017.json"
    tool = program("tools/make_proposals.py")
    tool.main(
        [str(config), str(checkpoint), "--images", str(source), "--image-root", str(data / "val2017"), "--out",
         str(tmp_path), "--name", "mine", "--most", "15", "--nouns", str(nouns), "--pairs", "5", "--device", "cpu"]
    )  # fmt: skip
    proposals = load_annotations(str(tmp_path / "mine_proposals.json"), key="k")
    original = load_annotations(str(source), key="k")
    assert proposals.image_ids.tolist() == original.image_ids.tolist() and not proposals.skipped
    assert proposals.file_names == original.file_names and np.diff(proposals.offsets).max() <= 15
    height, width = original.sizes.max(0)
    assert proposals.boxes.min() >= 0 and proposals.boxes[:, 0::2].max() <= width + 0.02
    assert len(np.unique(proposals.boxes, axis=0)) > 10

    pairs = json.loads((tmp_path / "mine_pseudo_3.json").read_text())
    embeddings = np.load(tmp_path / "mine_pseudo_3_embeddings.npy")
    assert [c["name"] for c in pairs["categories"]] == ["red circle", "blue square", "sky"]
    assert embeddings.shape == (3, 128) and np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    for image in pairs["images"]:
        scores = [a["score"] for a in pairs["annotations"] if a["image_id"] == image["id"]]
        assert len(scores) <= 5 and scores == sorted(scores, reverse=True)

    # The same from a folder; the nouns of some boxes by hand.
    tool.main(
        [str(config), str(checkpoint), "--images", str(data / "val2017"), "--out", str(tmp_path / "folder"),
         "--most", "15", "--device", "cpu"]
    )  # fmt: skip
    again = load_annotations(str(tmp_path / "folder" / "coco_proposals.json"), key="k")
    assert np.array_equal(again.boxes, proposals.boxes)
    with pytest.raises(UserError, match="holds no image"):
        tool.list_images(tmp_path / "folder", "")
    with pytest.raises(UserError, match="empty"):
        (tmp_path / "empty.txt").touch()
        tool.read_nouns(tmp_path / "empty.txt")


def test_nouns_of_boxes():
    """Each box gets the noun nearest to CLIP's embedding of its crop."""
    tool = program("tools/make_proposals.py")
    grown = tool.enlarge(np.array([[10.0, 20, 30, 60], [0, 0, 10, 10]]), 1.5, 64, 64)
    assert grown.tolist() == [[5, 10, 35, 64], [0, 0, 12.5, 12.5]]
    image = {"boxes": np.arange(12).reshape(3, 4), "nouns": np.array([4, 5, 6]), "cosine": np.array([0.1, 0.9, 0.5])}
    best = tool.best_pairs(image, 2, 0.2)
    assert best["nouns"].tolist() == [5, 6] and best["scores"].tolist() == [0.9, 0.5]
    assert tool.best_pairs(image, 20, 0.95)["boxes"].shape == (0, 4)


def test_detect_free_vocabulary(
    detector_file: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("HOME", str(tmp_path))
    data, _, checkpoint = detector_file
    tool = program("detect.py")
    images = [str(p) for p in sorted((data / "val2017").iterdir())[:2]]
    tool.main(
        [*images, str(tmp_path / "none.jpg"), "--checkpoint", str(checkpoint), "--classes", "red circle, sky",
         "--score", "0.0", "--out", str(tmp_path / "out"), "--device", "cpu", "--set", "test.per_image=5"]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.count("->") == 2 and ("red circle" in printed or "sky" in printed)
    drawn = np.asarray(Image.open(tmp_path / "out" / (Path(images[0]).stem + ".png")))
    plain = np.asarray(Image.open(images[0]).convert("RGB"))
    assert drawn.shape == plain.shape and (drawn != plain).any()
    with pytest.raises(UserError, match="named twice"):
        tool.read_names("cat, dog,cat")
    with pytest.raises(UserError, match="give names"):
        tool.read_names(" , ")


def test_drawing():
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 20, 50, 50], [70, 5, 70.2, 5.1]])
    masks = torch.zeros(2, 60, 80, dtype=torch.bool)
    masks[0, 30:40, 20:40] = True
    drawn = draw_detections(image, boxes, [0, 1], [0.9, 0.4], ["a", "b"], masks)
    assert drawn.shape == image.shape and drawn[:, 50, 30].any() and drawn[:, 35, 30].any()
    assert not drawn[:, 45, 30].any()
    assert torch.equal(draw_detections(image, boxes[:0], [], [], ["a"]), image)
