"""What is known of timm's insides, in one place: attention modules, blocks, rotary tables, attention pooling.

Its MLPs are known in :mod:`open_clip.mlp_widths` alone.

A dense reading enters a trunk where timm has no door, so parts of its forward pass are written out here. They hold for
timm 1.0.21 and later; ``tests/open_clip/test_supported_versions.py`` runs the oldest and the newest release.

Three attention modules are known: ``Attention`` (one fused projection), ``EvaAttention`` (fused with biases apart, or
split) and ``AttentionRope`` (fused or split, grouped keys and values). Releases before 1.0.28 have no gate, before
1.0.20 no other rotary layout than the interleaved one, and before 1.0.31 a cast of the trunk also rounds the
frequencies of its rotary table (:func:`rotary_in_float32`).

Shapes: B images, N tokens, C token width, A = heads * d attention width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionPoolLatent, AttentionRope, DropPath, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

#: Trunk families that :class:`open_clip.ImageTower` reads.
TRUNKS = (Eva, VisionTransformer)
_BLOCKS = (Block, EvaBlock, EvaBlockPostNorm)
_ATTENTIONS = (Attention, EvaAttention, AttentionRope)


class Part(NamedTuple):
    """A parameter, or a part of it: ``parameter[index]``, all of it when ``index`` is empty."""

    parameter: nn.Parameter
    index: tuple[slice, ...] = ()


def _whole(*modules: nn.Module | nn.Parameter | None) -> list[Part]:
    parts = []
    for module in modules:
        if isinstance(module, nn.Parameter):
            parts.append(Part(module))
        elif module is not None:
            parts += [Part(p) for p in module.parameters()]
    return parts


# -- trunks -----------------------------------------------------------------------------------------------------------


def is_eva(trunk: nn.Module) -> bool:
    """Whether a trunk is of timm's EVA family (EVA-01, EVA-02, PE, DINOv3)."""
    return isinstance(trunk, Eva)


def check_dense(trunk: nn.Module) -> None:
    """TypeError for a trunk whose blocks, attention or pooling no dense reading here knows."""
    for block in trunk.blocks:
        if not isinstance(block, _BLOCKS):
            kind = type(block).__name__
            raise TypeError(f"no dense reading for a block of type {kind}; use an Eva or plain ViT trunk")
        if type(block.attn) not in _ATTENTIONS:
            kind = type(block.attn).__name__
            raise TypeError(f"no dense reading for an attention of type {kind}; use an Eva or plain ViT trunk")
    pool = getattr(trunk, "attn_pool", None)
    if pool is not None and not isinstance(pool, AttentionPoolLatent):
        raise TypeError(f"no dense reading for a pooling of type {type(pool).__name__}: use a class token or MAP head")


def trunk_facts(trunk: nn.Module) -> dict[str, Any]:
    """What of a trunk changes its outputs and has neither weights nor a module of its own, as json has it; the same in
    every release."""
    facts: dict[str, Any] = {
        "family": "eva" if is_eva(trunk) else "vit",
        "pool": trunk.global_pool,
        "pool_prefix": bool(getattr(trunk, "pool_include_prefix", False)),
        "prefix": [trunk.num_prefix_tokens, bool(trunk.no_embed_class)],
        "blocks": [type(block).__name__ for block in trunk.blocks],
    }
    rope = getattr(trunk, "rope", None)
    if rope is not None:
        # Later releases have more of these; what is left out here is at its default, as it was before.
        known = {
            "temperature": None, "in_pixels": False, "max_res": 224, "linear_bands": False, "ref_feat_shape": None,
            "grid_offset": 0.0, "grid_indexing": None, "normalize_coords": "separate", "min_period": None,
            "max_period": None,
        }  # fmt: skip
        values = {n: getattr(rope, n, default) for n, default in known.items()}
        values = {n: list(v) if isinstance(v, (tuple, list)) else v for n, v in values.items()}
        facts["rotary"] = [type(rope).__name__, {n: v for n, v in values.items() if v != known[n]}]
    return facts


# -- rotary tables ----------------------------------------------------------------------------------------------------


