"""Readings that add up the values of several layers (DenseRC, CVPR 2026)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import timm_blocks as tb
from .base import BlockInputs, Readout

if TYPE_CHECKING:
    from ..image_tower import ImageTower


class MultiValue(Readout):
    """Sum of the values of the last layers, each through its own inner norm and output projection.

    No mixing of cells, no residual, no MLP; the ordinary blocks run as usual to make the inputs of the layers.

    Args:
        tower: image tower.
        layers: how many, counted from the last.
        normalized: unit length per cell; None: yes.
    """

    reads_prefix = False
    tokenwise = True
    family = "multi-v"

    def __init__(self, tower: ImageTower, *, layers: int = 3, normalized: bool | None = None) -> None:
        super().__init__()
        depth = len(tower.trunk.blocks)
        if int(layers) != layers or not 1 <= layers <= depth:
            raise ValueError(f"the reading {self.family} of {layers:g} layers: the trunk has 1 to {depth}")
        self.layers = int(layers)
        self.normalized = normalized is None or bool(normalized)
        self.name = f"{self.family}:{self.layers}"

    def blocks(self, tower: ImageTower) -> tuple[int, ...]:
        depth = len(tower.trunk.blocks)
        return tuple(range(depth - self.layers, depth))

    def tokens(self, inputs: BlockInputs) -> Tensor:
        tower = inputs.tower
        layers = [inputs.run(self.layer, tower.trunk.blocks[i], inputs.cells[i]) for i in self.blocks(tower)]
        return sum(layers[1:], layers[0])

    def layer(self, block: nn.Module, x: Tensor) -> Tensor:
        """One layer's summand ``[B, N, W]``."""
        y = tb.attention_input(block, x)
        return tb.attention_branch(block, tb.finish_attention(block.attn, self.values(block.attn, y), y))

    def values(self, attn: nn.Module, y: Tensor) -> Tensor:
        """Values ``[B, N, A]`` of the tokens that the attention sees."""
        return tb.project(attn, y, "v")

    def unread_parts(self, tower: ImageTower) -> list[tb.Part]:
        index = len(tower.trunk.blocks) - 1
        block = tower.trunk.blocks[index]
        parts = [p for which in "qk" for p in tb.projection_parts(block.attn, which)]
        return parts + tb.rotary_parts(tower.trunk, index) + tb.mlp_parts(block)


class GatedValue(MultiValue):
    """:class:`MultiValue` with a gate per token and head, sigmoid(W_H y + b_H), shared by all layers.

    W_H and b_H start at 0: the gates are 1/2 everywhere, and the final norm cancels the common factor, so training
    begins at the ungated sum. The gate is part of the model: it is saved with the weights.

    Attributes:
        gate: W_H ``[heads, W]`` and b_H ``[heads]``.
    """

    family = "gated"

    def __init__(self, tower: ImageTower, *, layers: int = 3, normalized: bool | None = None) -> None:
        super().__init__(tower, layers=layers, normalized=normalized)
        weight = next(tower.parameters())
        heads = tower.trunk.blocks[-1].attn.num_heads
        self.gate = nn.Linear(tower.width, heads, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def values(self, attn: nn.Module, y: Tensor) -> Tensor:
        v = super().values(attn, y).unflatten(-1, (attn.num_heads, -1))  # [B, N, heads, d]
        return (v * torch.sigmoid(self.gate(y)).unsqueeze(-1)).flatten(2)
