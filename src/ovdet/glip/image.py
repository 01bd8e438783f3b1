"""Image encoders: the feature pyramid on a Swin body, and on the image tower of a CLIP model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from open_clip import ImageTower
from open_clip.transform import normalize
from ovdet.glip.pyramid import FPN
from ovdet.glip.swin import Swin

#: ImageNet's statistics; GLIP's files expect blue first.
MEAN, STD = (103.53 / 255, 116.28 / 255, 123.675 / 255), (57.375 / 255, 57.12 / 255, 58.395 / 255)


class ImageEncoder(nn.Module):
    """Pixels to five levels of one width.

    Attributes:
        strides: input pixels per cell of each level.
        divisor: sides of the input are multiples of it.
        channels: of every level.
    """

    strides: tuple[float, ...]
    divisor: int
    channels: int

    def normalize(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """uint8 RGB ``[B, 3, H, W]`` as the encoder wants it; zero outside of each image's (height, width)."""
        pixels = self._normalize(images)
        for row, (height, width) in zip(pixels, sizes, strict=True):
            row[:, height:] = 0
            row[:, :, width:] = 0
        return pixels

    def _normalize(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass."""
        raise NotImplementedError


class SwinPyramid(ImageEncoder):
    """GLIP's own: Swin and five levels of strides 8 to 128.

    Args:
        swin: the body.
        channels: of every level.
        drop: see :class:`ovdet.glip.pyramid.FPN`.
    """

    def __init__(self, swin: Swin, channels: int = 256, *, drop: float = 0.3) -> None:
        super().__init__()
        self.swin, self.fpn = swin, FPN(swin.channels, channels, drop=drop)
        self.strides, self.divisor, self.channels = (8, 16, 32, 64, 128), 32, channels

    def _normalize(self, images: Tensor) -> Tensor:
        return normalize(images.flip(1), MEAN, STD)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.swin.set_grad_checkpointing(enable)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Levels ``[B, channels, h_i, w_i]`` of normalised pixels ``[B, 3, H, W]``."""
        return self.fpn(self.swin(pixels))


class ClipPyramid(ImageEncoder):
    """The dense maps of a CLIP image tower as a pyramid whose strides are about those of GLIP: 8 to 128.

    A shallow, a middle and the last block, the last read densely, give a level each; what is not of its stride is
    enlarged by transposed convolutions or pooled (after the simple pyramid of Li et al. 2022).

    Args:
        tower: image tower of any model of this project; a dense one (distilled) suits best.
        blocks: indices of the shallow and of the middle block.
        channels: of every level.
        frozen: keep the tower as it is, in eval mode and without gradients.
        drop: see :class:`ovdet.glip.pyramid.FPN`.

    Raises:
        ValueError: blocks that do not exist or do not ascend.
    """

    def __init__(
        self, tower: ImageTower, blocks: Sequence[int], channels: int = 256, *, frozen: bool = True, drop: float = 0.0
    ) -> None:
        super().__init__()
        last = len(tower.trunk.blocks) - 1
        if len(blocks) != 2 or not 0 <= blocks[0] < blocks[1] < last:
            raise ValueError(f"image.blocks is {list(blocks)}: give two ascending block indices below {last}")
        self.tower, self.frozen, self.take = tower, frozen, (*blocks, last)
        if frozen:
            tower.requires_grad_(False).eval()
        else:
            for parameter in tower.unreached_by_dense():
                parameter.requires_grad_(False)
            for module in (tower.trunk.norm, tower.trunk.fc_norm, tower.trunk.head):
                module.requires_grad_(False)  # the pyramid reads blocks, not the joint space
        # By how much a cell of the finest level is smaller than a patch: a power of two, or 1.
        finer = max(round(math.log2(tower.patch_size / 8)), 0)
        self.norms = nn.ModuleList(nn.GroupNorm(1, tower.width) for _ in self.take)
        self.scales = nn.ModuleList(_scale(tower.width, finer - i) for i in range(3))
        self.fpn = FPN([tower.width] * 3, channels, drop=drop)
        finest = tower.patch_size / 2**finer
        self.strides = tuple(finest * 2**i for i in range(5))
        self.divisor, self.channels = tower.patch_size * 2 ** max(2 - finer, 0), channels

    def _normalize(self, images: Tensor) -> Tensor:
        return normalize(images, self.tower.image_mean, self.tower.image_std)

    def train(self, mode: bool = True) -> ClipPyramid:
        """As usual, but a frozen tower stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.tower.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.tower.grad_checkpointing = enable and not self.frozen

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Levels ``[B, channels, h_i, w_i]`` of normalised pixels ``[B, 3, H, W]``."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.tower.dense_tokens(pixels, take=self.take)[1]
        return self.fpn([scale(norm(x)) for scale, norm, x in zip(self.scales, self.norms, maps, strict=True)])


def _scale(width: int, power: int) -> nn.Module:
    """A map ``[B, width, h, w]`` enlarged by 2 to the power, or pooled where it is negative."""
    if power < 0:
        return nn.MaxPool2d(2**-power)
    return nn.Sequential(*(nn.ConvTranspose2d(width, width, 2, stride=2) for _ in range(power)))