def rotary_table(trunk: nn.Module, grid: tuple[int, int]) -> Tensor | None:
    """Rotary table of a grid of cells (h, w): sines and cosines ``[h*w, 2 d]``, or one ``[heads, h*w, 2 d]`` per block
    (``rope_mixed``); None for a trunk without."""
    rope = getattr(trunk, "rope", None)
    if rope is None:
        return None
    if not getattr(trunk, "rope_mixed", False):
        return rope.get_embed(shape=grid)
    # Learned frequencies meet positions in a matrix product, which autocast would round before release 1.0.31.
    with torch.autocast(rope.freqs.device.type, enabled=False):
        return rope.get_embed(shape=grid)


def block_rotary(trunk: nn.Module, table: Tensor | None, index: int) -> Tensor | None:
    """The part of :func:`rotary_table` that block ``index`` uses."""
    return table[index] if table is not None and getattr(trunk, "rope_mixed", False) else table


@contextmanager
def rotary_in_float32(trunk: nn.Module) -> Iterator[None]:
    """While a trunk is cast within, the frequencies of its rotary table keep float32.

    Angles are frequencies times positions: bfloat16 frequencies move the table by up to 0.003 at 14 cells, and by more
    at larger grids. Queries and keys are turned in float32 and cast back, in every release.
    """
    rope = getattr(trunk, "rope", None)
    before = {} if rope is None else {n: b for n, b in rope.named_buffers() if _is_wide(b)}
    yield
    for name, buffer in before.items():
        now = rope.get_buffer(name)
        if now.is_floating_point() and not _is_wide(now):
            rope.register_buffer(name, buffer.to(now.device), persistent=False)


def _is_wide(buffer: Tensor) -> bool:
    return buffer.is_floating_point() and torch.finfo(buffer.dtype).bits >= 32


def rotate(attn: nn.Module, x: Tensor, table: Tensor, prefix: int) -> Tensor:
    """Turn queries or keys ``[B, heads, N, d]`` by their cell's position; the first ``prefix`` tokens have none."""
    half = {"half": True} if getattr(attn, "rotate_half", False) else {}
    return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], table, **half)], dim=2)


# -- attention --------------------------------------------------------------------------------------------------------


def project(attn: nn.Module, x: Tensor, which: str) -> Tensor:
    """Projection ``"q"``, ``"k"`` or ``"v"`` of tokens ``[B, N, C]``: ``[B, N, A]``, heads side by side.

    With grouped queries every key and value head is repeated for the query heads that it serves.
    """
    if getattr(attn, "qkv", None) is None:
        y = getattr(attn, f"{which}_proj")(x)
        width = attn.proj.in_features
        if y.shape[-1] != width:
            size = width // attn.num_heads
            y = y.unflatten(-1, (-1, size)).repeat_interleave(width // y.shape[-1], dim=-2).flatten(-2)
        return y
    bias = getattr(attn, f"{which}_bias", None)  # EVA-01 keeps the biases apart from the fused weight
    if not _is_plain(attn.qkv):
        y = attn.qkv(x).chunk(3, dim=-1)["qkv".index(which)]
        return y if bias is None else y + bias
    rows = _fused_rows(attn, which)
    if bias is None and attn.qkv.bias is not None:
        bias = attn.qkv.bias[rows]
    return F.linear(x, attn.qkv.weight[rows], bias)


def _is_plain(linear: nn.Module) -> bool:
    """Whether rows of a layer's weight say what it does: no adapter (LoRA), parametrization, quantization or hook."""
    return type(linear) is nn.Linear and not is_watched(linear)


def is_watched(module: nn.Module) -> bool:
    """Whether a hook waits for a module, or for a part of it, to be called: then it may not be spelt out instead."""
    return any([bool(m._forward_hooks or m._forward_pre_hooks) for m in module.modules()])


def _fused_rows(attn: nn.Module, which: str) -> slice:
    width = attn.qkv.weight.shape[0] // 3
    start = "qkv".index(which) * width
    return slice(start, start + width)


def split_heads(attn: nn.Module, x: Tensor) -> Tensor:
    """``[B, N, A] -> [B, heads, N, d]``."""
    return x.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)


