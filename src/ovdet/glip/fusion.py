"""Deep fusion: image and text attend to each other, then the text to itself (GLIP, section 3.2).

All levels of the pyramid are one sequence of N cells. Tensors: visual ``[B, N, V]``, text ``[B, T, L]``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip.packed_blocks import CHANGING, prefer

LIMIT = 50_000.0  # logits are kept within it, so that half precision cannot overflow
MASKED = -9e15  # logit of a padding token


def _keep_within(x: Tensor) -> Tensor:
    return x.clamp(-LIMIT, LIMIT)


class BiAttention(nn.Module):
    """Attention in both directions on one matrix of logits.

    Args:
        visual, text: widths V and L.
        width: of queries, keys and values, all heads together.
        heads: number of heads.
        dropout: of both attention matrices while training.
        stable: subtract the largest logit of the whole batch first (an option of the reference that no released model
            uses; it changes nothing but rounding and what the limit cuts off).
    """

    def __init__(
        self, visual: int, text: int, width: int, heads: int = 8, dropout: float = 0.1, stable: bool = False
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"fusion width is {width}: it must be a multiple of the {heads} heads")
        self.heads, self.dropout, self.stable, self.fused = heads, dropout, stable, True
        self.scale = (width // heads) ** -0.5
        self.v_proj, self.l_proj = nn.Linear(visual, width), nn.Linear(text, width)
        self.values_v_proj, self.values_l_proj = nn.Linear(visual, width), nn.Linear(text, width)
        self.out_v_proj, self.out_l_proj = nn.Linear(width, visual), nn.Linear(width, text)
        for linear in self.children():
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, tokens, width / heads]

    def forward(self, visual: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What the image learns from the text ``[B, N, V]``, and the text from the image ``[B, T, L]``.

        Args:
            mask: bool ``[B, T]``, False for padding tokens. They still read the image, but nobody reads them.
        """
        query, key = self._split(self.v_proj(visual) * self.scale), self._split(self.l_proj(text))
        values = self._split(self.values_v_proj(visual)), self._split(self.values_l_proj(text))
        attend = self._plain if self.stable or not self.fused or _limits_act(query, key) else self._fused
        gains = (gain.transpose(1, 2).flatten(2) for gain in attend(query, key, *values, mask))
        return self.out_v_proj(next(gains)), self.out_l_proj(next(gains))

    def _fused(
        self, query: Tensor, key: Tensor, values_v: Tensor, values_l: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Two fused attentions, for logits that no limit touches: the matrix of logits never exists."""
        dropout = self.dropout if self.training else 0.0
        allowed = mask[:, None, None].expand(-1, 1, query.shape[2], -1)
        attention = F.scaled_dot_product_attention
        with prefer(CHANGING):  # cells and tokens are as many as pictures and prompts have them
            return (
                attention(query, key, values_l, attn_mask=allowed, dropout_p=dropout, scale=1.0),
                attention(key, query, values_v, dropout_p=dropout, scale=1.0),
            )

    def _plain(
        self, query: Tensor, key: Tensor, values_v: Tensor, values_l: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attention written out, with all limits; ``[B, heads, N, width / heads]`` and ``[B, heads, T, ...]``."""
        logits = query @ key.transpose(-1, -2)  # [B, heads, N, T]
        if self.stable:
            logits = logits - logits.max()
        logits = _keep_within(logits)
        to_image = logits.float().masked_fill(~mask[:, None, None], MASKED).softmax(-1)
        # Over the cells the logits are taken relative to the largest one, then limited again.
        transposed = logits.transpose(-1, -2).float()  # [B, heads, T, N]
        to_text = _keep_within(transposed - transposed.amax(-1, keepdim=True)).softmax(-1)
        to_image = F.dropout(to_image.to(query.dtype), self.dropout, self.training)
        to_text = F.dropout(to_text.to(query.dtype), self.dropout, self.training)
        return to_image @ values_l, to_text @ values_v


@torch.no_grad()
def _limits_act(query: Tensor, key: Tensor) -> bool:
    """Whether any logit, or difference of two, may reach the limit: their products are bounded by their lengths.

    bfloat16 has no need of the limit: it reaches as far as float32, and numbers of that size are 256 apart in it. There
    the answer is no without a look at the numbers, as each look makes the host wait for its GPU.
    """
    if query.dtype == torch.bfloat16:
        return False
    bound = query.float().norm(dim=-1).max() * key.float().norm(dim=-1).max()
    return not bool(bound < LIMIT / 2)  # also for NaN


class FusionBlock(nn.Module):
    """Layer norms, attention in both directions, and scaled residuals from the NORMALISED inputs.

    Args:
        scale: initial factor of both gains; GLIP starts at one over the number of blocks.

    Others: see :class:`BiAttention`.
    """

    def __init__(
        self, visual: int, text: int, width: int, *, heads: int = 8, scale: float = 1 / 6, dropout: float = 0.1,
        stable: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm_v, self.norm_l = nn.LayerNorm(visual), nn.LayerNorm(text)
        self.attn = BiAttention(visual, text, width, heads, dropout, stable)
        self.gamma_v = nn.Parameter(torch.full((visual,), scale))
        self.gamma_l = nn.Parameter(torch.full((text,), scale))

    def forward(self, visual: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Visual ``[B, N, V]`` and text ``[B, T, L]`` that know of each other; ``mask`` bool ``[B, T]``."""
        visual, text = self.norm_v(visual), self.norm_l(text)
        image_gain, text_gain = self.attn(visual, text, mask)
        return visual + self.gamma_v * image_gain, text + self.gamma_l * text_gain


class _SelfAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))


class _Dense(nn.Module):
    """A projection, and where it closes a residual branch, the norm after it."""

    def __init__(self, inputs: int, outputs: int, norm: bool) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)
        if norm:
            self.LayerNorm = nn.LayerNorm(outputs, eps=1e-12)


class TextLayer(nn.Module):
    """One layer of BERT (Devlin et al. 2019), with BERT's parameter names and limited numbers.

    Post-norm; GELU; logits limited before the mask, and the results of every branch as well.

    Args:
        width, heads, hidden: size of the layer.
        dropout: on attention and on both branches while training.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.1) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"text width is {width}: it must be a multiple of the {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.attention = nn.ModuleDict({"self": _SelfAttention(width), "output": _Dense(width, width, norm=True)})
        self.intermediate = _Dense(width, hidden, norm=False)
        self.output = _Dense(hidden, width, norm=True)
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """Text ``[B, T, L]`` to the same shape; ``mask`` bool ``[B, T]``, False for padding."""
        projections = (self.attention["self"].query, self.attention["self"].key, self.attention["self"].value)
        q, k, v = (p(text).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projections)
        logits = _keep_within(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).float()
        weights = (logits + (~mask[:, None, None]) * -10_000.0).softmax(-1).to(v.dtype)
        gain = (self._drop(weights) @ v).transpose(1, 2).flatten(2)
        closing = self.attention["output"]
        text = _keep_within(closing.LayerNorm(self._drop(closing.dense(gain)) + text))
        hidden = _keep_within(F.gelu(_keep_within(self.intermediate.dense(text))))
        return _keep_within(self.output.LayerNorm(self._drop(self.output.dense(hidden)) + text))
