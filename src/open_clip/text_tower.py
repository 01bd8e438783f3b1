"""Text tower: the transformer of CLIP (causal, end token) and of SigLIP (bidirectional, last token)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .checks import check_texts
from .configs import check_text_cfg
from .upstream_api import taken_blocks


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``, the approximation of GELU that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class _Attention(nn.MultiheadAttention):
    """Self-attention with the parameter names of ``nn.MultiheadAttention`` and a fused kernel."""

    def forward(self, x: Tensor, causal: bool) -> Tensor:  # [B, L, W]
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, heads, L, d]
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))


class _Mlp(nn.Sequential):
    def __init__(self, width: int, hidden: int, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.c_fc, self.act, self.c_proj = nn.Linear(width, hidden), act(), nn.Linear(hidden, width)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, act: Callable[[], nn.Module], eps: float) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width, eps=eps), _Attention(width, heads)
        self.ln_2, self.mlp = nn.LayerNorm(width, eps=eps), _Mlp(width, hidden, act)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class _Transformer(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "quick_gelu": QuickGELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}


class TextTower(nn.Module):
    """Transformer over token ids.

    Args:
        width, heads, layers: size of the transformer.
        output_dim: joint dimension D.
        context_length: positions; shorter token rows are fine.
        vocab_size: number of token ids.
        mlp_ratio: hidden units of the MLP over width.
        act: ``"gelu"``, ``"quick_gelu"`` or ``"gelu_tanh"``.
        norm_eps: epsilon of the layer norms.
        causal: whether a token sees only those before it.
        pool: token that is read: ``"argmax"`` (CLIP: the end token is the largest id), ``"eos"`` (the first that is
            ``eos_id``), ``"last"`` or ``"first"``.
        eos_id: id of the end token for ``"eos"``.
        proj: whether there is a projection; without one D is the width.
        proj_bias: project with a ``nn.Linear`` with bias (SigLIP) instead of a matrix ``[W, D]`` (CLIP).

    Raises:
        ValueError: an unknown ``act`` or ``pool``, a width that the heads do not divide, or one that is not D where
            there is no projection.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        layers: int,
        output_dim: int,
        context_length: int = 77,
        vocab_size: int = 49408,
        mlp_ratio: float = 4.0,
        act: str = "gelu",
        norm_eps: float = 1e-5,
        causal: bool = True,
        pool: str = "argmax",
        eos_id: int = 2,
        proj: bool = True,
        proj_bias: bool = False,
    ) -> None:
        super().__init__()
        if act not in _ACTIVATIONS:
            raise ValueError(f'text activation is "{act}": use one of {", ".join(_ACTIVATIONS)}')
        if pool not in ("argmax", "eos", "last", "first"):
            raise ValueError(f'text pooling is "{pool}": use argmax, eos, last or first')
        if width % heads:
            raise ValueError(f"text width is {width}: it must be a multiple of the {heads} heads")
        if not proj and width != output_dim:
            raise ValueError(
                f"text width is {width}, embed_dim {output_dim}: without a projection they must be the same"
            )
        self.context_length, self.vocab_size, self.output_dim = context_length, vocab_size, output_dim
        self.width, self.heads, self.causal, self.pool, self.eos_id = width, heads, causal, pool, eos_id
        self.grad_checkpointing = False
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        hidden = int(width * mlp_ratio)
        self.transformer = _Transformer(
            [_Block(width, heads, hidden, _ACTIVATIONS[act], norm_eps) for _ in range(layers)]
        )
        self.ln_final = nn.LayerNorm(width, eps=norm_eps)
        self.text_projection: nn.Module | nn.Parameter | None = None
        if proj and proj_bias:
            self.text_projection = nn.Linear(width, output_dim)
        elif proj:
            self.text_projection = nn.Parameter(torch.empty(width, output_dim))
        self.init_weights()

    def init_weights(self) -> None:
        """CLIP's initialisation: deviations that shrink with width and, for residual branches, with depth."""
        blocks = self.transformer.resblocks
        attention_std, residual_std = self.width**-0.5, self.width**-0.5 * (2 * len(blocks)) ** -0.5
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in blocks:
            nn.init.normal_(block.attn.in_proj_weight, std=attention_std)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * self.width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)
        if isinstance(self.text_projection, nn.Linear):
            nn.init.normal_(self.text_projection.weight, std=attention_std)
            nn.init.zeros_(self.text_projection.bias)
        elif self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=attention_std)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass."""
        self.grad_checkpointing = enable

    @property
    def pool_type(self) -> str:
        """OpenCLIP's name of :attr:`pool`."""
        return self.pool

    @property
    def attn_mask(self) -> Tensor | None:
        """What a causal tower adds to its attention logits ``[L, L]``: -inf above the diagonal; None for others."""
        if not self.causal:
            return None
        shape = (self.context_length, self.context_length)
        return torch.full(shape, -torch.inf, device=self.positional_embedding.device).triu(1)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are usually not decayed."""
        return {"positional_embedding"}

    def lock(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freeze the tower except its last ``unlocked_layers`` groups; 0 freezes all of it.

        Groups in forward order: {token and position embeddings}, each block (the last with the final norm),
        {projection}.

        Raises:
            ValueError: a negative number, or ``freeze_layer_norm=False``, which would train norms of frozen blocks.
        """
        if unlocked_layers < 0:
            raise ValueError(f"unlocked_layers is {unlocked_layers}: give 0 (all frozen) or more")
        if not freeze_layer_norm:
            raise ValueError("freeze_layer_norm=False: norms are frozen or trained with their block")
        self.requires_grad_(False)
        *first, last = self.transformer.resblocks
        groups: list[list[nn.Module | nn.Parameter | None]] = [[self.token_embedding, self.positional_embedding]]
        groups += [[block] for block in first] + [[last, self.ln_final], [self.text_projection]]
        for part in (p for group in groups[max(len(groups) - unlocked_layers, 0) :] for p in group if p is not None):
            part.requires_grad_(True)

    def _run(self, text: Tensor, take: Sequence[int] = (), count: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """Tokens ``[B, L, W]`` after the first ``count`` blocks (all), and after each of the blocks in ``take``."""
        check_texts(text, self.context_length, self.vocab_size)
        x = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]
        taken = []
        for i, block in enumerate(self.transformer.resblocks[:count]):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, self.causal, use_reentrant=False)
            else:
                x = block(x, self.causal)
            if i in take:
                taken.append(x)
        return x, taken

    def _read(self, x: Tensor, text: Tensor) -> Tensor:
        """Embedding ``[B, D]`` of the tokens ``[B, L, W]`` after the last block."""
        x = self.ln_final(x)
        if self.pool in ("argmax", "eos"):
            place = text.argmax(dim=-1) if self.pool == "argmax" else (text == self.eos_id).int().argmax(dim=-1)
            x = x[torch.arange(x.shape[0], device=x.device), place]  # len(x) would be a constant of a traced graph
        else:
            x = x[:, -1 if self.pool == "last" else 0]
        if self.text_projection is None:
            return x
        return self.text_projection(x) if isinstance(self.text_projection, nn.Linear) else x @ self.text_projection

    def forward(self, text: Tensor) -> Tensor:
        """Embedding ``[B, D]`` (not normalised) of token ids ``[B, L]``, int64, L at most ``context_length``.

        Raises:
            TypeError, ValueError: something else than token ids that the tower knows.
        """
        return self._read(self._run(text)[0], text)

    def forward_intermediates(
        self,
        text: Tensor,
        indices: int | Sequence[int] | None = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: str = "NLC",
        output_extra_tokens: bool = False,
    ) -> dict[str, Tensor | list[Tensor]]:
        """Outputs of blocks: ``text_intermediates``, a list of ``[B, L, W]``, and ``text_features`` ``[B, D]``.

        Arguments as in :meth:`open_clip.upstream_api.ImageTowerAPI.forward_intermediates`, but that texts have no grid
        (``output_fmt`` is ``"NLC"``) and no extra tokens.
        """
        if output_fmt != "NLC":
            raise ValueError(f'output_fmt is "{output_fmt}": texts have no grid, use NLC')
        wanted = taken_blocks(len(self.transformer.resblocks), indices)
        x, taken = self._run(text, wanted, max(wanted, default=-1) + 1 if stop_early else None)
        taken = [self.ln_final(t) for t in taken] if normalize_intermediates else taken
        out: dict[str, Tensor | list[Tensor]] = {"text_intermediates": taken}
        if not intermediates_only:
            out["text_features"] = self._read(x, text)
        return out