def project_heads(attn: nn.Module, x: Tensor, which: str, table: Tensor | None = None, prefix: int = 0) -> Tensor:
    """:func:`project`, split into heads, with the norm of queries or keys, and turned when a table is given."""
    y = split_heads(attn, project(attn, x, which))
    if which != "v":
        y = (attn.q_norm if which == "q" else attn.k_norm)(y)
        if table is not None:
            y = rotate(attn, y, table, prefix).type_as(y)
    return y


def finish_attention(attn: nn.Module, mixed: Tensor, x: Tensor) -> Tensor:
    """What follows the mixing of values: inner norm, gate, output projection.

    Args:
        mixed: mixed values ``[B, N, A]``.
        x: the attention's input ``[B, N, C]``, which opens the gate.
    """
    y = attn.norm(mixed)
    gate = getattr(attn, "gate", None)
    if gate is not None:
        y = y * gate(x).sigmoid()
    return attn.proj(y)


def has_gate(attn: nn.Module) -> bool:
    """Whether an attention module opens its output by a gate."""
    return getattr(attn, "gate", None) is not None


def value_attention(attn: nn.Module, x: Tensor) -> Tensor:
    """What an attention module returns when every token attends to itself only: value, inner norm, output projection.

    ``x`` is ``[B, N, C]``; so is the result. Equal to running the module on each token as a sequence of its own.
    """
    return finish_attention(attn, project(attn, x, "v"), x)


def projection_parts(attn: nn.Module, which: str) -> list[Part]:
    """The parameters that a projection consists of, rows of a fused one included, with its norm."""
    norm = {"q": attn.q_norm, "k": attn.k_norm, "v": None}[which]
    if getattr(attn, "qkv", None) is None:
        return _whole(getattr(attn, f"{which}_proj"), norm)
    if not _is_plain(attn.qkv):
        return _whole(norm)  # the rest is read whole, for the values
    rows = (_fused_rows(attn, which),)
    parts = [Part(attn.qkv.weight, rows)]
    bias = getattr(attn, f"{which}_bias", None)
    if attn.qkv.bias is not None:
        parts.append(Part(attn.qkv.bias, rows))
    return parts + _whole(bias if isinstance(bias, nn.Parameter) else None, norm)


def rotary_parts(trunk: nn.Module, index: int) -> list[Part]:
    """The learned rotary frequencies of block ``index``; nothing where they are not learned."""
    if not getattr(trunk, "rope_mixed", False):
        return []
    return [Part(trunk.rope.freqs, (slice(None), slice(index, index + 1)))]  # [2, depth, heads, d / 2]


# -- blocks -----------------------------------------------------------------------------------------------------------


def attention_input(block: nn.Module, x: Tensor) -> Tensor:
    """What a block's attention sees of the tokens ``[B, N, C]`` that enter the block."""
    return x if isinstance(block, EvaBlockPostNorm) else block.norm1(x)


def attention_branch(block: nn.Module, y: Tensor) -> Tensor:
    """What a block adds to its tokens for the attention's output ``y``: norm (post-norm) or layer scale, if any."""
    if isinstance(block, EvaBlockPostNorm):
        return block.norm1(y)
    if isinstance(block, EvaBlock):
        return y if block.gamma_1 is None else block.gamma_1 * y
    return block.ls1(y)


def mlp_branch(block: nn.Module, x: Tensor) -> Tensor:
    """What a block adds to its tokens for the MLP."""
    if isinstance(block, EvaBlockPostNorm):
        return block.norm2(block.mlp(x))
    y = block.mlp(block.norm2(x))
    if isinstance(block, EvaBlock):
        return y if block.gamma_2 is None else block.gamma_2 * y
    return block.ls2(y)


