"""Dynamic head block (Dai et al. 2021): deformable convolution across levels, scale attention, dynamic ReLU.

Every level learns from itself and from the levels beside it. The offsets of all three convolutions are computed on the
level itself; on the coarser level they belong to a map four times as large. The published kernel reads the first
numbers of that map, row by row, whatever they stand for. Released weights were trained so (``offsets="released"``).
``"aligned"`` brings the coarser map to the level's size before it is convolved, so that every offset meets its own
place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

OFFSETS = ("released", "aligned")
TAPS = 9  # of a 3 x 3 kernel: an offset (dy, dx) and a weight each


def deformable(
    x: Tensor, offsets: Tensor, weights: Tensor, kernel: Tensor, bias: Tensor | None, stride: int = 1
) -> Tensor:
    """Modulated deformable 3 x 3 convolution (Zhu et al. 2019), always in float32.

    Args:
        x: ``[B, C, H, W]``.
        offsets: ``[B, 18, h, w]``, (dy, dx) of each tap in cells of ``x``.
        weights: ``[B, 9, h, w]``, of each tap, in 0..1.
        kernel, bias: ``[O, C, 3, 3]`` and ``[O]``.
        stride: 1 or 2. Where the output is smaller than the map of offsets, the first numbers of the flat map of each
            image are read.

    Returns:
        ``[B, O, ceil(H / stride), ceil(W / stride)]``.
    """
    height, width = -(-x.shape[2] // stride), -(-x.shape[3] // stride)
    if offsets.shape[-2:] != (height, width):
        offsets, weights = (_first_numbers(t, height, width) for t in (offsets, weights))
    with torch.autocast(x.device.type, enabled=False):
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        inputs = (t if t is None else t.to(kind) for t in (x, offsets, kernel, bias, weights))
        x, offsets, kernel, bias, weights = inputs
        return deform_conv2d(x, offsets, kernel, bias, stride=stride, padding=1, mask=weights)


def _first_numbers(x: Tensor, height: int, width: int) -> Tensor:
    """The first ``C * height * width`` numbers of each image of ``[B, C, H, W]``, as ``[B, C, height, width]``."""
    channels = x.shape[1]
    return x.flatten(1)[:, : channels * height * width].unflatten(1, (channels, height, width))


class _ConvNorm(nn.Module):
    """Parameters of a deformable convolution, and the group norm after it."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(groups, channels)
        bound = (TAPS * channels) ** -0.5
        nn.init.uniform_(self.conv.weight, -bound, bound)
        nn.init.zeros_(self.conv.bias)


class DynamicReLU(nn.Module):
    """The larger of two lines whose slopes and offsets depend on the whole map (Chen et al. 2020, variant B)."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction), nn.ReLU(), nn.Linear(channels // reduction, 4 * channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same shape."""
        slope1, shift1, slope2, shift2 = F.hardsigmoid(self.fc(x.mean((2, 3))))[..., None, None].chunk(4, dim=1)
        first = x * (2 * (slope1 - 0.5) + 1) + (shift1 - 0.5)
        return torch.maximum(first, x * (2 * (slope2 - 0.5)) + (shift2 - 0.5))


class DyConv(nn.Module):
    """One block over all levels.

    Args:
        channels: C of every level.
        groups: of the group norms.
        offsets: ``"released"`` or ``"aligned"``, see the module's text.
        deform: False takes ordinary 3 x 3 convolutions (an option of the reference: a quarter of the time on a CPU).
    """

    def __init__(self, channels: int, *, groups: int = 16, offsets: str = "released", deform: bool = True) -> None:
        super().__init__()
        if offsets not in OFFSETS:
            raise ValueError(f'offsets is "{offsets}": use one of {", ".join(OFFSETS)}')
        self.aligned, self.deform = offsets == "aligned", deform
        # Of the coarser level, of the level itself, and of the finer level.
        self.convs = nn.ModuleList(_ConvNorm(channels, groups) for _ in range(3))
        self.scale_attention = nn.Conv2d(channels, 1, 1)
        nn.init.normal_(self.scale_attention.weight, std=0.01)
        nn.init.zeros_(self.scale_attention.bias)
        self.relu = DynamicReLU(channels)
        if deform:
            self.offset = nn.Conv2d(channels, 3 * TAPS, 3, padding=1)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Levels ``[B, C, h_i, w_i]``, fine to coarse, to the same shapes."""
        results = []
        for i, level in enumerate(levels):
            offsets = weights = None
            if self.deform:
                offsets, weights = self.offset(level).split((2 * TAPS, TAPS), dim=1)
                weights = weights.sigmoid()
            views = [self._convolve(1, level, offsets, weights)]
            if i > 0:
                views.append(self._convolve(2, levels[i - 1], offsets, weights, stride=2))
            if i + 1 < len(levels):
                views.append(self._from_coarser(levels[i + 1], level.shape[-2:], offsets, weights))
            results.append(self.relu(self._combine(views)))
        return results

    def _from_coarser(
        self, coarser: Tensor, size: torch.Size, offsets: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        if self.aligned:
            return self._convolve(0, _upsample(coarser, size), offsets, weights)
        return _upsample(self._convolve(0, coarser, offsets, weights), size)

    def _convolve(
        self, index: int, x: Tensor, offsets: Tensor | None, weights: Tensor | None, stride: int = 1
    ) -> Tensor:
        conv, norm = self.convs[index].conv, self.convs[index].norm
        if offsets is None or weights is None:
            return norm(F.conv2d(x, conv.weight, conv.bias, stride=stride, padding=1))
        return norm(deformable(x, offsets, weights, conv.weight, conv.bias, stride))

    def _combine(self, views: Sequence[Tensor]) -> Tensor:
        """Mean of the views, each times its scale attention."""
        total = torch.zeros_like(views[0])
        for view in views:
            gate = F.relu(self.scale_attention(view.mean((2, 3), keepdim=True)))
            total = total + view * F.hardsigmoid(gate)
        return total / len(views)


def _upsample(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
