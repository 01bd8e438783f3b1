"""Image tower: a timm trunk and its two readings, global (class token or pooled) and dense (value path).

Two trunk families of timm are supported, ``timm.models.eva.Eva`` (EVA-01, EVA-02, PE, DINOv3) and
``timm.models.vision_transformer.VisionTransformer`` (OpenAI and LAION CLIP, SigLIP). The trunk holds the weights; the
forward pass is written out here because a dense reading enters it in places where timm has no door.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import Attention, DropPath, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .checks import check_images
from .upstream_api import ImageTowerAPI

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def resize_positions(positions: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resize patch position embeddings ``[1, h*w, C]`` to another grid: bicubic, corners not aligned, no antialias.

    timm's own resize uses antialias, whose bicubic kernel differs and shifts a dense map by up to 0.08.
    """
    if old_grid == new_grid:
        return positions
    channels = positions.shape[-1]
    grid = positions.reshape(1, *old_grid, channels).permute(0, 3, 1, 2)  # [1, C, h, w]
    # float32: the bicubic kernel is inaccurate in half precision, and not implemented for it everywhere.
    grid = F.interpolate(grid.float(), size=new_grid, mode="bicubic", align_corners=False, antialias=False)
    return grid.to(positions.dtype).permute(0, 2, 3, 1).reshape(1, -1, channels)


