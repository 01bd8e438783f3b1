"""Malformed annotation files: the bad part is left out and counted, or one line says why nothing is left."""

from __future__ import annotations

import copy
import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from training.data import DataOptions, RegionOptions, View, build_train_data, prepare_batch
from training.engine.data.images import ImageError
from training.engine.data.masks import read_segment_ids
from training.engine.errors import UserError
from training.evaluation.options import EvalOptions
from training.evaluation.panoptic import build_eval_data

KINDS = ("grid_distill", "proposals_distill", "region_clip", "contrastive")
FILES = [25, pytest.param(220, marks=pytest.mark.slow)]  # of each kind
FUZZ = dict(
    deadline=None, database=None, print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
junk = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
        st.sampled_from([-1, 0, 2**31, 2**63, 10**400, 1e300, float("nan"), float("inf"), 101, "5.png", "../x.png"]),
        st.sampled_from(["/etc/passwd", "\ud800", [], [1, 2, 3], [5, 5, -3, 4], [0, 0, 1e9, 1], [float("nan")] * 4]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
ENCODINGS = ("utf-8", "utf-8-sig", "latin-1", "utf-16", "cp037")


def encode(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class Sound:
    """Folder with ``images/`` and ``panoptic/`` of 6 pictures, an instance file's content, and a panoptic file's."""

    def __init__(self, folder: Path, instances: dict, panoptic: dict) -> None:
        self.folder, self.instances, self.panoptic = folder, instances, panoptic


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Sound:
    folder = tmp_path_factory.mktemp("sound")
    (folder / "images").mkdir()
    (folder / "panoptic").mkdir()
    images, boxes, segments = [], [], []
    for i in range(6):
        width, height = 30 + 3 * i, 40 - 2 * i
        picture(width, height, i).save(folder / "images" / f"{i}.png")
        ids = np.ones((height, width, 3), np.uint8) * [1, 0, 0]
        ids[5:25, 4:20] = [2, 0, 0]
        Image.fromarray(ids.astype(np.uint8)).save(folder / "panoptic" / f"{i}.png")
        images.append({"id": 100 + i, "file_name": f"{i}.png", "width": width, "height": height})
        boxes += [{"id": 10 * i + k, "image_id": 100 + i, "category_id": 1 + k, "bbox": [2 + k, 3, 15, 12 + k],
                   "area": 180, "caption": f"number {k}", "iscrowd": 0,
                   "segmentation": [[4, 5, 15, 5, 15, 14, 4, 14]] if k else
                   {"size": [height, width], "counts": [5 * height, 8 * height, (width - 13) * height]}}
                  for k in range(2)]  # fmt: skip
        infos = [{"id": 1, "category_id": 2, "bbox": [0, 0, width, height]},
                 {"id": 2, "category_id": 1, "bbox": [4, 5, 16, 20]}]  # fmt: skip
        segments.append({"image_id": 100 + i, "file_name": f"{i}.png", "segments_info": infos})
    categories = [{"id": 1, "name": "dog", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}]
    instances = {"images": images, "annotations": boxes, "categories": categories}
    return Sound(folder, instances, {"images": images, "annotations": segments, "categories": categories})


def damaged(draw, content: dict) -> bytes:
    """A copy with one to six values replaced, removed or repeated, in some encoding, sometimes with altered bytes."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3, 6)))):  # most files are not refused as a whole
        target = content
        while True:  # down to a random place
            keys = list(target) if isinstance(target, dict) else list(range(len(target)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(target[key], (dict, list)) and draw(st.integers(0, 3)):
                target = target[key]
                continue
            what = draw(st.sampled_from(("replace", "remove", "repeat")))
            if what == "replace":
                target[key] = copy.deepcopy(draw(junk))  # the next round may change it in place
            elif what == "remove":
                del target[key]
            elif isinstance(target, list):
                target.append(target[key])
            break
    raw = json.dumps(content, ensure_ascii=draw(st.booleans()))
    data = raw.encode(draw(st.sampled_from(ENCODINGS)) if draw(st.integers(0, 9)) == 0 else "utf-8", "replace")
    if draw(st.integers(0, 9)) == 0:
        data = data[: draw(st.integers(0, len(data)))]
    return data


def train_data(folder: Path, file: Path, kind: str, **more):
    data = DataOptions(
        dataset_type=kind, train_data=str(file), train_image_root=str(folder / "images"), batch_size=2, workers=0
    )
    regions = RegionOptions(max_boxes=5, max_split=3, min_size=2)
    fields = {"region_clip": ("labels",), "contrastive": ()}.get(kind, ("crops",))
    return build_train_data(data, regions, image_size=32, crop_size=16, fields=fields, **more)


def check_batch(batch: dict) -> None:
    """What a method relies on."""
    pixels = ((0.5,) * 3, (0.5,) * 3)
    views = {"images": View("images", 32, *pixels), "crops": View("crops", 16, *pixels)}
    ready = prepare_batch(batch, views, torch.device("cpu"))
    assert torch.isfinite(ready["images"]).all() and ready["images"].shape[1:] == (3, 32, 32)
    assert batch["samples"] + len(batch["skipped"]) in (1, 2) and len(batch["image_ids"]) == batch["samples"]
    if "boxes" in batch:
        assert len(ready["boxes"]) == len(ready["images"])
        boxes = torch.cat(ready["boxes"])
        assert torch.isfinite(boxes).all() and (boxes[:, 2:] >= boxes[:, :2]).all()
        for name in ("crops", "labels"):
            assert name not in batch or len(batch[name]) == len(boxes)
        assert "labels" not in batch or (batch["labels"] >= 0).all()


def read_for_distillation(program, sound, file: Path, draw) -> bool:
    """Whether anything can be trained on; UserError for a refused file."""
    kind = draw(st.sampled_from(KINDS))
    tokenize = lambda texts: torch.tensor([[len(t) for t in texts[0].split()][:4] + [0] * 4])[:, :4]  # noqa: E731
    loaded = train_data(sound.folder, file, kind, tokenize=tokenize)
    seen = usable = 0
    for batch in loaded.loader:
        check_batch(batch)
        seen += batch["samples"] + len(batch["skipped"])
        usable += batch["samples"]
        assert all(reason and "\n" not in reason for _, reason in batch["skipped"])
        if kind == "region_clip" and "labels" in batch:
            assert (batch["labels"] < len(loaded.class_names)).all()
    assert seen >= min(loaded.num_images, 2) and all(number > 0 for number in loaded.skipped.values())
    return usable > 0


def read_for_fvit(program, sound, file: Path, draw) -> bool:
    """The same of the detector, with masks."""
    from ovdet.data.annotations import load_annotations
    from ovdet.data.dataset import Skipped, TrainDataset, ViewOptions
    from ovdet.data.loader import collate_train, targets_to
    from ovdet.fvit.config import FViTConfig
    from ovdet.vocabulary import make_vocabulary, training_labels

    annotations = load_annotations(str(file), key="data.train_annotations", masks=True)
    labels = training_labels(annotations, make_vocabulary(FViTConfig(), annotations))
    data = TrainDataset(
        annotations, labels=labels, root=str(sound.folder / "images"), options=ViewOptions(image_size=64), masks=True,
        min_image_side=draw(st.sampled_from((0, 8))), min_object_side=draw(st.sampled_from((0.0, 1.0))),
        keep_empty=draw(st.booleans()),
    )  # fmt: skip
    samples = [data[(0, i)] for i in range(len(data))]
    assert all(s.reason and "\n" not in s.reason for s in samples if isinstance(s, Skipped))
    batch = collate_train(samples)
    for target in targets_to(batch["targets"], 64, torch.device("cpu")):
        assert target["boxes"].isfinite().all() and len(target["masks"]) == len(target["boxes"])
        assert ((target["labels"] >= 0) & (target["labels"] < len(annotations.names))).all()
        assert target["masks"].flatten(1).any(1).all()
    return any(not isinstance(s, Skipped) for s in samples)


def read_for_glip(program, sound, file: Path, draw) -> bool:
    """The same of GLIP."""
    from ovdet.data.dataset import Skipped
    from ovdet.glip.assemble import read_config
    from ovdet.glip.build import make_tokenizer
    from ovdet.glip.data.dataset import Collate, TrainDataset
    from ovdet.glip.data.sets import open_set, training_sets

    overrides = [f"data.train_annotations={file}", f"data.train_images={sound.folder / 'images'}"]
    config = read_config(str(program.setup / "tiny.toml"), overrides)
    tokenizer = make_tokenizer(config)
    sets = [open_set(s, tokenizer) for s in training_sets(config)]
    data = TrainDataset(sets, [1] * len(sets), tokenizer, sizes=[32], longest=64, flip=0.5, seed=0)
    samples = [data[(0, i)] for i in range(len(data))]
    assert all(s.reason and "\n" not in s.reason for s in samples if isinstance(s, Skipped))
    batch = Collate(32)(samples)
    for truth in batch.get("truth", []):
        assert truth.boxes.isfinite().all() and truth.tokens.any(1).all() and len(truth.tokens) == len(truth.boxes)
    return any(not isinstance(s, Skipped) for s in samples)


READERS = {"clipself": read_for_distillation, "fvit": read_for_fvit, "glip": read_for_glip}


@pytest.mark.parametrize("files", FILES)
def test_malformed_annotation_files_for_training(program, sound, tmp_path, files):
    """Refused in one line that names them, or every sample of them can be trained on."""
    file, outcomes = tmp_path / "train.json", Counter()

    @settings(max_examples=files, **FUZZ)
    @given(st.data())
    def check(data):
        file.write_bytes(damaged(data.draw, sound.instances))
        try:
            used = READERS[program.name](program, sound, file, data.draw)
        except UserError as error:
            assert "\n" not in str(error) and (str(file) in str(error) or str(sound.folder) in str(error))
            outcomes["refused"] += 1
        else:
            outcomes["used" if used else "nothing left"] += 1

    check()
    print(f"\n{program.name}: {dict(outcomes)}")
    assert outcomes["used"] >= files / 5 and outcomes["refused"] >= files / 20


@pytest.mark.parametrize("files", FILES)
def test_malformed_panoptic_files(sound, tmp_path, files):
    settings(max_examples=files, **FUZZ)(given(st.data())(lambda data: check_panoptic(sound, tmp_path, data)))()


def check_panoptic(sound, tmp_path, data) -> None:
    folder = sound.folder
    file = tmp_path / "panoptic.json"
    file.write_bytes(damaged(data.draw, sound.panoptic))
    options = EvalOptions(
        val_data=str(file), val_image_root=str(folder / "images"), val_segm_root=str(folder / "panoptic")
    )
    try:
        loaded = build_eval_data(options, image_sizes=[32], patch_size=8, crop_size=16)
        batches = list(loaded.loader)
    except UserError as error:
        assert "\n" not in str(error) and (str(file) in str(error) or str(folder) in str(error))
        return
    for batch in batches:
        count = int(batch["counts"].sum())
        assert len(batch["counts"]) + len(batch["skipped"]) in (1, 2)
        if count:
            assert torch.isfinite(batch["boxes"][32]).all() and batch["masks"][32].flatten(1).any(1).all()
            assert (
                len(batch["crops"]) == len(batch["labels"]) == count
                and (batch["labels"] < len(loaded.class_names)).all()
            )


@pytest.mark.parametrize("files", FILES)
def test_damaged_panoptic_pngs(tmp_path, files):
    settings(max_examples=files, **FUZZ)(given(st.data())(lambda data: check_png(tmp_path, data)))()


def check_png(tmp_path, data) -> None:
    mode = data.draw(st.sampled_from(("RGB", "RGBA", "P")))
    ids = np.random.default_rng(0).integers(0, 4, (20, 30, 3), dtype=np.uint8)
    content = bytearray(encode(Image.fromarray(ids).convert(mode)))
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "segments.png"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        found = read_segment_ids(str(path))
    except ImageError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert found.dtype == np.int32 and found.ndim == 2 and found.min() >= 0 and found.max() < 1 << 24


@pytest.mark.parametrize("method", KINDS[:3])
def test_a_file_full_of_bad_entries_trains_on_the_good_ones(program, scenes, tmp_path, method):
    """The losses are those of the file without the bad entries."""
    if program.name != "clipself" and method != KINDS[0]:
        pytest.skip("a method of the distillation")
    more = [f"--dataset-type={method}"] if program.name == "clipself" else []
    good = json.loads((scenes / "annotations/instances_train2017.json").read_text())
    content = json.loads(json.dumps(good))
    first = good["images"][0]["id"]
    content["annotations"] += [
        {"image_id": first}, {"image_id": first, "bbox": [1, 1, -5, 3], "category_id": 1}, {"bbox": [1, 1, 5, 5]},
        {"image_id": first, "bbox": [float("nan"), 0, 5, 5]}, {"image_id": first, "bbox": ["a", 0, 5, 5]},
        {"image_id": 123456789, "bbox": [1, 1, 5, 5]}, {"image_id": first, "bbox": [10**300, 0, 5, 5]}, None, 5, [],
        {"image_id": first, "bbox": [5000, 5000, 3, 3]}, {"image_id": first, "bbox": [1, 1, 1400, 40]},
    ]  # fmt: skip
    content["images"] += [{}, {"id": 5.5, "file_name": "x"}, {**good["images"][0], "file_name": "other.jpg"}, "image"]
    (tmp_path / "bad.json").write_text(json.dumps(content))
    (tmp_path / "good.json").write_text(json.dumps(good))
    for name in ("good", "bad"):
        assert program(name, *more, annotations=tmp_path / f"{name}.json", epochs=1, log_every=1) == 0
    logs = {name: program.text(name) for name in ("good", "bad")}
    losses = {name: re.findall(r"loss (\S+)", log) for name, log in logs.items()}
    assert losses["good"] == losses["bad"] and len(losses["good"]) == 12
    counted = {reason: int(n) for n, reason in re.findall(r"bad\.json: (\d+) x (.+) \(left out\)", logs["bad"])}
    assert sum(counted.values()) == 16, counted
    assert "left out" not in logs["good"]
