"""Attention in windows, as CLIPSelf's second branch has it, then the value path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import timm_blocks as tb
from .base import BlockInputs, Readout

if TYPE_CHECKING:
    from ..image_tower import ImageTower

WINDOW = 16  # cells of a side


class Windows(Readout):
    """The value path after blocks that attend within windows of cells, but for a few global ones.

    Prefix tokens are copied into every window and averaged over the windows after each such block. Positions of a
    rotary trunk are those within the window. The published branch takes 16 x 16 cells and keeps the last block of each
    quarter global. Windows at the right and lower border are smaller where the grid is no multiple of their side.

    Args:
        tower: image tower.
        size: cells of a window's side.
        global_blocks: blocks that attend over the whole grid; None: the last of each quarter.
        normalized: unit length per cell; None: yes.
    """

    def __init__(
        self,
        tower: ImageTower,
        *,
        size: int = WINDOW,
        global_blocks: list[int] | None = None,
        normalized: bool | None = None,
    ) -> None:
        super().__init__()
        depth = len(tower.trunk.blocks)
        if int(size) != size or size < 1:
            raise ValueError(f"the window of the reading has {size:g} cells a side: give a whole number from 1")
        if global_blocks is None:
            global_blocks = [quarter * depth // 4 - 1 for quarter in (1, 2, 3, 4)]
        self.size = int(size)
        self.global_blocks = sorted({int(i) for i in global_blocks if i >= 0})
        if self.global_blocks and self.global_blocks[-1] >= depth:
            raise ValueError(f"global block {self.global_blocks[-1]} does not exist: the trunk has 0 to {depth - 1}")
        self.normalized = normalized is None or bool(normalized)
        self.name = "window" if self.size == WINDOW else f"window:{self.size}"
        self.ordinary_last = tower.pools_by_attention
        self.reads_prefix = depth > 1 or self.ordinary_last

    def options(self) -> dict[str, Any]:
        return {**super().options(), "global_blocks": self.global_blocks}

    def blocks(self, tower: ImageTower) -> tuple[int, ...]:
        return (0,)

    def tokens(self, inputs: BlockInputs) -> Tensor:
        tower, prefix = inputs.tower, inputs.tower.num_prefix_tokens
        x = inputs.tokens[0]
        for i in range(inputs.last + self.ordinary_last):
            x = tower.run_block(i, x, inputs.table) if i in self.global_blocks else self._windowed(inputs, i, x)
        x = x[:, prefix:]
        return x if self.ordinary_last else inputs.run(tb.value_block, tower.trunk.blocks[inputs.last], x)

    def _windowed(self, inputs: BlockInputs, index: int, x: Tensor) -> Tensor:
        prefix, (height, width) = inputs.tower.num_prefix_tokens, inputs.grid
        first, cells = x[:, :prefix], x[:, prefix:].unflatten(1, (height, width))
        windows, bands = 0, []
        total = torch.zeros_like(first)
        for rows in _bands(height, self.size):
            parts = []
            for columns in _bands(width, self.size):
                y, summed, count = self._run_windows(inputs, index, first, cells[:, rows, columns])
                windows, total = windows + count, total + summed
                parts.append(y)
            bands.append(torch.cat(parts, dim=2))
        return torch.cat([total / windows, torch.cat(bands, dim=1).flatten(1, 2)], dim=1)

    def _run_windows(
        self, inputs: BlockInputs, index: int, first: Tensor, cells: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """One block on windows of one shape: cells ``[B, H, W, C]`` again, sum of prefix tokens, number of windows."""
        tower, prefix = inputs.tower, inputs.tower.num_prefix_tokens
        rows, columns = (min(side, self.size) for side in cells.shape[1:3])
        down, across = cells.shape[1] // rows, cells.shape[2] // columns
        x = cells.unflatten(1, (down, rows)).unflatten(3, (across, columns)).transpose(2, 3)
        shape = x.shape  # [B, down, across, rows, columns, C]
        x = x.flatten(3, 4).flatten(1, 2)  # [B, windows, cells, C]
        count = x.shape[1]
        x = torch.cat([first[:, None].expand(-1, count, -1, -1), x], dim=2).flatten(0, 1)
        x = tower.run_block(index, x, tb.rotary_table(tower.trunk, (rows, columns)))
        x = x.unflatten(0, (-1, count))
        y = x[:, :, prefix:].reshape(shape).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return y, x[:, :, :prefix].sum(1), count

    def unread_parts(self, tower: ImageTower) -> list[tb.Part]:
        if self.ordinary_last:
            return []
        index = len(tower.trunk.blocks) - 1
        parts = [p for which in "qk" for p in tb.projection_parts(tower.trunk.blocks[index].attn, which)]
        return parts + tb.rotary_parts(tower.trunk, index)


def _bands(side: int, size: int) -> list[slice]:
    """The part of a side that whole windows cover, and the rest, each if there is any."""
    covered = side - side % size
    return [s for s in (slice(0, covered), slice(covered, side)) if s.stop > s.start]
