"""Malformed images: those that are none are skipped, named and counted; unusual ones are used."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.engine.skips import SkipPolicy


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


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


@pytest.mark.parametrize(("odd", "bad"), [(1, 1), pytest.param(7, 9, marks=pytest.mark.slow)])
def test_malformed_images_are_skipped_named_and_counted(program, scenes, tmp_path, monkeypatch, odd, bad):
    """A real training on 24 good images and, in the long form, 112 of unusual kinds and 121 that are none."""
    content = json.loads((scenes / "annotations/instances_train2017.json").read_text())
    images = tmp_path / "images"
    images.mkdir()
    for file in (scenes / "train2017").iterdir():
        (images / file.name).symlink_to(file)
    good = len(content["images"])
    listed = {"odd": 0, "bad": 0}
    groups = [("odd", usable_oddities(s)) for s in range(odd)] + [("bad", unusable(s)) for s in range(bad)]
    if program.name != "clipself":  # has no regions there, but a detector makes do with a single pixel
        groups += [("odd", {f"{i}_one_pixel.png": files.pop("one_pixel.png")})
                   for i, (kind, files) in enumerate(list(groups)) if kind == "bad"]  # fmt: skip
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
    assert bad == 1 or listed["odd"] + listed["bad"] >= 200
    if program.name == "glip":  # leaves out images without objects
        kind = content["annotations"][0]["category_id"]
        box = {"category_id": kind, "bbox": [2, 2, 20, 20], "area": 400, "iscrowd": 0}
        content["annotations"] += [
            {"id": 10**6 + i, "image_id": image["id"], **box} for i, image in enumerate(content["images"][good:])
        ]
    (tmp_path / "train.json").write_text(json.dumps(content))
    seen = Counter()
    original = SkipPolicy.name

    def name(policy, skipped):
        skipped = list(skipped)
        seen.update(Path(file).name for file, reason in skipped if reason and "\n" not in reason)
        original(policy, skipped)

    monkeypatch.setattr(SkipPolicy, "name", name)
    file, total = tmp_path / "train.json", good + listed["odd"] + listed["bad"]
    batch = 1 if program.name == "clipself" else 2  # a detector's batch norm wants more than one
    options = {"epochs": 1, "log_every": 1, "max_skipped": 1.0, "batch_size": batch}
    assert program("run", annotations=file, images=images, **options) == 0
    log = program.text("run")
    assert f"{-(-total // batch)} steps an epoch" in log or f"{total // batch} steps an epoch" in log
    losses = [float(x) for x in re.findall(r"loss (\S+)", log)]
    assert len(losses) in (total // batch, -(-total // batch)) and np.isfinite(losses).all()
    assert set(seen) >= {n for n in seen if n.startswith("bad")} and len(seen) >= listed["bad"] - (batch - 1)
    assert all(
        name.startswith("bad") or name in ("missing.jpg", "outside.jpg", "passwd", "folder.jpg") for name in seen
    )


def test_too_many_malformed_images_stop_with_one_line(program, scenes, tmp_path, capsys):
    content = json.loads((scenes / "annotations/instances_train2017.json").read_text())
    (tmp_path / "images").mkdir()
    files = [body for name, body in unusable(0).items() if name != "one_pixel.png"]
    for i, image in enumerate(content["images"]):
        body = files[i % len(files)] if i % 2 else (scenes / "train2017" / image["file_name"]).read_bytes()
        (tmp_path / "images" / image["file_name"]).write_bytes(body)
    bad = sum(i % 2 for i in range(len(content["images"])))
    assert program("run", images=tmp_path / "images", epochs=1) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and f"{bad} of 24 samples" in errors[0] and program.flags.max_skipped in errors[0]
