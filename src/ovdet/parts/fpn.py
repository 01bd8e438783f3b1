"""Feature pyramids: from four ViT maps of one resolution, or from the stages of a convolutional backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]  # channels to a layer, such as nn.BatchNorm2d


def level_strides(patch_size: int) -> tuple[float, ...]:
    """Input pixels per cell of the five pyramid levels: p/4, p/2, p, 2p, 4p (fractions for patch 14)."""
    return tuple(patch_size * factor for factor in (0.25, 0.5, 1.0, 2.0, 4.0))


class SimplePyramid(nn.Module):
    """Four maps ``[B, W, h, w]`` to ``[B, W]`` x (4h, 2h, h, h/2), shallow blocks at high resolution.

    Level 1: transposed convolution x2, batch norm, GELU, transposed convolution x2. Level 2: transposed convolution
    x2. Level 3: as it is. Level 4: max pooling /2 (an odd last row or column is dropped).
    """

    def __init__(self, width: int, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.up4 = nn.Sequential(
            nn.ConvTranspose2d(width, width, 2, stride=2),
            norm(width),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, stride=2),
        )
        self.up2 = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.down = nn.MaxPool2d(2, stride=2)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        first, second, third, last = maps
        return [self.up4(first), self.up2(second), third, self.down(last)]


def conv_norm(inputs: int, outputs: int, kernel: int, norm: Norm | None = nn.BatchNorm2d) -> nn.Module:
    """Convolution of equal size, without bias, and a norm; without a norm, a convolution with bias.

    Batch norm becomes synchronised by ``timm.layers.convert_sync_batchnorm``.
    """
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=norm is None)
    return conv if norm is None else nn.Sequential(conv, norm(outputs))


def conv_layers(channels: int, number: int, norm: Norm | None) -> list[nn.Module]:
    """So many 3x3 convolutions, each with its norm (None: with bias) and a ReLU, one after the other."""
    layers: list[nn.Module] = []
    for _ in range(number):
        layers += [conv_norm(channels, channels, 3, norm), nn.ReLU()]
    return layers


def init_weights(module: nn.Module, kinds: type | tuple[type, ...], draw: Callable[[Tensor], Tensor]) -> None:
    """Draw the weights of a module's layers of these kinds; their biases are 0."""
    for layer in module.modules():
        if isinstance(layer, kinds):
            draw(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def draw_for_relu(weight: Tensor) -> Tensor:
    """Weights of a layer that a ReLU follows (He et al. 2015), by its outputs."""
    return nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


class FeaturePyramid(nn.Module):
    """Feature pyramid network (Lin et al. 2017): n maps in, n + 1 of ``channels`` out.

    The last is the one before it taken at every second cell.

    Args:
        widths: channels of the maps, fine to coarse.
        channels: of every level.
        norm: after each convolution, or None for convolutions with bias.
    """

    def __init__(self, widths: Sequence[int], channels: int, norm: Norm | None = nn.BatchNorm2d) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(conv_norm(width, channels, 1, norm) for width in widths)
        self.output = nn.ModuleList(conv_norm(channels, channels, 3, norm) for _ in widths)
        init_weights(self, nn.Conv2d, nn.init.xavier_uniform_)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        laterals = [conv(x) for conv, x in zip(self.lateral, maps, strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=laterals[i - 1].shape[-2:])
        outputs = [conv(x) for conv, x in zip(self.output, laterals, strict=True)]
        return [*outputs, F.max_pool2d(outputs[-1], 1, stride=2)]


class Neck(nn.Module):
    """ViT maps to five pyramid levels ``[B, channels, h_l, w_l]`` of strides :func:`level_strides`."""

    def __init__(self, width: int, channels: int, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.levels = SimplePyramid(width, norm)
        self.fpn = FeaturePyramid([width] * 4, channels, norm)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return self.fpn(self.levels(maps))
