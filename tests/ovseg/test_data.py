"""Every layout from a miniature of the official folder tree; wrong folders and wrong files in one line each."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ovseg.classes import known_class_lists, read_class_file
from ovseg.data.sets import DATASETS, Unusable, open_dataset
from training.engine.errors import UserError

_spec = importlib.util.spec_from_file_location("trees", Path(__file__).with_name("trees.py"))
trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trees)


@pytest.mark.parametrize("tree", trees.TREES, ids=lambda tree: tree.__name__)
def test_official_trees(tree, tmp_path):
    if tree is trees.context_as_downloaded:
        pytest.importorskip("scipy")
    for name, (count, labels) in tree(tmp_path).items():
        data = open_dataset(name, tmp_path)
        assert len(data) == count
        for item in map(data.__getitem__, range(count)):
            assert item["image"].shape == (3, trees.HEIGHT, trees.WIDTH) and item["image"].dtype == torch.uint8
            assert item["labels"].dtype == torch.uint8
            assert item["labels"].numpy().tolist() == trees.stripes(*labels).tolist()
        assert max(label for label in labels if label != 255) < len(data.classes)


def test_every_data_set_has_a_tree(tmp_path):
    drawn = set()
    for tree in trees.TREES:
        if tree is not trees.context_as_downloaded:
            (tmp_path / tree.__name__).mkdir()
            drawn |= set(tree(tmp_path / tree.__name__))
    assert drawn == set(DATASETS)


def test_root_may_be_the_data_sets_own_folder(tmp_path):
    trees.voc(tmp_path)
    for root in (tmp_path, tmp_path / "VOCdevkit", tmp_path / "VOCdevkit" / "VOC2012"):
        assert len(open_dataset("voc21", root, "train")) == 1


def test_trainaug_of_converted_labels(tmp_path):
    """VOC's images have VOC's labels: SegmentationClassAug need not hold them, and SBD's are others where it does."""
    trees.voc(tmp_path)
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    lists = folder / "ImageSets" / "Segmentation"
    trees.write_list(lists / "trainaug.txt", "2008_000001", "2007_000042")
    trees.write_list(lists / "aug.txt", "2008_000001")
    trees.write_image(folder / "JPEGImages" / "2008_000001.jpg")
    trees.write_values(folder / "SegmentationClassAug" / "2008_000001.png", trees.stripes(0, 5, 5, 20))
    data = open_dataset("voc21", tmp_path, "trainaug")
    assert [Path(data.files(i)[1]).parent.name for i in range(2)] == ["SegmentationClassAug", "SegmentationClass"]
    assert data[0]["labels"].numpy().tolist() == trees.stripes(0, 5, 5, 20).tolist()
    assert data[1]["labels"].numpy().tolist() == trees.stripes(0, 1, 20, 255).tolist()
    alone = open_dataset("voc21", tmp_path, "aug")
    assert len(alone) == 1 and alone.files(0) == data.files(0)


def test_trainaug_from_sbd_as_downloaded(tmp_path):
    """VOC's train, and SBD's images that are in neither train nor val."""
    savemat = pytest.importorskip("scipy.io").savemat
    trees.voc(tmp_path)
    sbd = tmp_path / "benchmark_RELEASE" / "dataset"
    (sbd / "cls").mkdir(parents=True)
    trees.write_list(sbd / "train.txt", "2007_000033", "2008_000001")  # the first is one of VOC's val
    trees.write_list(sbd / "val.txt", "2007_000042")
    savemat(sbd / "cls" / "2008_000001.mat", {"GTcls": {"Segmentation": trees.stripes(0, 5, 5, 20).astype(np.uint8)}})
    trees.write_image(tmp_path / "VOCdevkit" / "VOC2012" / "JPEGImages" / "2008_000001.jpg")
    data = open_dataset("voc21", tmp_path, "trainaug")
    assert [Path(data.files(i)[1]).name for i in range(len(data))] == ["2007_000042.png", "2008_000001.mat"]
    assert data[1]["labels"].numpy().tolist() == trees.stripes(0, 5, 5, 20).tolist()
    alone = open_dataset("voc21", tmp_path, "aug")
    assert len(alone) == 1 and alone.files(0) == data.files(1)


@pytest.mark.parametrize("name", [n for n in DATASETS if n != "panoptic"])
def test_wrong_folders_are_one_line(name, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_dataset(name, tmp_path / "missing")
    with pytest.raises(UserError) as error:
        open_dataset(name, tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_wrong_files_are_one_line(tmp_path):
    trees.voc(tmp_path)
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    with pytest.raises(UserError, match="no such list; the split is called test"):
        open_dataset("voc21", tmp_path, "test")
    with pytest.raises(UserError, match='no data set is called "voc"'):
        open_dataset("voc", tmp_path)
    data = open_dataset("voc21", tmp_path)
    label = folder / "SegmentationClass" / "2007_000033.png"

    trees.write_values(label, trees.stripes(0, 21, 1, 2))
    assert data[0] == Unusable(str(label), data[0].reason, fatal=True) and "value 21" in data[0].reason
    Image.fromarray(np.zeros((trees.HEIGHT, trees.WIDTH, 3), np.uint8)).save(label)
    assert "mode RGB" in data[0].reason and not data[0].fatal
    trees.write_values(label, trees.stripes(0, 1, 1, 2)[:-1])
    assert "36 x 23" in data[0].reason
    label.write_bytes(b"no picture")
    assert "not a readable PNG" in data[0].reason
    label.unlink()
    assert "no such file" in data[0].reason
    (folder / "SegmentationClass" / "2007_000042.png").unlink()
    with pytest.raises(UserError, match="none of the label files"):
        open_dataset("voc21", tmp_path)


def test_wrong_panoptic_files(tmp_path):
    trees.panoptic(tmp_path)
    file = tmp_path / "annotations" / "panoptic_val2017.json"
    content = json.loads(file.read_text())
    with pytest.raises(UserError, match="neither .*panoptic_train.json"):
        open_dataset("panoptic", tmp_path, "train")
    content["annotations"][0]["segments_info"].pop()
    file.write_text(json.dumps(content))
    item = open_dataset("panoptic", tmp_path)[0]
    assert item.fatal and "segment 9" in item.reason
    content["annotations"][0]["segments_info"][0]["category_id"] = 3
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no key 3"):
        open_dataset("panoptic", file)
    content["annotations"][0]["file_name"] = "../../../etc/passwd"
    content["annotations"][0]["segments_info"][0]["category_id"] = 1
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="leads out"):
        open_dataset("panoptic", file)


@pytest.mark.parametrize("name", known_class_lists())
def test_class_lists_are_whole(name):
    content = read_class_file(name)
    count = len(content["names"])
    assert len(content["palette"]) == count and set(content["label_map"].values()) <= {*range(count), 255}
    assert set(range(count)) - {0} <= set(content["label_map"].values())
    for words in content["prompts"].values():
        assert set(words) <= set(content["names"]) and all(w == w.strip() for ws in words.values() for w in ws)
    assert len(content.get("raw_ids", range(count))) == count
    assert all(0 < unseen < count for unseen in content.get("unseen", ()))
