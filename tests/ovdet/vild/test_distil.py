"""Samples: distilled boxes go with the image, their targets stay, and what cannot be distilled is left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ovdet.data.loader import collate_train
from ovdet.data.transforms import View
from ovdet.vild.dataset import Distilled
from ovdet.vild.proposals import ProposalList, ProposalWriter
from ovdet.vild.run import make_dataset
from ovdet.vild.task import dataset_factors
from ovdet.vocabulary import make_vocabulary
from training.engine.data.annotations import load_annotations
from training.engine.data.store import TeacherStore

WHOLE, ORIGINAL = View((40, 60), 0, 0, (40, 60), False), (40, 60)


@pytest.fixture
def distilled(tmp_path: Path) -> Distilled:
    """Three images of 40 x 60 pixels: two boxes (one on the left, one a line at the right), none, and one."""
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 60, "height": 40} for i in (3, 5, 9)],
        "annotations": [], "categories": [{"id": 1, "name": "a"}],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(content))
    annotations = load_annotations(str(tmp_path / "a.json"))
    writer = ProposalWriter(tmp_path / "list", annotations, {})
    writer.create()
    boxes = [np.array([[6.0, 10, 26, 30], [57, 0, 60, 40]]), np.zeros((0, 4)), np.array([[0.0, 0, 60, 40]])]
    writer.write(0, [(b, np.linspace(0.9, 0.5, len(b))) for b in boxes])
    proposals = writer.finish()
    store = TeacherStore(tmp_path / "store", proposals.offsets, 4, {}, shard_images=2)
    store.create()
    store.write(0, np.array([[1, 0, 0, 0], [0, 1, 0, 0]], np.float16))
    store.write(1, np.array([[0, 0, 1, 0]], np.float16))
    return Distilled(proposals, store, proposals.rows_of(annotations))


def test_one_flip_moves_boxes_and_targets_stay(distilled):
    plain = distilled.of(0, WHOLE, ORIGINAL)
    assert plain["distil_boxes"].tolist() == [[6, 10, 26, 30], [57, 0, 60, 40]]
    mirrored = distilled.of(0, View((40, 60), 0, 0, (40, 60), True), ORIGINAL)
    assert mirrored["distil_boxes"].tolist() == [[34, 10, 54, 30], [0, 0, 3, 40]]
    assert torch.equal(plain["distil_targets"], mirrored["distil_targets"])


def test_scaled_and_cut_boxes(distilled):
    # Twice as large, window of 50 x 50 from (10, 20) on: the box becomes (12, 20, 52, 60) - (20, 10), cut at the left.
    cut = View((80, 120), 10, 20, (50, 50), False)
    assert distilled.of(0, cut, ORIGINAL)["distil_boxes"].tolist() == [[0, 10, 32, 50]]  # 1280 of 1600 pixels
    distilled.min_share = 0.9
    assert len(distilled.of(0, cut, ORIGINAL)["distil_boxes"]) == 0
    small = View((8, 12), 0, 0, (8, 12), False)  # the line at the right is 0.6 pixels wide
    distilled.min_share = 0.0
    assert len(distilled.of(0, small, ORIGINAL)["distil_boxes"]) == 1
    distilled.min_side = 0.5
    assert len(distilled.of(0, small, ORIGINAL)["distil_boxes"]) == 2


def test_images_without_proposals_and_rows_of_nan(distilled):
    nothing = distilled.of(1, WHOLE, ORIGINAL)
    assert nothing["distil_boxes"].shape == (0, 4) and nothing["distil_targets"].shape == (0, 4)
    assert len(distilled.of(2, WHOLE, ORIGINAL)["distil_boxes"]) == 1
    distilled.store.write(1, np.full((1, 4), np.nan, np.float16))
    distilled.store._maps.clear()
    assert len(distilled.of(2, WHOLE, ORIGINAL)["distil_boxes"]) == 0
    distilled.most = 1
    assert len(distilled.of(0, WHOLE, ORIGINAL)["distil_boxes"]) == 1


def test_lists_open_again_and_know_their_bytes(distilled, tmp_path):
    again = ProposalList.open(tmp_path / "list")
    assert again.hash == distilled.proposals.hash and again.is_undamaged()
    assert list(again.names) == ["3.png", "5.png", "9.png"] and again.offsets.tolist() == [0, 2, 2, 3]
    assert isinstance(again.boxes, np.memmap)
    boxes = np.load(tmp_path / "list" / "boxes.npy")
    boxes[0, 0] += 1
    np.save(tmp_path / "list" / "boxes.npy", boxes)
    assert not ProposalList.open(tmp_path / "list").is_undamaged()


def test_the_picture_in_a_distilled_box_is_that_of_the_crop(scenes, tmp_path):
    """A bright rectangle is proposed; wherever training's random views put it, the box is on it."""
    annotations = load_annotations(scenes.config().data.train_annotations)
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    boxes = []
    for name in annotations.file_names:
        x, y = rng.integers(0, 60, 2)
        picture = np.zeros((96, 96, 3), np.uint8)
        picture[y : y + 30, x : x + 24] = 255
        Image.fromarray(picture).save(folder / name, quality=95)
        boxes.append(np.array([[x, y, x + 24, y + 30]], np.float64))
    writer = ProposalWriter(tmp_path / "list", annotations, {})
    writer.create()
    writer.write(0, [(b, np.ones(1)) for b in boxes])
    proposals = writer.finish()
    store = TeacherStore(tmp_path / "store", proposals.offsets, 4, {}, shard_images=100)
    store.create()
    store.write(0, np.ones(store.shape(0), np.float16))
    config = scenes.config(
        "model.variant=text", "model.masks=false", "data.jitter=[0.5, 2.0]", f"data.train_images={folder}"
    )
    vocabulary = make_vocabulary(config, load_annotations(config.data.val_annotations))
    dataset = make_dataset(config, annotations, vocabulary, None)
    dataset.distilled = Distilled(proposals, store, proposals.rows_of(annotations), min_share=0.9)
    seen = 0
    for key in [(epoch, index) for epoch in range(6) for index in range(len(dataset))]:
        sample = dataset[key]
        whole = sample["image"].float()
        for x1, y1, x2, y2 in sample["distil_boxes"].round().int().tolist():
            assert whole[:, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].mean() > 240
            assert whole.sum() - whole[:, max(y1 - 2, 0) : y2 + 2, max(x1 - 2, 0) : x2 + 2].sum() < 0.02 * whole.sum()
            seen += 1
    assert seen > 20
    batch = collate_train([dataset[(0, i)] for i in range(3)])
    assert set(batch["targets"][0]) == {"boxes", "labels", "distil_boxes", "distil_targets"}


def test_images_without_base_objects_are_kept_and_rare_classes_repeated(scenes):
    config = scenes.config("model.variant=text", "model.masks=false")
    annotations = load_annotations(config.data.train_annotations)
    vocabulary = make_vocabulary(config, load_annotations(config.data.val_annotations))
    kept = make_dataset(config, annotations, vocabulary, None)
    config.data.keep_empty = False
    assert len(kept) == len(annotations) > len(make_dataset(config, annotations, vocabulary, None))
    names = np.array(annotations.names)
    classes = [set(names[annotations.labels[annotations.of(row)]]) - set(scenes.novel) for row in kept.images]
    for place, factor in enumerate(dataset_factors(kept, 1.0)):
        shares = [np.mean([name in own for own in classes]) for name in classes[place]]
        assert factor == pytest.approx(max([1.0, *(np.sqrt(1 / share) for share in shares)]))
    config.data.train_novel = True
    assert (make_dataset(config, annotations, vocabulary, None).labels >= 0).all()
    config.data.single_class = True
    assert set(make_dataset(config, annotations, vocabulary, None).labels.tolist()) == {0}
