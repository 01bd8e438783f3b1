"""Transformer blocks on packed tokens, and the one block of which not every token is read.

Packed are the tokens of images of different sizes, end to end (:mod:`open_clip.padding`). Norms, linear layers and the
MLP run once over all of them; attention runs image by image, over slices, neighbours of one length together. Parts
before and after the attention are functions of their own, of shapes that differ in one number only, which is what a
compiler wants.

Shapes: B images, T packed tokens, C token width, A = heads * d attention width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import timm_blocks as tb

Wrap = Callable[[Callable], Callable]

#: Kernels for attention whose shapes change from batch to batch, the preferred one first. On recent GPUs PyTorch takes
#: cuDNN, which builds a plan for every new shape and stride; the others have one for all. By name, as towers keep them
#: and PyTorch's own values cannot be pickled.
CHANGING = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")


def drops_at_random(trunk: nn.Module) -> bool:
    """Whether a trunk drops activations or branches in training, which the blocks written out here do not."""
    drops = (m for m in trunk.modules() if isinstance(m, (nn.Dropout, DropPath)))
    return any(getattr(m, "p", getattr(m, "drop_prob", 0)) > 0 for m in drops)


def heads_of(block: nn.Module, x: Tensor, table: Tensor | None, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, heads, N, d]`` of the tokens that enter a block, turned where it has a table."""
    y = tb.attention_input(block, x)
    return tuple(tb.project_heads(block.attn, y, which, table, prefix) for which in "qkv")


def finish(block: nn.Module, x: Tensor, mixed: Tensor) -> Tensor:
    """A block's output for tokens ``x [B, N, C]`` and mixed values ``[B, N, A]``."""
    gate = tb.attention_input(block, x) if tb.has_gate(block.attn) else mixed
    return tb.finish_block(block, x, tb.finish_attention(block.attn, mixed, gate))


def prefer(kernels: Sequence[str]) -> AbstractContextManager:
    """Attention within takes the first of some kernels (names of ``SDPBackend``) that can do it; PyTorch chooses where
    none are given."""
    return sdpa_kernel([getattr(SDPBackend, k) for k in kernels], set_priority=True) if kernels else nullcontext()


def attend(q: Tensor, k: Tensor, v: Tensor, numbers: Sequence[int], kernels: Sequence[str] = ()) -> Tensor:
    """Attention of each image over itself, of packed tokens.

    Args:
        q, k, v: ``[1, heads, T, d]``.
        numbers: tokens of each image.
        kernels: see :func:`prefer`.

    Returns:
        ``[1, T, A]``.
    """
    mixed = []
    with prefer(kernels):
        for start, length, count in runs(numbers):
            part = slice(start, start + length * count)
            own = [t[0, :, part].unflatten(1, (count, length)).transpose(0, 1) for t in (q, k, v)]
            mixed.append(F.scaled_dot_product_attention(*own).transpose(1, 2).flatten(2).flatten(0, 1))
    return torch.cat(mixed)[None]


def packed_block(
    block: nn.Module, x: Tensor, table: Tensor | None, numbers: Sequence[int], wrap: Wrap = lambda f: f,
    kernels: Sequence[str] = (),
) -> Tensor:  # fmt: skip
    """A block on packed tokens ``[1, T, C]``.

    Args:
        table: rotary table of all tokens, see :func:`open_clip.padding.packed_rotary`.
        numbers: tokens of each image.
        wrap: what to call in place of the parts around the attention: the compiled ones.
        kernels: of the attention, see :func:`prefer`.
    """
    q, k, v = wrap(heads_of)(block, x, table, 0)
    return wrap(finish)(block, x, attend(q, k, v, numbers, kernels))


def partial_heads(
    block: nn.Module, x: Tensor, kept: Tensor, table: Tensor | None, kept_table: Tensor | None, prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the tokens ``kept [b, n, C]``, none of them a prefix, and keys and values of all, ``x [B, N, C]``."""
    y, attn = tb.attention_input(block, x), block.attn
    q = tb.project_heads(attn, tb.attention_input(block, kept), "q", kept_table)
    return q, tb.project_heads(attn, y, "k", table, prefix), tb.project_heads(attn, y, "v")


def partial_block(
    block: nn.Module,
    x: Tensor,
    kept: Tensor,
    table: Tensor | None,
    kept_table: Tensor | None,
    prefix: int,
    numbers: Sequence[int],
    wrap: Wrap = lambda f: f,
    kernels: Sequence[str] = (),
) -> Tensor:
    """A block's outputs for some of the cells, which attend to all tokens of their image.

    Args:
        x: all tokens ``[B, N, C]``, ``prefix`` of them ahead of the cells.
        kept: the cells asked for: ``[B, n, C]``, or packed ``[1, T, C]`` where images have different numbers.
        table, kept_table: rotary tables of all cells, and of those asked for.
        numbers: cells asked for, of each image.
        wrap, kernels: see :func:`packed_block`.
    """
    q, k, v = wrap(partial_heads)(block, x, kept, table, kept_table, prefix)
    with prefer(kernels):
        if len(q) == len(k):
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        else:
            images = zip(q.split(list(numbers), dim=2), k.split(1), v.split(1), strict=True)
            parts = [F.scaled_dot_product_attention(*one).transpose(1, 2).flatten(2) for one in images]
            mixed = torch.cat(parts, dim=1)
    return wrap(finish)(block, kept, mixed)


def runs(numbers: Sequence[int]) -> list[tuple[int, int, int]]:
    """Neighbours of one length: (where they begin, their length, how many) in tokens laid end to end."""
    found: list[list[int]] = []
    for start, length in zip(accumulate([0, *numbers]), numbers, strict=False):
        if found and found[-1][1] == length:
            found[-1][2] += 1
        else:
            found.append([start, length, 1])
    return [tuple(run) for run in found]


#: What there is to compile, around the attention of packed and of partly read blocks.
PIECES = (heads_of, finish, partial_heads)
