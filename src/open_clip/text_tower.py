"""Text tower: the transformer of CLIP (causal, end token) and of SigLIP (bidirectional, last token)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
        pool: ``"argmax"`` (CLIP: the end token is the largest id), ``"last"`` or ``"first"``.
        proj_bias: project with a ``nn.Linear`` with bias (SigLIP) instead of a matrix ``[W, D]`` (CLIP).

    Raises:
        ValueError: an unknown ``act`` or ``pool``, or a width that the heads do not divide.
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
        proj_bias: bool = False,
    ) -> None:
        super().__init__()
        if act not in _ACTIVATIONS:
            raise ValueError(f'text activation is "{act}": use one of {", ".join(_ACTIVATIONS)}')
        if pool not in ("argmax", "last", "first"):
            raise ValueError(f'text pooling is "{pool}": use argmax, last or first')
        if width % heads:
            raise ValueError(f"text width is {width}: it must be a multiple of the {heads} heads")
        self.context_length, self.vocab_size, self.output_dim = context_length, vocab_size, output_dim
        self.width, self.causal, self.pool, self.grad_checkpointing = width, causal, pool, False
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        hidden = int(width * mlp_ratio)
        self.transformer = _Transformer(
            [_Block(width, heads, hidden, _ACTIVATIONS[act], norm_eps) for _ in range(layers)]
        )
        self.ln_final = nn.LayerNorm(width, eps=norm_eps)
        if proj_bias:
            self.text_projection: nn.Module | nn.Parameter = nn.Linear(width, output_dim)
        else:
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
        else:
            nn.init.normal_(self.text_projection, std=attention_std)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass."""
        self.grad_checkpointing = enable

    def forward(self, text: Tensor) -> Tensor:
        """Embedding ``[B, D]`` (not normalised) of token ids ``[B, L]``, int64, L at most ``context_length``."""
        if text.shape[1] > self.context_length:
            raise ValueError(f"{text.shape[1]} tokens a text, but the model takes {self.context_length} at most")
        x = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]
        for block in self.transformer.resblocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, self.causal, use_reentrant=False)
            else:
                x = block(x, self.causal)
        x = self.ln_final(x)
        if self.pool == "argmax":
            x = x[torch.arange(len(x), device=x.device), text.argmax(dim=-1)]
        else:
            x = x[:, -1 if self.pool == "last" else 0]
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(x)
        return x @ self.text_projection


# Keys of text_cfg that choose something this tower does not need: kernels of the published EVA code, the tokenizer
# (open_clip.factory reads those), and ids of tokens that neither attention nor pooling looks for here.
_IGNORED = {
    "xattn", "fusedLN", "hf_tokenizer_name", "tokenizer_kwargs", "hf_model_pretrained",
    "masked_language_modeling", "attn_mask", "pad_id", "eos_id", "head_width",
}  # fmt: skip


def text_tower_from_config(text_cfg: dict, embed_dim: int, quick_gelu: bool = False) -> TextTower:
    """Text tower of a config's ``text_cfg``, in any of the three schemas.

    Raises:
        ValueError: a key that is neither understood nor known to be without effect, or a tower of another kind.
    """
    if text_cfg.get("hf_model_name"):
        raise ValueError(
            f"text_cfg names the text model {text_cfg['hf_model_name']} of the hub (hf_model_name): only CLIP's and "
            "SigLIP's own text towers are supported"
        )
    if text_cfg.get("proj_type", "linear") != "linear":
        raise ValueError(f'text_cfg has proj_type "{text_cfg["proj_type"]}": only linear is supported')
    cfg = {k: v for k, v in text_cfg.items() if k not in {*_IGNORED, "proj_type", "hf_model_name"}}
    act = "quick_gelu" if quick_gelu else "gelu"
    if (cfg.pop("act_kwargs", None) or {}).get("approximate") == "tanh":
        act = "gelu_tanh"
    kwargs = {
        "act": act,
        "norm_eps": (cfg.pop("norm_kwargs", None) or {}).get("eps", 1e-5),
        "causal": not cfg.pop("no_causal_mask", False),
        "pool": cfg.pop("pool_type", "argmax"),
        "proj_bias": bool(cfg.pop("proj_bias", False)),
        "output_dim": embed_dim,
    }
    allowed = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
    unknown = sorted(set(cfg) - allowed)
    if unknown:
        raise ValueError(f"text_cfg has unknown keys {', '.join(unknown)}: allowed are {', '.join(sorted(allowed))}")
    missing = [k for k in ("width", "heads", "layers") if k not in cfg]
    if missing:
        raise ValueError(f"text_cfg lacks {', '.join(missing)}")
    return TextTower(**cfg, **kwargs)