def text_tower_from_config(text_cfg: dict, embed_dim: int, quick_gelu: bool = False) -> TextTower:
    """Text tower of a config's ``text_cfg``, in any of the three schemas.

    Raises:
        ValueError: a key that is neither understood nor known to be without effect, or a tower of another kind.
    """
    check_text_cfg(text_cfg)
    missing = [k for k in ("width", "heads", "layers") if k not in text_cfg]
    if missing:
        raise ValueError(f"text_cfg lacks {', '.join(missing)}")
    proj = text_cfg.get("proj_type", "linear") or "none"
    if proj not in ("linear", "none"):
        raise ValueError(f'text_cfg has proj_type "{proj}": use linear or none')
    tanh = (text_cfg.get("act_kwargs") or {}).get("approximate") == "tanh"
    sizes = ("width", "heads", "layers", "context_length", "vocab_size", "mlp_ratio", "eos_id", "proj_bias")
    return TextTower(
        output_dim=embed_dim,
        act="quick_gelu" if quick_gelu else "gelu_tanh" if tanh else "gelu",
        norm_eps=(text_cfg.get("norm_kwargs") or {}).get("eps", 1e-5),
        causal=not text_cfg.get("no_causal_mask", False),
        pool=text_cfg.get("pool_type", "argmax"),
        proj=proj == "linear",
        **{k: text_cfg[k] for k in sizes if k in text_cfg},
    )