def finish_block(block: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A block's output for tokens ``x`` and the attention's output ``y``, both ``[B, N, C]``: residuals and MLP."""
    x = x + attention_branch(block, y)
    return x + mlp_branch(block, x)


def mlp_parts(block: nn.Module) -> list[Part]:
    """The parameters of a block that come after its attention branch."""
    return _whole(block.norm2, block.mlp, getattr(block, "ls2", None), getattr(block, "gamma_2", None))


def value_block(block: nn.Module, x: Tensor) -> Tensor:
    """A transformer block without token mixing: its attention is replaced by :func:`value_attention`.

    Both residuals and the MLP are kept (MaskCLIP, ECCV 2022; CLIPSelf, section 3.1). Shapes ``[B, N, C]``.
    """
    return finish_block(block, x, value_attention(block.attn, attention_input(block, x)))


def _prefix_attention(attn: nn.Module, x: Tensor, table: Tensor | None, count: int) -> Tensor:
    """What an attention module returns for the first ``count`` tokens, which attend to all: ``[B, count, C]``.

    ``x`` is ``[B, N, C]``; the first ``count`` tokens are the prefix, which the rotary table leaves alone.
    """
    if attn.qkv is None:
        q, k, v = attn.q_proj(x[:, :count]), attn.k_proj(x), attn.v_proj(x)
    else:
        weight, bias = attn.qkv.weight, attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        width = weight.shape[0] // 3
        q = F.linear(x[:, :count], weight[:width], None if bias is None else bias[:width])
        k, v = F.linear(x, weight[width:], None if bias is None else bias[width:]).chunk(2, dim=-1)
    q, k, v = (split_heads(attn, t) for t in (q, k, v))
    q, k = attn.q_norm(q), attn.k_norm(k)
    if table is not None:
        q, k = q.type_as(v), rotate(attn, k, table, count).type_as(v)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return finish_attention(attn, y, x[:, :count])


def prefix_block(block: nn.Module, x: Tensor, table: Tensor | None, count: int) -> Tensor:
    """A transformer block for its first ``count`` tokens only: ``[B, N, C] -> [B, count, C]``.

    For the last block of a global reading, which is read at the class token: most of an ordinary block's work there is
    for tokens that nobody looks at, in a ViT-B a fourteenth of the whole.
    """
    y = _prefix_attention(block.attn, attention_input(block, x), table, count)
    return finish_block(block, x[:, :count], y)


def has_prefix_reading(block: nn.Module) -> bool:
    """Whether :func:`prefix_block` knows a block: a plain, fused attention, nothing dropped at random, no hooks."""
    known = isinstance(block, _BLOCKS) and type(block.attn) in (Attention, EvaAttention)
    known = known and (block.attn.qkv is None or _is_plain(block.attn.qkv)) and not is_watched(block)
    known = known and block.attn.fused_attn  # switched off, all attention is to be spelt out by the trunk itself
    drops = [m for m in block.modules() if isinstance(m, (nn.Dropout, DropPath))]
    return known and all(getattr(m, "p", getattr(m, "drop_prob", 0)) == 0 for m in drops)


# -- attention pooling ------------------------------------------------------------------------------------------------


def pool_each_token(pool: nn.Module, x: Tensor) -> Tensor:
    """Attention pooling (SigLIP's MAP head) over each token alone: ``[B, N, C] -> [B, N, C]``.

    A softmax over one key is 1, so the pooled value is the token's own value projection. This is for a model that
    pools by attention what the value path of the last block is for one that pools into a class token.
    """
    width = pool.kv.weight.shape[0] // 2
    bias = None if pool.kv.bias is None else pool.kv.bias[width:]
    y = pool.proj(F.linear(x, pool.kv.weight[width:], bias))
    return y if pool.mlp is None else y + pool.mlp(pool.norm(y))


def pool_unread(pool: nn.Module) -> list[Part]:
    """The parameters that :func:`pool_each_token` does not read: latent, query, keys and a table of positions."""
    keys = (slice(0, pool.kv.weight.shape[0] // 2),)
    parts = _whole(pool.latent, pool.q, pool.q_norm, pool.k_norm, pool.pos_embed)
    parts.append(Part(pool.kv.weight, keys))
    return parts if pool.kv.bias is None else [*parts, Part(pool.kv.bias, keys)]
