"""The frozen ViT as a detection backbone: three block outputs, the dense reading and the VLM's embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from open_clip import ImageTower


class BackboneMaps(NamedTuple):
    """What one pass of the ViT gives; h = H / patch, w = W / patch."""

    levels: list[Tensor]  # four maps [B, W, h, w]: the taken blocks, then the dense reading of the last block
    dense: Tensor | None  # dense embedding [B, D, h, w], unit length per cell, when asked for


class FrozenViT(nn.Module):
    """An image tower that is never trained: no gradients, no dropout, no activations kept.

    Args:
        vit: image tower; its parameters are frozen in place.
        blocks: three block indices, shallow to deep, whose outputs are taken besides the last block's.
        readout: the dense reading of the last block, by name (:mod:`open_clip.readouts`); None for the model's own.

    Raises:
        ValueError: a block or reading that does not exist, or blocks that do not ascend towards the last one.
    """

    def __init__(self, vit: ImageTower, blocks: Sequence[int], readout: str | None = None) -> None:
        super().__init__()
        last = len(vit.trunk.blocks) - 1
        if len(blocks) != 3 or list(blocks) != sorted(set(blocks)) or blocks[0] < 0 or blocks[-1] >= last:
            raise ValueError(
                f"model.blocks is {list(blocks)}: give three ascending block indices below the last one, {last}"
            )
        vit.resolve_readout(readout)
        self.vit, self.readout = vit.requires_grad_(False).eval(), readout
        self.take = (*blocks, last)

    @property
    def width(self) -> int:
        """Channels W of every level."""
        return self.vit.width

    def train(self, mode: bool = True) -> FrozenViT:
        """Sets this wrapper's flag only: the ViT stays in eval mode (no drop path)."""
        super().train(mode)
        self.vit.eval()
        return self

    @torch.no_grad()
    def forward(
        self, images: Tensor, image_sizes: Sequence[tuple[int, int]] | None = None, *, dense: bool
    ) -> BackboneMaps:
        """One pass over images ``[B, 3, H, W]``, sides multiples of the patch.

        Args:
            image_sizes: (height, width) of the valid area of each image, which is all that a ViT sees that drops
                padding; None for all of it.
            dense: whether the dense embedding is wanted as well (a norm and a projection more, not another pass).
        """
        # The ViT may be stored in half precision: nothing of it is trained.
        images, dtype = images.to(next(self.vit.parameters()).dtype), images.dtype
        tokens, levels = self.vit.dense_tokens(images, take=self.take, readout=self.readout, sizes=image_sizes)
        levels = [level.to(dtype) for level in levels]
        if not dense:
            return BackboneMaps(levels, None)
        embedding = self.vit.project_dense(tokens, readout=self.readout)
        return BackboneMaps(levels, embedding.transpose(1, 2).unflatten(2, levels[-1].shape[-2:]))
