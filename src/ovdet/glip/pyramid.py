"""Feature pyramid from three maps to five levels, P3 to P7 (Lin et al. 2017, with the extra levels of RetinaNet)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DropBlock(nn.Module):
    """Zero random square blocks of a map while training (Ghiasi et al. 2018), equally in all channels.

    Every cell starts a block with probability ``rate / side^2``; what is kept is scaled by its share.
    """

    def __init__(self, rate: float, side: int = 3) -> None:
        super().__init__()
        self.rate, self.side = rate, side

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        starts = torch.rand(len(x), 1, *x.shape[-2:], device=x.device) < self.rate / self.side**2
        keep = 1 - F.max_pool2d(starts.to(x.dtype), self.side, stride=1, padding=self.side // 2)
        return x * keep * (keep.numel() / keep.sum().clamp(min=1))


class FPN(nn.Module):
    """Three maps of strides s, 2s, 4s to five of ``channels``, strides s to 16s.

    Args:
        inputs: channels of the three maps, fine to coarse.
        drop: rate of :class:`DropBlock` on the two finer merged maps while training; GLIP trains and tunes with 0.3.
    """

    def __init__(self, inputs: Sequence[int], channels: int, *, drop: float = 0.0) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in inputs)
        self.layer = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in inputs)
        self.p6 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.drop = DropBlock(drop)
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """``[B, C_i, h_i, w_i]`` x 3 to ``[B, channels, h_i, w_i]`` x 5; sides halve, rounded up."""
        merged = self.inner[-1](maps[-1])
        levels = [self.layer[-1](merged)]
        for i in range(len(maps) - 2, -1, -1):
            lateral = self.inner[i](maps[i])
            merged = lateral + F.interpolate(merged, size=lateral.shape[-2:], mode="nearest")
            levels.insert(0, self.layer[i](self.drop(merged)))  # the finer level gets the whole map
        levels.append(self.p6(levels[-1]))
        levels.append(self.p7(F.relu(levels[-1])))
        return levels