def _attention_values(attn: nn.Module, x: Tensor) -> Tensor:
    """Value projection ``[B, N, A]`` of a timm attention module, for fused and split projections."""
    if getattr(attn, "qkv", None) is None:
        v = attn.v_proj(x)
        width = attn.proj.in_features
        if v.shape[-1] != width:  # grouped-query attention: every value head serves several query heads
            v = v.unflatten(-1, (-1, attn.head_dim)).repeat_interleave(width // v.shape[-1], dim=-2).flatten(-2)
        return v
    width = attn.qkv.weight.shape[0] // 3
    bias = getattr(attn, "v_bias", None)  # EVA-01 keeps the biases apart from the fused weight
    if bias is None and attn.qkv.bias is not None:
        bias = attn.qkv.bias[2 * width :]
    return F.linear(x, attn.qkv.weight[2 * width :], bias)


def value_attention(attn: nn.Module, x: Tensor) -> Tensor:
    """What an attention module returns when every token attends to itself only: value, inner norm, output projection.

    ``x`` is ``[B, N, C]``; so is the result. Equal to running the module on each token as a sequence of its own.
    """
    v = attn.norm(_attention_values(attn, x))
    if getattr(attn, "gate", None) is not None:
        v = v * attn.gate(x).sigmoid()
    return attn.proj(v)


def value_block(block: nn.Module, x: Tensor) -> Tensor:
    """A transformer block without token mixing: its attention is replaced by :func:`value_attention`.

    Both residuals and the MLP are kept (MaskCLIP, ECCV 2022; CLIPSelf, section 3.1). Shapes ``[B, N, C]``.
    """
    if isinstance(block, EvaBlockPostNorm):
        x = x + block.norm1(value_attention(block.attn, x))
        return x + block.norm2(block.mlp(x))
    if isinstance(block, EvaBlock):
        y = value_attention(block.attn, block.norm1(x))
        x = x + (y if block.gamma_1 is None else block.gamma_1 * y)
        y = block.mlp(block.norm2(x))
        return x + (y if block.gamma_2 is None else block.gamma_2 * y)
    if isinstance(block, Block):
        x = x + block.ls1(value_attention(block.attn, block.norm1(x)))
        return x + block.ls2(block.mlp(block.norm2(x)))
    raise TypeError(
        f"no dense reading for a block of type {type(block).__name__}; use an Eva or VisionTransformer trunk"
    )


def _prefix_attention(attn: nn.Module, x: Tensor, rope: Tensor | None, count: int) -> Tensor:
    """What an attention module returns for the first ``count`` tokens, which attend to all: ``[B, count, C]``.

    ``x`` is ``[B, N, C]``; the first ``count`` tokens are the prefix, which the rotary table leaves alone.
    """
    if attn.qkv is None:
        q, k, v = attn.q_proj(x[:, :count]), attn.k_proj(x), attn.v_proj(x)
    else:
        weight, bias = attn.qkv.weight, attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:  # EVA-01 keeps the biases apart from the fused weight
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        width = len(weight) // 3
        q = F.linear(x[:, :count], weight[:width], None if bias is None else bias[:width])
        k, v = F.linear(x, weight[width:], None if bias is None else bias[width:]).chunk(2, dim=-1)
    q, k, v = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, heads, tokens, A]
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        patches = apply_rot_embed_cat(k[:, :, count:], rope, half=getattr(attn, "rotate_half", False))
        q, k = q.type_as(v), torch.cat([k[:, :, :count], patches], dim=2).type_as(v)
    y = attn.norm(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    if attn.gate is not None:
        y = y * attn.gate(x[:, :count]).sigmoid()
    return attn.proj(y)


def prefix_block(block: nn.Module, x: Tensor, rope: Tensor | None, count: int) -> Tensor:
    """A transformer block for its first ``count`` tokens only: ``[B, N, C] -> [B, count, C]``.

    For the last block of a global reading, which is read at the class token: most of an ordinary block's work there is
    for tokens that nobody looks at, in a ViT-B a fourteenth of the whole.
    """
    first = x[:, :count]
    if isinstance(block, EvaBlockPostNorm):
        first = first + block.norm1(_prefix_attention(block.attn, x, rope, count))
        return first + block.norm2(block.mlp(first))
    y = _prefix_attention(block.attn, block.norm1(x), rope, count)
    if isinstance(block, EvaBlock):
        first = first + (y if block.gamma_1 is None else block.gamma_1 * y)
        y = block.mlp(block.norm2(first))
        return first + (y if block.gamma_2 is None else block.gamma_2 * y)
    first = first + block.ls1(y)
    return first + block.ls2(block.mlp(block.norm2(first)))


def has_prefix_reading(block: nn.Module) -> bool:
    """Whether :func:`prefix_block` knows a block: a plain, fused attention, and nothing dropped at random."""
    known = isinstance(block, (Block, EvaBlock, EvaBlockPostNorm)) and type(block.attn) in (Attention, EvaAttention)
    known = known and block.attn.fused_attn  # switched off, all attention is to be spelt out by the trunk itself
    drops = [m for m in block.modules() if isinstance(m, (nn.Dropout, DropPath))]
    return known and all(getattr(m, "p", getattr(m, "drop_prob", 0)) == 0 for m in drops)


def pool_each_token(pool: nn.Module, x: Tensor) -> Tensor:
    """Attention pooling (SigLIP's MAP head) over each token alone: ``[B, N, C] -> [B, N, C]``.

    A softmax over one key is 1, so the pooled value is the token's own value projection. This is for a model that
    pools by attention what the value path of the last block is for one that pools into a class token.
    """
    width = pool.kv.weight.shape[0] // 2
    bias = None if pool.kv.bias is None else pool.kv.bias[width:]
    y = pool.proj(F.linear(x, pool.kv.weight[width:], bias))
    return y if pool.mlp is None else y + pool.mlp(pool.norm(y))


class ImageTower(ImageTowerAPI, nn.Module):
    """A timm trunk read as a CLIP image encoder.

    Args:
        trunk: ``Eva`` or ``VisionTransformer`` whose ``head`` projects to the joint space (or is an identity).
        image_size: native side in pixels.
        image_mean, image_std: pixel normalisation (RGB, of values in 0..1).
        interpolation: ``"bicubic"`` or ``"bilinear"``, for whole-image preparation.
        resize_mode: ``"shortest"`` (resize and centre crop, CLIP), ``"squash"`` (SigLIP) or ``"longest"``.

    Raises:
        TypeError: the trunk is of another family.
    """

    def __init__(
        self,
        trunk: nn.Module,
        *,
        image_size: int,
        image_mean: Sequence[float] = OPENAI_MEAN,
        image_std: Sequence[float] = OPENAI_STD,
        interpolation: str = "bicubic",
        resize_mode: str = "shortest",
    ) -> None:
        super().__init__()
        if not isinstance(trunk, (Eva, VisionTransformer)):
            raise TypeError(f"image trunk {type(trunk).__name__} is not supported: use an Eva or VisionTransformer")
        self.trunk = trunk
        self.image_size = int(image_size)
        self.patch_size = int(trunk.patch_embed.patch_size[0])
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.interpolation, self.resize_mode = interpolation, resize_mode
        self.grad_checkpointing = False

    @property
    def embed_dim(self) -> int:
        """Joint dimension D."""
        return self.trunk.head.out_features if isinstance(self.trunk.head, nn.Linear) else self.trunk.embed_dim

    @property
    def output_dim(self) -> int:
        """OpenCLIP's name for :attr:`embed_dim`."""
        return self.embed_dim

    @property
    def width(self) -> int:
        """Token width."""
        return self.trunk.embed_dim

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches (class token, registers)."""
        return self.trunk.num_prefix_tokens

    @property
    def native_grid(self) -> tuple[int, int]:
        """Cells (h, w) at the native size."""
        return tuple(self.trunk.patch_embed.grid_size)

    def grid(self, image: Tensor) -> tuple[int, int]:
        """Cells (h, w) of an image ``[B, 3, H, W]``; ValueError when a side is not a multiple of the patch."""
        check_images(image)
        height, width = image.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"image of {height}x{width} pixels: both sides must be multiples of the patch size {self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    # -- tokens ---------------------------------------------------------------------------------------------------

    def embed(self, image: Tensor) -> tuple[Tensor, Tensor | list[Tensor] | None]:
        """Tokens entering the first block ``[B, prefix + h*w, W]``, and the rotary table (or None)."""
        trunk, grid = self.trunk, self.grid(image)
        x = trunk.patch_embed.norm(trunk.patch_embed.proj(image).flatten(2).transpose(1, 2))  # [B, h*w, W]
        prefix = [t.expand(x.shape[0], -1, -1) for t in (trunk.cls_token, trunk.reg_token) if t is not None]
        if trunk.pos_embed is None:
            x = torch.cat([*prefix, x], dim=1)
        else:
            covered = 0 if trunk.no_embed_class else self.num_prefix_tokens
            patches = resize_positions(trunk.pos_embed[:, covered:], self.native_grid, grid)
            if covered:
                x = torch.cat([*prefix, x], dim=1) + torch.cat([trunk.pos_embed[:, :covered], patches], dim=1)
            else:
                x = torch.cat([*prefix, x + patches], dim=1)
        x = trunk.norm_pre(trunk.pos_drop(x))
        rope = getattr(trunk, "rope", None)
        return x, None if rope is None else rope.get_embed(shape=grid)

    def run_block(self, index: int, x: Tensor, rope: Tensor | None, attn_mask: Tensor | None = None) -> Tensor:
        """Block ``index`` as usual, recomputed in the backward pass when gradient checkpointing is on."""
        kwargs = {}
        if rope is not None:
            kwargs["rope"] = rope[index] if getattr(self.trunk, "rope_mixed", False) else rope
        if attn_mask is not None:
            kwargs["attn_mask"] = attn_mask
        block = self.trunk.blocks[index]
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, **kwargs)
        return block(x, **kwargs)

    # -- global reading -------------------------------------------------------------------------------------------

    def forward(self, image: Tensor) -> Tensor:
        """Global embedding ``[B, D]`` of normalised images ``[B, 3, H, W]``; sides are multiples of the patch."""
        x, rope = self.embed(image)
        last = len(self.trunk.blocks) - 1
        for i in range(last):
            x = self.run_block(i, x, rope)
        block = self.trunk.blocks[last]
        # Cheap enough to look at each time: the answer changes when somebody exchanges a part of the trunk.
        if self.trunk.global_pool == "token" and not self.pools_by_attention and has_prefix_reading(block):
            rope = rope[last] if rope is not None and getattr(self.trunk, "rope_mixed", False) else rope
            arguments = (block, x, rope, self.num_prefix_tokens)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(prefix_block, *arguments, use_reentrant=False)
            else:
                x = prefix_block(*arguments)
        else:
            x = self.run_block(last, x, rope)
        return self.trunk.forward_head(self.trunk.norm(x))

    # -- dense reading --------------------------------------------------------------------------------------------

    @property
    def pools_by_attention(self) -> bool:
        """True for a trunk with an attention-pooling head (SigLIP) instead of a class token."""
        return getattr(self.trunk, "attn_pool", None) is not None

    def dense_tokens(self, image: Tensor, take: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """Tokens ``[B, h*w, W]`` after the last block on the value path, before the final norm; no prefix tokens.

        Args:
            take: indices of ordinary blocks whose outputs are returned as well, as maps ``[B, W, h, w]`` in that order.
                The index of the last block stands for its value-path output.
        """
        x, rope = self.embed(image)
        last = len(self.trunk.blocks) - 1
        height, width = self.grid(image)
        wanted: dict[int, Tensor] = {}
        for i in range(last + 1):
            # With an attention-pooling head the pooling is in the head, and the last block is an ordinary one.
            if i < last or self.pools_by_attention:
                x = self.run_block(i, x, rope)
            elif self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(value_block, self.trunk.blocks[i], x[:, self.num_prefix_tokens :], use_reentrant=False)
            else:
                x = value_block(self.trunk.blocks[i], x[:, self.num_prefix_tokens :])
            if i in take:
                patches = x if x.shape[1] == height * width else x[:, self.num_prefix_tokens :]
                wanted[i] = patches.transpose(1, 2).unflatten(2, (height, width))
        if missing := set(take) - set(wanted):
            raise ValueError(f"blocks {sorted(missing)} do not exist: the trunk has blocks 0 to {last}")
        return (x[:, self.num_prefix_tokens :] if self.pools_by_attention else x), [wanted[i] for i in take]

    def project_dense(self, x: Tensor) -> Tensor:
        """Final norm, (per-token pooling head,) projection and L2 normalisation: ``[B, N, W] -> [B, N, D]``."""
        x = self.trunk.norm(x)
        if self.pools_by_attention:
            x = pool_each_token(self.trunk.attn_pool, x)
        return F.normalize(self.trunk.head(self.trunk.fc_norm(x)), dim=-1)

    def encode_dense(self, image: Tensor, keep_shape: bool = True) -> Tensor:
        """Dense embedding, unit length per cell: ``[B, D, h, w]``, or ``[B, h*w, D]`` when the shape is not kept."""
        x = self.project_dense(self.dense_tokens(image)[0])
        return x.transpose(1, 2).unflatten(2, self.grid(image)) if keep_shape else x

    # -- region tokens (extraction "v1") --------------------------------------------------------------------------

    def encode_region_tokens(self, image: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """One extra token per region: ``[sum K_i, D]``, not normalised (CLIP ViT only).

        Each token starts as a copy of the class token after the pre-norm; it attends to the class token and to the
        patches of its mask, and nobody attends to it.

        Args:
            masks: per image, bool ``[K_i, h, w]`` on the grid of cells.
        """
        if not isinstance(self.trunk, VisionTransformer) or self.trunk.cls_token is None:
            raise ValueError('extract type "v1" (and mask attention) needs a CLIP ViT with a class token; use "v2"')
        counts = [len(m) for m in masks]
        x, _ = self.embed(image)
        most, length = max(counts, default=0), x.shape[1]
        if most == 0:
            return x.new_zeros(0, self.embed_dim) + 0 * x.sum()
        # Queries in rows, keys in columns; region tokens stand in front. Rows of unused slots see the class token.
        allowed = torch.zeros(len(x), most + length, most + length, dtype=torch.bool, device=x.device)
        allowed[:, most:, most:] = True
        allowed[:, :most, most] = True
        for i, mask in enumerate(masks):
            allowed[i, : counts[i], most + self.num_prefix_tokens :] = mask.to(x.device).flatten(1).bool()
        x = torch.cat([x[:, :1].expand(-1, most, -1), x], dim=1)
        for i in range(len(self.trunk.blocks)):
            x = self.run_block(i, x, None, attn_mask=allowed[:, None])
        tokens = torch.cat([x[i, :n] for i, n in enumerate(counts)])
        return self.trunk.head(self.trunk.fc_norm(self.trunk.norm(tokens)))

    # -- freezing -------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """Groups that can be unlocked, in forward order; the final norm, pooling and projection belong to none.

        EVA: one group per block. CLIP ViT: {patch embedding, class token, pre-norm}, {positions}, then the blocks.
        """
        trunk = self.trunk
        blocks = [list(block.parameters()) for block in trunk.blocks]
        if isinstance(trunk, Eva):
            return blocks
        stem = [*trunk.patch_embed.parameters(), *trunk.norm_pre.parameters()]
        stem += [t for t in (trunk.cls_token, trunk.reg_token) if t is not None]
        return [stem, [] if trunk.pos_embed is None else [trunk.pos_embed], *blocks]

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the tower except the last ``unlocked_groups`` of :meth:`parameter_groups` (0 freezes everything).

        ``freeze_bn_stats`` has nothing to act on, as in :meth:`open_clip.model.CLIP.lock_image_tower`.
        """
        if unlocked_groups < 0:
            raise ValueError(f"unlocked_groups is {unlocked_groups}: give 0 (all frozen) or more")
        self.requires_grad_(False)
        groups = self.parameter_groups()
        for group in groups[max(len(groups) - unlocked_groups, 0) :]:
            for parameter in group:
                parameter.requires_grad_(True)

    def unreached_by_dense(self) -> list[nn.Parameter]:
        """Parameters that the dense reading never uses: no loss on it can train them, and DDP would wait for them.

        Query and key of the last block (when they are parameters of their own), or, with an attention-pooling head,
        its latent and query.
        """
        if self.pools_by_attention:
            pool = self.trunk.attn_pool
            return [pool.latent, *pool.q.parameters(), *pool.q_norm.parameters(), *pool.k_norm.parameters()]
        attn = self.trunk.blocks[-1].attn
        modules = [getattr(attn, name, None) for name in ("q_proj", "k_proj", "q_norm", "k_norm")]
        unreached = [p for module in modules if module is not None for p in module.parameters()]
        if getattr(attn, "q_bias", None) is not None:
            unreached.append(attn.q_bias)
        return unreached
