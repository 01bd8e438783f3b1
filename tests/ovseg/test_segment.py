"""Labels of photographs: any size, windows of several images in one pass, and the published chain."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ovseg.classes import parse_classes
from ovseg.protocols import OWN
from ovseg.segment import segment

CORNERS = F.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 1], [0, 1, 1]]), dim=1)
NAMES = parse_classes(["red,green,violet,cyan"])


class Colours(nn.Module):
    """A model whose dense embedding is the mean colour of each 8 x 8 patch."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = self
        self.scale = nn.Parameter(torch.ones(()))
        self.patch_size, self.image_mean, self.image_std = 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def encode_dense(self, image, readout=None):
        return F.normalize(F.avg_pool2d(image, 8) + 1e-6, dim=1)


def four_colours(height, width):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0, : height // 2], image[1, height // 2 :], image[2, :, width // 2 :] = 255, 255, 255
    return image


@pytest.mark.parametrize("size", [(50, 110), (1, 1), (1, 3000), (2, 7), (600, 400)])
@pytest.mark.parametrize("window", [0, 64, 20])
def test_labels_lie_on_the_image(size, window):
    """Wide, tall and tiny images: padding, windows and rounding must not shift the map."""
    image = four_colours(*size)
    protocol = replace(OWN, short_side=64, long_side=128, window=window, stride=window // 2)
    labels = segment(image, Colours(), NAMES, embeddings=CORNERS, protocol=protocol).labels
    assert labels.shape == size and labels.dtype == torch.uint8
    height, width = size
    if min(size) >= 50:
        margin = max(size) // 16
        for label, (y, x) in enumerate([(1, 1), (3, 1), (1, 3), (3, 3)]):
            y, x = height * y // 4, width * x // 4
            assert (labels[y - margin : y + margin, x - margin : x + margin] == label).all()
