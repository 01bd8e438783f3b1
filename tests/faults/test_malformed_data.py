"""Malformed annotation files and images: the bad part is left out and counted, or one line says why nothing is left."""

from __future__ import annotations

import copy
import io
import json
import re
import struct
import zlib
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
FUZZ = settings(
    max_examples=220, deadline=None, database=None, print_blob=True,
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


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
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
                   "area": 180, "caption": f"number {k}"} for k in range(2)]  # fmt: skip
        infos = [{"id": 1, "category_id": 2, "bbox": [0, 0, width, height]},
                 {"id": 2, "category_id": 1, "bbox": [4, 5, 16, 20]}]  # fmt: skip
        segments.append({"image_id": 100 + i, "file_name": f"{i}.png", "segments_info": infos})
    categories = [{"id": 1, "name": "dog", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}]
    instances = {"images": images, "annotations": boxes, "categories": categories}
    return Sound(folder, instances, {"images": images, "annotations": segments, "categories": categories})


def damaged(draw, content: dict) -> bytes:
    """A copy with one to six values replaced, removed or repeated, in some encoding, sometimes with altered bytes."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 6))):
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


@FUZZ
@given(st.data())
def test_malformed_annotation_files_for_training(sound, tmp_path, data):
    folder = sound.folder
    file, kind = tmp_path / "train.json", data.draw(st.sampled_from(KINDS))
    file.write_bytes(damaged(data.draw, sound.instances))
    tokenize = lambda texts: torch.tensor([[len(t) for t in texts[0].split()][:4] + [0] * 4])[:, :4]  # noqa: E731
    try:
        loaded = train_data(folder, file, kind, tokenize=tokenize)
    except UserError as error:
        assert "\n" not in str(error) and (str(file) in str(error) or str(folder) in str(error))
        return
    seen = 0
    for batch in loaded.loader:
        check_batch(batch)
        seen += batch["samples"] + len(batch["skipped"])
        assert all(reason and "\n" not in reason for _, reason in batch["skipped"])
        if kind == "region_clip" and "labels" in batch:
            assert (batch["labels"] < len(loaded.class_names)).all()
    assert seen >= min(loaded.num_images, 2) and all(number > 0 for number in loaded.skipped.values())


@FUZZ
@given(st.data())
def test_malformed_panoptic_files(sound, tmp_path, data):
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


@FUZZ
@given(mode=st.sampled_from(("RGB", "RGBA", "P")), data=st.data())
def test_damaged_panoptic_pngs(tmp_path, mode, data):
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


# -- images -----------------------------------------------------------------------------------------------------------


def png_of(width: int, height: int) -> bytes:
    """A PNG header that promises so many pixels, with next to nothing behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def usable_oddities(seed: int) -> dict[str, bytes]:
    """Images of unusual kinds that are images all the same."""
    rgb, rng = picture(40 + seed, 36, seed), np.random.default_rng(seed)
    deep = Image.fromarray(rng.integers(0, 65536, (30, 33), dtype=np.uint16))
    frames = [picture(30, 30, seed + i).convert("P") for i in (1, 2)]
    return {
        "cmyk.jpg": encode(rgb.convert("CMYK"), "JPEG"),
        "grey.jpg": encode(rgb.convert("L"), "JPEG"),
        "sixteen_bit.png": encode(deep),
        "sixteen_bit.tif": encode(deep, "TIFF"),
        "float.tif": encode(Image.fromarray(rng.random((20, 25), dtype=np.float32)), "TIFF"),
        "animated.gif": encode(frames[0], "GIF", save_all=True, append_images=frames),
        "animated.png": encode(rgb, "PNG", save_all=True, append_images=[rgb.rotate(90)]),
        "alpha.png": encode(rgb.convert("RGBA")),
        "grey_alpha.png": encode(rgb.convert("LA")),
        "palette.png": encode(rgb.convert("P")),
        "bits.png": encode(rgb.convert("1")),
        "png_called.jpg": encode(rgb),
        "jpeg_called.png": encode(rgb, "JPEG"),
        "webp_called.jpg": encode(rgb, "WEBP"),
        "thin.png": encode(picture(200, 2, seed)),
        "exif.jpg": encode(rgb, "JPEG", exif=b"Exif\0\0" + b"\xff" * 30),
    }


def unusable(seed: int) -> dict[str, bytes]:
    """Files that are no usable image."""
    rgb, rng = picture(40, 36 + seed, seed), np.random.default_rng(seed)
    jpeg, png, webp = encode(rgb, "JPEG"), encode(rgb), encode(rgb, "WEBP")
    cut = lambda content: content[: int(rng.integers(1, len(content) * 0.9))]  # noqa: E731
    return {
        "truncated.jpg": cut(jpeg),
        "truncated.png": cut(png),
        "truncated.webp": cut(webp),
        "empty.jpg": b"",
        "text.jpg": b"<html>404 not found</html>",
        "zeros.jpg": bytes(1000 + seed),
        "noise.png": rng.bytes(500),
        "header_and_noise.png": png[:16] + rng.bytes(500),
        "no_pixels.png": png_of(0, 7),
        "one_pixel.png": encode(picture(1, 1, seed)),
        "bomb.png": png_of(60_000, 60_000 + seed),
        "large.png": png_of(13_400, 13_400 + seed),
        "promises.png": png_of(3_000, 3_000),
    }


