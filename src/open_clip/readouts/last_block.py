"""Readings that replace the attention of the last block, and that of foundation models, which replaces nothing.

All blocks but the last run as usual. With x the tokens entering the last block, y = norm1(x) and q, k, v of y per head,
a reading is a mixing of values and what stands around it::

    mixed = out_proj(inner_norm(concat over heads of M v))
    full:  x + mixed, then + MLP(norm2(.))        bare:  mixed alone, neither residual nor MLP

M is the softmax of similarities: of q and k (the ordinary attention), of q, k or v with themselves, a sum of two such,
or the identity (the value path). s is 1 / sqrt(d).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import timm_blocks as tb
from .base import BlockInputs, Readout

if TYPE_CHECKING:
    from ..image_tower import ImageTower

GAUSSIAN_STD = 5.0  # of NACLIP, in cells


@dataclass(frozen=True)
class Mixing:
    """How the last block mixes values.

    Attributes:
        pairs: similarities, such as ``"qk"`` or ``"kk"``; one softmax each, added up. Without any every token keeps
            its value.
        full: residual and MLP are kept.
        merged: one softmax of the mean of the similarities instead of a sum of softmaxes.
        gaussian: NACLIP's neighbourhood is added to the similarities.
        declip: on EVA without scale, rotation and unit length, as DeCLIP's weights were trained.
    """

    pairs: tuple[str, ...] = ()
    full: bool = False
    merged: bool = False
    gaussian: bool = False
    declip: bool = False

    def reads(self, which: str) -> bool:
        """Whether queries (``"q"``) or keys (``"k"``) take part."""
        return any(which in pair for pair in self.pairs)


MIXINGS = {
    "value": Mixing(full=True),
    "value_bare": Mixing(),
    "vanilla": Mixing(("qk",), full=True),
    "vanilla_bare": Mixing(("qk",)),
    "sclip": Mixing(("qq", "kk"), full=True),
    "sclip_bare": Mixing(("qq", "kk")),
    "clearclip": Mixing(("qq",)),
    "clearclip_full": Mixing(("qq",), full=True),
    "kk_bare": Mixing(("kk",)),
    "kk_full": Mixing(("kk",), full=True),
    "naclip": Mixing(("kk",), gaussian=True),
    "naclip_full": Mixing(("kk",), full=True, gaussian=True),
    "qq": Mixing(("qq",), declip=True),
    "kk": Mixing(("kk",), declip=True),
    "vv": Mixing(("vv",), declip=True),
    "csa": Mixing(("qq", "kk"), declip=True),
    "all": Mixing(("qq", "kk", "vv"), merged=True, declip=True),
}


def gaussian_neighbourhood(grid: tuple[int, int], std: float, prefix: int, like: Tensor) -> Tensor:
    """NACLIP's G ``[prefix + h*w, prefix + h*w]``: exp(-distance^2 / (2 std^2)) in cells; 0 for prefix tokens.

    Made anew at each call: it costs one product per entry, and a kept one would go stale with type, device or std.
    """
    rows, columns = (
        torch.exp(-((n[:, None] - n) ** 2) / (2 * std**2))
        for n in (torch.arange(side, device=like.device, dtype=torch.float32) for side in grid)
    )
    cells = (rows[:, None, :, None] * columns[None, :, None, :]).flatten(2).flatten(0, 1)
    return F.pad(cells, (prefix, 0, prefix, 0)).to(like.dtype)


class LastBlock(Readout):
    """A reading of the last block by name, see :data:`MIXINGS`.

    ``value`` is MaskCLIP's release and CLIPSelf's dense embedding, ``vanilla`` the ordinary last block; ``sclip``
    (SCLIP), ``clearclip`` (ClearCLIP) and ``naclip`` (NACLIP) need no training; ``qq``, ``kk``, ``vv``, ``csa`` and
    ``all`` are DeCLIP's content maps. Prefix tokens take part as queries, keys and values, and are dropped afterwards.

    Of a trunk that pools by attention (SigLIP) the last block is an ordinary one for ``value``, as the pooling is in
    the head, which then pools each token alone; the other readings change the last block there too.

    Args:
        tower: image tower.
        form: key of :data:`MIXINGS`.
        normalized: unit length per cell; None: yes, but for DeCLIP's maps of EVA.
        scaled: similarities times s; None: yes, but for DeCLIP's maps of EVA.
        rotated: queries and keys turned by position where the trunk does; None: yes, but for DeCLIP's maps of EVA.
        std: of NACLIP's Gaussian, in cells; None: 5.
    """

    def __init__(
        self,
        tower: ImageTower,
        form: str,
        *,
        normalized: bool | None = None,
        scaled: bool | None = None,
        rotated: bool | None = None,
        std: float | None = None,
    ) -> None:
        super().__init__()
        self.form, self.mixing = form, MIXINGS[form]
        if not self.mixing.pairs and (scaled, rotated) != (None, None):
            raise ValueError(f"the reading {form} compares no tokens: leave out scaled and rotated")
        published = not (self.mixing.declip and tb.is_eva(tower.trunk))
        self.normalized, self.scaled, self.rotated = (
            published if given is None else bool(given) for given in (normalized, scaled, rotated)
        )
        if std is not None and not self.mixing.gaussian:
            raise ValueError(f"the reading {form} has no Gaussian: leave out std")
        self.std = GAUSSIAN_STD if std is None else float(std)
        if not 0 < self.std < float("inf"):
            raise ValueError(f"the std of {form} is {std}: give the width of its Gaussian in cells, above 0")
        self.name = f"{form}:{self.std!r}" if self.mixing.gaussian and self.std != GAUSSIAN_STD else form
        # With an attention-pooling head the pooling is in the head, and the last block of the value path is ordinary.
        ordinary = Mixing(("qk",), full=True)
        if self.mixing == MIXINGS["value"] and tower.pools_by_attention:
            self.mixing = ordinary
        self.ordinary = self.mixing == ordinary and self.scaled and self.rotated
        self.reads_prefix = bool(self.mixing.pairs)
        self.tokenwise = not self.reads_prefix

    def options(self) -> dict[str, Any]:
        options = super().options()
        if MIXINGS[self.form].pairs:
            options |= {"scaled": self.scaled, "rotated": self.rotated}
        return options

    def tokens(self, inputs: BlockInputs) -> Tensor:
        tower, index = inputs.tower, inputs.last
        block, prefix = tower.trunk.blocks[index], tower.num_prefix_tokens
        if not self.mixing.pairs:
            return inputs.run(tb.value_block if self.mixing.full else _bare_value, block, inputs.cells[index])
        x = inputs.tokens[index]
        if self.ordinary:
            return tower.run_block(index, x, inputs.table)[:, prefix:]
        return inputs.run(self._mixed, block, x, inputs.rotary(index), prefix, inputs.grid)

    def _mixed(self, block: nn.Module, x: Tensor, table: Tensor | None, prefix: int, grid: tuple[int, int]) -> Tensor:
        y = tb.attention_input(block, x)
        mixed = self._attend(block.attn, y, table, prefix, grid).transpose(1, 2).flatten(2)  # [B, 1 + N, A]
        mixed, y, x = mixed[:, prefix:], y[:, prefix:], x[:, prefix:]
        output = tb.finish_attention(block.attn, mixed, y)
        return tb.finish_block(block, x, output) if self.mixing.full else tb.attention_branch(block, output)

    def _attend(self, attn: nn.Module, y: Tensor, table: Tensor | None, prefix: int, grid: tuple[int, int]) -> Tensor:
        """Mixed values ``[B, heads, 1 + N, d]``."""
        table = table if self.rotated else None
        used = {which for pair in self.mixing.pairs for which in pair} | {"v"}
        heads = {which: tb.project_heads(attn, y, which, table, prefix) for which in sorted(used)}
        v = heads["v"]
        scale = v.shape[-1] ** -0.5 if self.scaled else 1.0
        neighbours = gaussian_neighbourhood(grid, self.std, prefix, v) if self.mixing.gaussian else None
        if self.mixing.merged:
            # The mean of several similarities is one similarity of vectors put end to end.
            both = [torch.cat([heads[pair[i]] for pair in self.mixing.pairs], dim=-1) for i in (0, 1)]
            return F.scaled_dot_product_attention(*both, v, neighbours, scale=scale / len(self.mixing.pairs))
        mixed = [
            F.scaled_dot_product_attention(heads[a], heads[b], v, neighbours, scale=scale) for a, b in self.mixing.pairs
        ]
        return sum(mixed[1:], mixed[0])

    def unread_parts(self, tower: ImageTower) -> list[tb.Part]:
        index = len(tower.trunk.blocks) - 1
        block, mixing = tower.trunk.blocks[index], self.mixing
        parts = [p for which in "qk" if not mixing.reads(which) for p in tb.projection_parts(block.attn, which)]
        if not (mixing.reads("q") or mixing.reads("k")) or not self.rotated:
            parts += tb.rotary_parts(tower.trunk, index)
        return parts if mixing.full else parts + tb.mlp_parts(block)


def _bare_value(block: nn.Module, x: Tensor) -> Tensor:
    return tb.attention_branch(block, tb.value_attention(block.attn, tb.attention_input(block, x)))


class Tokens(Readout):
    """Ordinary blocks and the final norm, no projection: what foundation models such as DINOv2 are read by.

    Args:
        tower: image tower.
        normalized: unit length per cell; None: no.
    """

    projected = False
    name = "tokens"

    def __init__(self, tower: ImageTower, *, normalized: bool | None = None) -> None:
        super().__init__()
        self.normalized = bool(normalized)

    def tokens(self, inputs: BlockInputs) -> Tensor:
        x = inputs.tower.run_block(inputs.last, inputs.tokens[inputs.last], inputs.table)
        return x[:, inputs.tower.num_prefix_tokens :]

    def unread_parts(self, tower: ImageTower) -> list[tb.Part]:
        return []


class ProxyCLIP(Readout):
    """Values mixed by the similarities of another model's map, bare (ProxyCLIP, ECCV 2024).

    With S the cosines of all pairs of its cells, M = softmax over keys of (S - beta mean(S)) gamma where that is not
    negative; the same for all heads, without prefix tokens. Values are resized bilinearly to the other model's grid,
    on which the result lives. Unlike in the release, the mean is over each image alone, and a cell that is like no
    other keeps itself.

    Args:
        tower: image tower.
        beta, gamma: of the formula.
        normalized: unit length per cell; None: yes.
        external: the other model's map ``[B, C, h', w']`` of the images to be read; see :meth:`bound`.
    """

    name = "proxyclip"
    reads_prefix = False
    own_grid = True

    def __init__(
        self,
        tower: ImageTower,
        *,
        beta: float = 1.2,
        gamma: float = 3.0,
        normalized: bool | None = None,
        external: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.beta, self.gamma = float(beta), float(gamma)
        self.normalized = normalized is None or bool(normalized)
        self.external = external
        if tb.has_gate(tower.trunk.blocks[-1].attn):
            raise ValueError("the reading proxyclip has no form for gated attention: use another one")

    def bound(self, external: Tensor) -> ProxyCLIP:
        """The same reading for the images of another model's map ``[B, C, h', w']``, as ``readout=`` takes it."""
        other = copy.copy(self)
        other.external = external
        return other

    def options(self) -> dict[str, Any]:
        return {**super().options(), "beta": self.beta, "gamma": self.gamma}

    def grid(self, inputs: BlockInputs) -> tuple[int, int]:
        return tuple(self._map_of(inputs).shape[-2:])

    def _map_of(self, inputs: BlockInputs) -> Tensor:
        count = inputs.tokens[inputs.last].shape[0]
        if self.external is None:
            raise ValueError(
                "the reading proxyclip mixes by another model's map: build it with external=map, or read bound(map)"
            )
        if self.external.dim() != 4 or self.external.shape[0] != count:
            raise ValueError(
                f"proxyclip was given a map of {tuple(self.external.shape)} for {count} images: give [B, C, h, w]"
            )
        return self.external

    def tokens(self, inputs: BlockInputs) -> Tensor:
        block = inputs.tower.trunk.blocks[inputs.last]
        return inputs.run(self._mixed, block, inputs.cells[inputs.last], inputs.grid, self._map_of(inputs))

    def _mixed(self, block: nn.Module, x: Tensor, grid: tuple[int, int], external: Tensor) -> Tensor:
        v = tb.project(block.attn, tb.attention_input(block, x), "v").transpose(1, 2).unflatten(2, grid)
        v = F.interpolate(v, size=tuple(external.shape[-2:]), mode="bilinear", align_corners=False)
        mixed = self.mixing_matrix(external).to(v.dtype) @ v.flatten(2).transpose(1, 2)  # [B, h'*w', A]
        return tb.attention_branch(block, tb.finish_attention(block.attn, mixed, mixed))

    def mixing_matrix(self, external: Tensor) -> Tensor:
        """M ``[B, h'*w', h'*w']``, float32 at least, rows of sum 1."""
        x = external.flatten(2).transpose(1, 2)
        x = F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            similarity = x @ x.transpose(1, 2)
            logits = (similarity - self.beta * similarity.mean(dim=(1, 2), keepdim=True)) * self.gamma
        alone = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
        return logits.masked_fill((logits < 0) & ~alone, float("-inf")).softmax(dim=-1)

    def unread_parts(self, tower: ImageTower) -> list[tb.Part]:
        index = len(tower.trunk.blocks) - 1
        block = tower.trunk.blocks[index]
        parts = [p for which in "qk" for p in tb.projection_parts(block.attn, which)]
        return parts + tb.rotary_parts(tower.trunk, index) + tb.mlp_parts(block)
