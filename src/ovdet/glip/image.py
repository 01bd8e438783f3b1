"""Image encoders: the feature pyramid on a Swin body, and on the image tower of a CLIP model."""

from __future__ import annotations

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
    """The dense maps of a CLIP image tower as a pyramid of strides p/2 to 8p, p the patch.

    A shallow block is enlarged, a middle one taken as it is, and the last one, read densely, is pooled (Li et al. 2022,
    "simple pyramid", with a block of its own for each level).

    Args:
        tower: image tower of any model of this project; a dense one (distilled) suits best.
        blocks: indices of the shallow and of the middle block.
        frozen: keep the tower as it is, in eval mode and without gradients.
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
        width = tower.width
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.down = nn.MaxPool2d(2, stride=2)
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for _ in self.take)
        self.fpn = FPN([width] * 3, channels, drop=drop)
        patch = tower.patch_size
        self.strides = tuple(patch * factor for factor in (0.5, 1, 2, 4, 8))
        self.divisor, self.channels = 2 * patch, channels

    def _normalize(self, images: Tensor) -> Tensor:
        return normalize(images, self.tower.image_mean, self.tower.image_std)

    def train(self, mode: bool = True) -> ClipPyramid:
        """As usual, but a frozen tower stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.tower.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.tower.grad_checkpointing = enable

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Levels ``[B, channels, h_i, w_i]`` of normalised pixels ``[B, 3, H, W]``."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.tower.dense_tokens(pixels, take=self.take)[1]
        shallow, middle, deep = (norm(x) for norm, x in zip(self.norms, maps, strict=True))
        return self.fpn([self.up(shallow), middle, self.down(deep)])
