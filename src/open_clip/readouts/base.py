"""What a dense reading is: the blocks it enters, the map it makes of them, what it leaves unread, how it is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import timm_blocks as tb
from ..padding import Canvas

if TYPE_CHECKING:
    from ..image_tower import ImageTower


@dataclass(frozen=True)
class BlockInputs:
    """One pass of a tower: the tokens that enter the blocks which were asked for.

    Attributes:
        tower: the image tower that ran.
        tokens: by block index, ``[B, prefix + h*w, W]``.
        cells: the same without prefix tokens, ``[B, h*w, W]``.
        table: rotary table of the grid, see :func:`open_clip.timm_blocks.rotary_table`.
        grid: cells (h, w); where padding was left out and all images are of one size, those of an image.
        canvas: where the images lie, if padding was left out. Of different sizes, they are packed: ``[1, T, W]``.
    """

    tower: ImageTower
    tokens: Mapping[int, Tensor]
    cells: Mapping[int, Tensor]
    table: Tensor | None
    grid: tuple[int, int]
    canvas: Canvas | None = None

    @property
    def packed(self) -> bool:
        """Whether images lie end to end."""
        return self.canvas is not None and not self.canvas.uniform

    def images(self) -> list[BlockInputs]:
        """Of packed images, each by itself."""
        prefix, taken = self.tower.num_prefix_tokens, self.canvas.taken
        numbers = [n + prefix for n in self.canvas.numbers]
        tokens = {i: x.split(numbers, dim=1) for i, x in self.tokens.items()}
        cells = {i: self.canvas.split(x) for i, x in self.cells.items()}
        tables = [None] * len(taken) if self.table is None else self.table.split(numbers, dim=-2)
        return [
            BlockInputs(
                self.tower, {i: x[n] for i, x in tokens.items()}, {i: x[n] for i, x in cells.items()},
                None if tables[n] is None else tables[n][..., prefix:, :], taken[n],
            )
            for n in range(len(taken))
        ]  # fmt: skip

    def spread(self, cells: Tensor) -> Tensor:
        """What was made of :attr:`cells`, for all cells of the batch ``[B, h*w, C]``."""
        return cells if self.canvas is None else self.canvas.spread(cells)

    @property
    def last(self) -> int:
        """Index of the last block."""
        return len(self.tower.trunk.blocks) - 1

    def rotary(self, index: int) -> Tensor | None:
        """The part of the rotary table that block ``index`` uses."""
        return tb.block_rotary(self.tower.trunk, self.table, index)

    def projection(self, which: str, index: int = -1, *, through_output: bool = False) -> Tensor:
        """Queries, keys or values of the patches in a block: ``[B, h*w, A]``, heads side by side.

        Neither scaled nor turned by position; queries and keys after their norm where they have one. DeCLIP's context
        loss compares the cosines of these with those of a foundation model.

        Args:
            which: ``"q"``, ``"k"`` or ``"v"``.
            index: block; -1 is the last. Its input must be among :attr:`tokens`.
            through_output: send them through the inner norm and the output projection too, ``[B, h*w, W]``; the keys
                that MaskCLIP smooths with.
        """
        index %= self.last + 1
        if which not in ("q", "k", "v"):
            raise ValueError(f'projection is "{which}": use "q", "k" or "v"')
        if index not in self.tokens:
            raise ValueError(f"this pass did not keep the input of block {index}: ask block_inputs for it")
        block = self.tower.trunk.blocks[index]
        x = tb.attention_input(block, self.cells[index])
        if through_output:
            return self.spread(tb.finish_attention(block.attn, tb.project(block.attn, x, which), x))
        return self.spread(tb.project_heads(block.attn, x, which).transpose(1, 2).flatten(2))

    def run(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """Call a function of tensors, compiled where it is; recomputed in the backward pass when gradient checkpointing
        is on."""
        return self.tower.run(self.tower.faster(function), *args)


class Unread(NamedTuple):
    """What a reading leaves alone: a parameter of the tower, or ``parameter[index]`` of it.

    Attributes:
        name: of the parameter in the tower.
        parameter: itself.
        index: slices of the part; empty for the whole parameter.
    """

    name: str
    parameter: nn.Parameter
    index: tuple[slice, ...] = ()


class Readout(nn.Module):
    """A dense reading of an image tower, built for one by :func:`open_clip.readouts.build_readout`.

    A subclass says which blocks it enters (:meth:`blocks`), makes tokens of what enters them (:meth:`tokens`), and
    lists what it does not read of the blocks that it runs itself (:meth:`unread_parts`). It may own parameters. After
    the tokens come the final norm, a per-token pooling head, the projection and the unit length, as far as the
    reading has them.

    Attributes:
        name: canonical name, which :func:`~open_clip.readouts.build_readout` understands: ``"naclip:1.5"``.
        normalized: whether every cell has unit length, ahead of any pooling over cells.
        projected: whether cells are in the joint space (D) instead of the trunk's (W).
        reads_prefix: whether class token and registers take part in the blocks that the reading runs itself.
        tokenwise: whether :meth:`tokens` treats every cell by itself.
        own_grid: whether the map lives on another grid than the tower's.
    """

    name: str
    normalized = True
    projected = True
    reads_prefix = True
    tokenwise = False
    own_grid = False

    # -- what a reading defines ---------------------------------------------------------------------------------------

    def blocks(self, tower: ImageTower) -> tuple[int, ...]:
        """Blocks whose inputs it asks for, ascending; the ordinary blocks ahead of the last of these run as usual."""
        return (len(tower.trunk.blocks) - 1,)

    def tokens(self, inputs: BlockInputs) -> Tensor:
        """Tokens of the cells ``[B, h*w, W]``, before the final norm."""
        raise NotImplementedError

    def grid(self, inputs: BlockInputs) -> tuple[int, int]:
        """Cells (h, w) of the map; those of the tower unless the reading lives on another grid."""
        return inputs.grid

    def unread_parts(self, tower: ImageTower) -> list[tb.Part]:
        """What is not read of the blocks that the reading runs itself."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Options besides the name that the reading was built with, all of them, as json can write them."""
        return {"normalized": self.normalized}

    # -- what all have in common --------------------------------------------------------------------------------------

    def spec(self) -> dict[str, Any]:
        """Name and options: ``build_readout(tower=tower, **readout.spec())`` is the same reading again.

        What it owns and learned is not in it, but in its state dict.
        """
        return {"name": self.name, **self.options()}

    def width(self, tower: ImageTower) -> int:
        """Channels of the map: D, or W where cells are not projected."""
        return tower.embed_dim if self.projected else tower.width

    def forward(self, inputs: BlockInputs) -> Tensor:
        """Embeddings of the cells ``[B, h*w, D]``."""
        return inputs.spread(self.embed(inputs.tower, self.all_tokens(inputs)))

    def all_tokens(self, inputs: BlockInputs) -> Tensor:
        """:meth:`tokens`, of packed images each by itself; laid out as the inputs' cells."""
        if inputs.canvas is not None and self.own_grid and not inputs.canvas.full:
            raise ValueError(f"the reading {self.name} has no form without padding: use another one")
        if inputs.packed and not self.tokenwise:
            return torch.cat([self.tokens(one) for one in inputs.images()], dim=1)
        return self.tokens(inputs)

    def map(self, inputs: BlockInputs) -> Tensor:
        """Dense map ``[B, D, h, w]``."""
        whole = inputs.canvas is None or self.own_grid
        return self(inputs).transpose(1, 2).unflatten(2, self.grid(inputs) if whole else inputs.canvas.grid)

    def embed(self, tower: ImageTower, x: Tensor) -> Tensor:
        """Final norm, (per-token pooling head,) projection and unit length: ``[B, N, W] -> [B, N, D]``."""
        trunk = tower.trunk
        x = trunk.norm(x)
        if self.projected:
            if tower.pools_by_attention:
                x = tb.pool_each_token(trunk.attn_pool, x)
            x = trunk.head(trunk.fc_norm(x))
        return F.normalize(x, dim=-1) if self.normalized else x

    def unread(self, tower: ImageTower) -> list[Unread]:
        """Every parameter of the tower, or part of one, that this reading never uses: no loss on it can train them.

        Whole ones first. A data-parallel wrapper would wait for those, so they are to be frozen
        (:func:`~open_clip.readouts.freeze_unread`); of the others the rest does train, so the rows are to be held
        (:func:`~open_clip.readouts.hold_unread`).
        """
        trunk = tower.trunk
        tb.check_dense(trunk)
        parts = list(self.unread_parts(tower))
        if max(self.blocks(tower)) == 0 and not self.reads_prefix:
            parts += [tb.Part(t) for t in (trunk.cls_token, trunk.reg_token) if t is not None]
            if trunk.pos_embed is not None and not trunk.no_embed_class and tower.num_prefix_tokens:
                parts.append(tb.Part(trunk.pos_embed, (slice(None), slice(0, tower.num_prefix_tokens))))
        if not self.projected:
            parts += [tb.Part(p) for module in (trunk.fc_norm, trunk.head) for p in module.parameters()]
            if tower.pools_by_attention:
                parts += [tb.Part(p) for p in trunk.attn_pool.parameters()]
        elif tower.pools_by_attention:
            parts += tb.pool_unread(trunk.attn_pool)
        names = {id(p): n for n, p in tower.named_parameters()}
        unread = [Unread(names[id(p.parameter)], p.parameter, p.index) for p in parts]
        return sorted(unread, key=lambda u: (bool(u.index), u.name))

    def extra_repr(self) -> str:
        return json.dumps(self.spec())
