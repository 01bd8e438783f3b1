"""Image files: what decodes, and that everything else is one kind of error."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from training.engine.data.images import ImageError, decode, read_image, resolve

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, rows: bytes) -> bytes:
    """An RGB PNG that says it has these sides, whatever it holds."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


DEEP = np.random.default_rng(1).integers(0, 65536, (4, 5, 3)).astype(">u2")
FILES = {
    "rgb.jpg": encoded(RGB, "JPEG"),
    "progressive.jpg": encoded(RGB, "JPEG", progressive=True),
    "grey.jpg": encoded(RGB.convert("L"), "JPEG"),
    "cmyk.jpg": encoded(RGB.convert("CMYK"), "JPEG"),
    "rgb.png": encoded(RGB, "PNG"),
    "grey.png": encoded(RGB.convert("L"), "PNG"),
    "bits.png": encoded(RGB.convert("1"), "PNG"),
    "palette.png": encoded(RGB.convert("P"), "PNG"),
    "alpha.png": encoded(RGB.convert("RGBA"), "PNG"),
    "transparent.png": encoded(RGB, "PNG", transparency=(0, 0, 0)),
    "grey_alpha.png": encoded(RGB.convert("LA"), "PNG"),
    "deep.png": png(5, 4, 16, b"".join(b"\0" + row.tobytes() for row in DEEP)),
    "animated.gif": encoded(RGB.convert("P"), "GIF", save_all=True, append_images=[RGB.rotate(90).convert("P")]),
    "animated.png": encoded(RGB, "PNG", save_all=True, append_images=[RGB.rotate(90)]),
    "picture.webp": encoded(RGB, "WEBP"),
    "png_inside.jpg": encoded(RGB, "PNG"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_mode_decodes_as_pillow_does(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    image = read_image(str(tmp_path / name))
    with Image.open(tmp_path / name) as expected:
        expected = torch.from_numpy(np.array(expected.convert("RGB"))).permute(2, 0, 1)
    assert image.dtype == torch.uint8 and image.shape == expected.shape
    assert (image.int() - expected.int()).abs().max() <= 3


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
    image = decode(encoded(Image.fromarray(values), "PNG"), "grey16.png")
    assert np.abs(image[0].numpy() - values / 257.0).max() <= 1


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(RGB, "JPEG", exif=exif), "turned.jpg").shape == (3, 20, 30)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"not an image", "unknown format"),
        (FILES["rgb.jpg"][:-400], "truncated|Truncated"),
        (FILES["rgb.png"][:900], "truncated"),
        (png(40000, 40000, 8, b"0" * 100), "decompression bomb"),
        (png(13500, 13500, 8, b"0" * 100), "decompression bomb|refused"),
        (png(0, 5, 8, b""), "unknown format|not a readable"),
    ],
)
def test_bad_files_say_what_is_wrong(content, reason, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=reason) as caught:
        read_image(str(tmp_path / "bad.jpg"))
    assert caught.value.file.endswith("bad.jpg") and "\n" not in str(caught.value)
    with pytest.raises(ImageError, match="no such file"):
        read_image(str(tmp_path / "absent.jpg"))
    with pytest.raises(ImageError):
        read_image(str(tmp_path))


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_damaged_files_decode_or_are_refused(name, data):
    content = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(0, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        image = decode(content, name)
    except ImageError as error:
        assert error.file == name and "\n" not in error.reason
    else:
        assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.numel() > 0


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.jpg", "a/../../secret.jpg", "..\\secret.jpg", "C:\\x.jpg",
                                  "s3://bucket/x.jpg", "file:///etc/passwd", "", ".", "..", "a\0b"])  # fmt: skip
def test_names_cannot_leave_the_root(name):
    with pytest.raises(ImageError):
        resolve("/data/images", name)


def test_names_inside_the_root():
    assert resolve("/data/images/", "train2017/1.jpg") == "/data/images/train2017/1.jpg"
    assert resolve("/data/images", "a/../b..c.jpg") == "/data/images/b..c.jpg"
    assert resolve("s3://bucket/images", "1.jpg") == "s3://bucket/images/1.jpg"