def test_malformed_images_are_skipped_named_and_counted(program, scenes, tmp_path):
    """A real training on 24 good images, 112 of unusual kinds and 117 that are none."""
    content = json.loads((scenes / "annotations/instances_train2017.json").read_text())
    images = tmp_path / "images"
    images.mkdir()
    for file in (scenes / "train2017").iterdir():
        (images / file.name).symlink_to(file)
    good = len(content["images"])
    listed = {"odd": 0, "bad": 0}
    groups = [("odd", usable_oddities(s)) for s in range(7)] + [("bad", unusable(s)) for s in range(9)]
    for number, (kind, files) in enumerate(groups):
        for name, body in files.items():
            (images / f"{kind}{number}_{name}").write_bytes(body)
            content["images"].append({"id": 10_000 + len(content["images"]), "file_name": f"{kind}{number}_{name}"})
            listed[kind] += 1
    for name in ("missing.jpg", "../outside.jpg", "/etc/passwd", "folder.jpg"):
        content["images"].append({"id": 10_000 + len(content["images"]), "file_name": name})
        listed["bad"] += 1
    (images / "folder.jpg").mkdir()
    (tmp_path / "outside.jpg").write_bytes(encode(picture(30, 30, 0), "JPEG"))  # a fine image that is not to be read
    assert listed["odd"] + listed["bad"] >= 200
    (tmp_path / "train.json").write_text(json.dumps(content))
    data = {"train_data": tmp_path / "train.json", "train_image_root": images, "batch_size": 1, "epochs": 1}
    assert program(name="run", max_skipped=1.0, lr=1e-4, log_every_n_steps=1, **data) == 0
    log = (program.logs / "run/out.log").read_text()
    total = good + listed["odd"] + listed["bad"]
    assert f"{total} images" in log and f"{total} steps an epoch" in log
    losses = [float(x) for x in re.findall(r"loss (\S+)", log)]
    assert len(losses) == total and np.isfinite(losses).all()
    # By the dataset itself: everything that was skipped, and why.
    skipped = Counter()
    for batch in train_data(tmp_path, tmp_path / "train.json", "grid_distill").loader:
        check_batch(batch)
        skipped.update(Path(file).name for file, _ in batch["skipped"])
    assert len(skipped) == sum(skipped.values()) == listed["bad"], sorted(skipped)
    assert all(
        name.startswith("bad") or name in ("missing.jpg", "outside.jpg", "passwd", "folder.jpg") for name in skipped
    )


def test_too_many_malformed_images_stop_with_one_line(program, scenes, tmp_path, capsys):
    content = json.loads((scenes / "annotations/instances_train2017.json").read_text())
    (tmp_path / "images").mkdir()
    files = list(unusable(0).values())
    for i, image in enumerate(content["images"]):
        body = files[i % len(files)] if i % 2 else (scenes / "train2017" / image["file_name"]).read_bytes()
        (tmp_path / "images" / image["file_name"]).write_bytes(body)
    assert program(name="run", train_image_root=tmp_path / "images", epochs=1) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "12 of 24 samples" in errors[0] and "--max-skipped" in errors[0]


@pytest.mark.parametrize("method", KINDS[:3])
def test_a_file_full_of_bad_entries_trains_on_the_good_ones(program, scenes, tmp_path, method):
    """The losses are those of the file without the bad entries."""
    good = json.loads((scenes / "annotations/instances_train2017.json").read_text())
    content = json.loads(json.dumps(good))
    first = good["images"][0]["id"]
    content["annotations"] += [
        {"image_id": first}, {"image_id": first, "bbox": [1, 1, -5, 3], "category_id": 1}, {"bbox": [1, 1, 5, 5]},
        {"image_id": first, "bbox": [float("nan"), 0, 5, 5]}, {"image_id": first, "bbox": ["a", 0, 5, 5]},
        {"image_id": 123456789, "bbox": [1, 1, 5, 5]}, {"image_id": first, "bbox": [10**300, 0, 5, 5]}, None, 5, [],
        {"image_id": first, "bbox": [5000, 5000, 3, 3]},
    ]  # fmt: skip
    content["images"] += [{}, {"id": 5.5, "file_name": "x"}, {**good["images"][0], "file_name": "other.jpg"}, "image"]
    (tmp_path / "bad.json").write_text(json.dumps(content))
    (tmp_path / "good.json").write_text(json.dumps(good))
    for name in ("good", "bad"):
        assert (
            program(name=name, train=method, train_data=tmp_path / f"{name}.json", epochs=1, log_every_n_steps=1) == 0
        )
    logs = {name: (program.logs / name / "out.log").read_text() for name in ("good", "bad")}
    losses = {name: re.findall(r"loss (\S+)", log) for name, log in logs.items()}
    assert losses["good"] == losses["bad"] and len(losses["good"]) == 12
    counted = {reason: int(n) for n, reason in re.findall(r"bad\.json: (\d+) x (.+) \(left out\)", logs["bad"])}
    assert sum(counted.values()) == 15, counted
    assert "left out" not in logs["good"]
