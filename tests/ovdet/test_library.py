"""What the library call refuses, and that it reads images as it needs them; what it finds is tested with the tools."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
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
