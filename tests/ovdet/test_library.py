"""What the library call refuses, and that it reads images as it needs them; what it finds is tested with the tools."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import ovdet
from ovdet.fvit.config import FViTConfig
from ovdet.library import LoadedDetector, as_pixels


class Nothing(nn.Module):
    """Finds nothing, and notes how many images it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def prepare(self, images: Tensor, sizes: list) -> Tensor:
        return images

    def forward(self, images: Tensor, sizes: list) -> list[dict[str, Tensor]]:
        self.seen.append(len(images))
        empty = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
        return [empty for _ in images]


@pytest.fixture
def detector() -> LoadedDetector:
    config = SimpleNamespace(**{part: getattr(FViTConfig(), part) for part in ("data", "train", "test")})
    config.data.image_size = 32
    return LoadedDetector(Nothing(), config, lambda names: None, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("classes", "batch_size", "message"),
    [
        ("cat,dog", 1, r"classes are the text 'cat,dog': give a list of names, such as \['cat', 'dog'\]"),
        ([1], 1, "classes hold 1, which is no name"),
        (["cat"], 0, "batch_size is 0: give 1 or more"),
        (["cat"], -1, "batch_size is -1"),
    ],
)
def test_what_is_no_call(detector: LoadedDetector, classes: object, batch_size: int, message: str):
    with pytest.raises(ValueError, match=message):
        detector(np.zeros((4, 4, 3), np.uint8), classes, batch_size=batch_size)
    with pytest.raises(ValueError, match=r"attributes are the text 'red,blue': give a list, such as \['red', 'blue'\]"):
        detector.use_attributes("red,blue")
    assert not detector.detector.seen


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (None, "of type NoneType"),
        (b"bytes", "of type bytes"),
        (np.zeros((4, 5), np.uint8), r"an array of uint8 and shape \(4, 5\)"),
        (np.zeros((4, 5, 3)), r"an array of float64 and shape \(4, 5, 3\)"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), r"shape \(4, 5, 3\)"),
        (np.zeros((0, 5, 3), np.uint8), r"shape \(0, 5, 3\)"),
    ],
)
def test_what_is_no_image(picture: object, message: str):
    with pytest.raises(ValueError, match=message):
        as_pixels(picture)


def test_images_are_read_as_they_are_needed(detector: LoadedDetector):
    taken = []

    def pictures():
        for number in range(5):
            taken.append(len(detector.detector.seen))  # batches that were done by then
            yield np.full((8, 6 + number, 3), number, np.uint8)

    found = detector(pictures(), ["cat"], batch_size=2)
    assert [(f["index"], f["size"]) for f in found] == [(i, (8, 6 + i)) for i in range(5)]
    assert detector.detector.seen == [2, 2, 1] and taken == [0, 0, 1, 1, 2]
    assert detector([], ["cat"]) == []


def test_overrides_are_a_list(tmp_path: Path):
    with pytest.raises(ValueError, match=r"such as \['test.score=0.5'\]"):
        ovdet.load_detector(tmp_path / "x.pt", overrides="test.score=0.5")


class Speller(Nothing):
    """Finds class 0 in every image, with a score that tells which vocabulary it has by then; others may interfere."""

    names: tuple[str, ...] = ()
    inside = threading.Event()  # somebody is in the forward pass
    changed = threading.Event()  # and somebody has set another vocabulary meanwhile

    def choose(self, names: tuple[str, ...]) -> None:
        self.names = names
        if self.inside.is_set():
            self.changed.set()

    def forward(self, images: Tensor, sizes: list) -> list[dict[str, Tensor]]:
        self.inside.set()
        self.changed.wait(0.3)
        result = {"boxes": torch.tensor([[0.0, 0, 4, 4]]), "scores": torch.tensor([float(ord(self.names[0][0]))])}
        return [result | {"labels": torch.zeros(1, dtype=torch.int64)} for _ in images]


def test_threads_have_vocabularies_of_their_own(tmp_path: Path):
    network = Speller()
    config = SimpleNamespace(**{part: getattr(FViTConfig(), part) for part in ("data", "train", "test")})
    config.data.image_size = 32
    detector = LoadedDetector(network, config, network.choose, device=torch.device("cpu"))
    image = np.zeros((8, 8, 3), np.uint8)

    def call(name: str) -> list[tuple[list[str], float]]:
        return [(f["names"], float(f["scores"][0])) for f in detector([image, image], [name, "other"], batch_size=1)]

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(call, "cat")
        assert network.inside.wait(10)
        second = pool.submit(call, "dog")
        assert first.result() == [(["cat"], float(ord("c")))] * 2
        assert second.result() == [(["dog"], float(ord("d")))] * 2
    # Files are looked through with the classes that were in use when it began, whatever is asked in between.
    for name in ("a.png", "b.png"):
        Image.fromarray(image).save(tmp_path / name)
    detector.use_classes(["cat"])
    files = detector.detect_files([str(tmp_path / name) for name in ("a.png", "b.png")])
    one, _, two = next(files), detector.use_classes(["dog"]), next(files)
    assert [(f["names"], float(f["scores"][0])) for f in (one, two)] == [(["cat"], float(ord("c")))] * 2
    assert detector.classes == ("dog",) and call("dog")[0] == (["dog"], float(ord("d")))
