"""Image tower: a timm trunk and its two readings, global (class token or pooled) and dense.

Two trunk families of timm are supported, ``timm.models.eva.Eva`` (EVA-01, EVA-02, PE, DINOv3) and
``timm.models.vision_transformer.VisionTransformer`` (OpenAI and LAION CLIP, SigLIP). The trunk holds the weights; the
forward pass is written out here because a dense reading (:mod:`open_clip.readouts`) enters it in places where timm has
no door. What is known of blocks and attention stands in :mod:`open_clip.timm_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import timm_blocks
from .checks import check_images
from .dense_passes import DensePasses
from .mlp_widths import pad_mlps
from .packed_blocks import CHANGING, packed_block
from .padding import Canvas, interleave, packed_rotary
from .readouts import DEFAULT
from .upstream_api import ImageTowerAPI

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def resize_positions(positions: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resize patch position embeddings ``[1, h*w, C]`` to another grid: bicubic, corners not aligned, no antialias.

    timm's own resize uses antialias, whose bicubic kernel differs and shifts a dense map by up to 0.08.
    """
    if old_grid == new_grid:
        return positions
    # float32: the bicubic kernel is inaccurate in half precision, and not implemented for it everywhere. One axis after
    # the other, with all channels along the other one: PyTorch's GPU kernel takes a thread for each output cell, which
    # loops over channels, and so took 2.4 ms of an H200 for a map of 64 x 64 cells.
    grid = positions.reshape(*old_grid, -1).float()
    for axis in (1, 0):
        grid = _resize_axis(grid, axis, new_grid[axis])
    return grid.to(positions.dtype).reshape(1, -1, positions.shape[-1])


def _resize_axis(grid: Tensor, axis: int, cells: int) -> Tensor:
    """``[h, w, C]`` with another number of cells along one axis."""
    lines = grid.movedim(axis, 0)  # [old, other, C]
    flat = lines.reshape(1, 1, len(lines), -1)
    flat = F.interpolate(flat, size=(cells, flat.shape[-1]), mode="bicubic", align_corners=False, antialias=False)
    return flat.reshape(cells, *lines.shape[1:]).movedim(0, axis)


class ImageTower(DensePasses, ImageTowerAPI, nn.Module):
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
        if not isinstance(trunk, timm_blocks.TRUNKS):
            raise TypeError(f"image trunk {type(trunk).__name__} is not supported: use an Eva or VisionTransformer")
        self.trunk = trunk
        #: (width, width computed in) of MLPs that a GPU computes padded in half precision.
        self.padded_widths = pad_mlps(trunk)
        self.image_size = int(image_size)
        self.patch_size = int(trunk.patch_embed.patch_size[0])
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.interpolation, self.resize_mode = interpolation, resize_mode
        self.grad_checkpointing = False
        self.drop_padding = False
        #: Exact and on: what of a block no caller reads is not computed. Off where a block may only be called whole.
        self.leave_unread = True
        #: Kernels of attention whose shapes change from batch to batch; none: PyTorch chooses.
        self.changing_kernels: Sequence[str] = CHANGING
        #: Functions of a block that are compiled, by what they stand for.
        self.compiled: dict[Callable, Callable] = {}
        self._tables: dict[tuple, Tensor] = {}  # rotary tables that do not train, by grid and device
        self.set_readout(DEFAULT)

    def _apply(self, fn: Callable, recurse: bool = True) -> ImageTower:
        self._tables = {}
        with timm_blocks.rotary_in_float32(self.trunk):
            return super()._apply(fn, recurse)

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

    def embed(self, image: Tensor, canvas: Canvas | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens entering the first block ``[B, prefix + h*w, W]``, and the rotary table (or None).

        Args:
            canvas: where the images lie, to leave the rest out: ``[B, prefix + n, W]`` where all take the same cells,
                else packed ``[1, T, W]``, prefix tokens ahead of each image's cells.
        """
        trunk, grid = self.trunk, self.grid(image)
        x = trunk.patch_embed.norm(trunk.patch_embed.proj(image).flatten(2).transpose(1, 2))  # [B, h*w, W]
        prefix = [t.expand(x.shape[0], -1, -1) for t in (trunk.cls_token, trunk.reg_token) if t is not None]
        prefix = torch.cat(prefix, dim=1) if prefix else x[:, :0]
        x = x if canvas is None else canvas.gather(x)
        if trunk.pos_embed is not None:
            covered = 0 if trunk.no_embed_class else self.num_prefix_tokens
            if covered:
                prefix = prefix + trunk.pos_embed[:, :covered]
            x = x + self._rows(
                lambda g: resize_positions(trunk.pos_embed[:, covered:], self.native_grid, g), grid, canvas
            )
        if canvas is None or canvas.uniform:
            x = torch.cat([prefix, x], dim=1)
            table = None if not self._turns else self._rows(self._rotary, grid, canvas)
        else:
            x = interleave(prefix, canvas.split(x))
            table = None if not self._turns else packed_rotary(canvas.rows(self._rotary), self.num_prefix_tokens)
        return trunk.norm_pre(trunk.pos_drop(x)), table

    @property
    def _turns(self) -> bool:
        return getattr(self.trunk, "rope", None) is not None

    def _rotary(self, grid: tuple[int, int]) -> Tensor:
        """Rotary table of a grid; one that does not train is made once, in place of some twenty kernels a pass."""
        if getattr(self.trunk, "rope_mixed", False):
            return timm_blocks.rotary_table(self.trunk, grid)
        devices = [b.device for b in self.trunk.rope.buffers()]  # a list: torch 2.6 cannot trace next(..., None)
        device = devices[0] if devices else None
        table = self._tables.get((grid, device))
        if table is None:
            with torch.inference_mode(False), torch.no_grad():  # a table made for an evaluation serves training too
                table = timm_blocks.rotary_table(self.trunk, grid)
            # A traced program's table is none: torch 2.6 would leave the tracer's stand-in here.
            if device is not None and type(table) is Tensor and not torch.compiler.is_compiling():
                self._tables[grid, device] = table
        return table

    @staticmethod
    def _rows(table: Callable, grid: tuple[int, int], canvas: Canvas | None) -> Tensor:
        """Rows of a table of positions for all cells, end to end."""
        if canvas is None:
            return table(grid)
        rows = canvas.rows(table)
        return rows[0] if canvas.uniform else torch.cat(rows, dim=-2)

    def run_block(
        self,
        index: int,
        x: Tensor,
        rope: Tensor | None,
        attn_mask: Tensor | None = None,
        canvas: Canvas | None = None,
    ) -> Tensor:
        """Block ``index`` as usual, recomputed in the backward pass when gradient checkpointing is on; on packed tokens
        where a canvas says that they are."""
        block = self.trunk.blocks[index]
        rope = timm_blocks.block_rotary(self.trunk, rope, index)
        if canvas is not None and not canvas.uniform:
            numbers = [n + self.num_prefix_tokens for n in canvas.numbers]
            return self.run(packed_block, block, x, rope, numbers, self.faster, self.changing_kernels)
        kwargs = {name: t for name, t in (("rope", rope), ("attn_mask", attn_mask)) if t is not None}
        return self.run(block, x, **kwargs)

    def run(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Call a function of tensors; recomputed in the backward pass when gradient checkpointing is on."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, **kwargs)
        return function(*args, **kwargs)

    def faster(self, function: Callable) -> Callable:
        """The compiled form of a function of a block where there is one, else itself."""
        return self.compiled.get(function, function)

    # -- global reading -------------------------------------------------------------------------------------------

    def forward(self, image: Tensor) -> Tensor:
        """Global embedding ``[B, D]`` of normalised images ``[B, 3, H, W]``; sides are multiples of the patch."""
        x, rope = self.embed(image)
        last = len(self.trunk.blocks) - 1
        for i in range(last):
            x = self.run_block(i, x, rope)
        block = self.trunk.blocks[last]
        # Cheap enough to look at each time: the answer changes when somebody exchanges a part of the trunk.
        if self.trunk.global_pool == "token" and not self.pools_by_attention and timm_blocks.has_prefix_reading(block):
            table = timm_blocks.block_rotary(self.trunk, rope, last)
            x = self.run(self.faster(timm_blocks.prefix_block), block, x, table, self.num_prefix_tokens)
        else:
            x = self.run_block(last, x, rope)
        return self.trunk.forward_head(self.trunk.norm(x))

    # -- region tokens (extraction "v1") --------------------------------------------------------------------------

    def encode_region_tokens(self, image: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """One extra token per region: ``[sum K_i, D]``, not normalised (CLIP ViT only).

        Each token starts as a copy of the class token after the pre-norm; it attends to the class token and to the
        patches of its mask, and nobody attends to it.

        Args:
            masks: per image, bool ``[K_i, h, w]`` on the grid of cells.
        """
        if timm_blocks.is_eva(self.trunk) or self.trunk.cls_token is None:
            raise ValueError('extract type "v1" (and mask attention) needs a CLIP ViT with a class token; use "v2"')
        if self.drop_padding:
            raise ValueError('extract type "v1" (and mask attention) has no form without padding; use "v2"')
        counts = [len(m) for m in masks]
        x, _ = self.embed(image)
        most, length = max(counts, default=0), x.shape[1]
        if most == 0:
            return x.new_zeros(0, self.embed_dim) + 0 * x.sum()
        # Queries in rows, keys in columns; region tokens stand in front. Rows of unused slots see the class token.
        allowed = torch.zeros(x.shape[0], most + length, most + length, dtype=torch.bool, device=x.device)
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
        if timm_blocks.is_eva(trunk):
            return blocks
        stem = [*trunk.patch_embed.parameters(), *trunk.norm_pre.parameters()]
        stem += [t for t in (trunk.cls_token, trunk.reg_token) if t is not None]
        return [stem, [] if trunk.pos_embed is None else [trunk.pos_embed], *blocks]

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the tower except the last ``unlocked_groups`` of :meth:`parameter_groups` (0 freezes everything).

        What the dense reading owns trains along with any group. ``freeze_bn_stats`` has nothing to act on, as in
        :meth:`open_clip.model.CLIP.lock_image_tower`.
        """
        if unlocked_groups < 0:
            raise ValueError(f"unlocked_groups is {unlocked_groups}: give 0 (all frozen) or more")
        self.requires_grad_(False)
        groups = self.parameter_groups()
        for group in groups[max(len(groups) - unlocked_groups, 0) :]:
            for parameter in group:
                parameter.requires_grad_(True)
        self.readout.requires_grad_(unlocked_groups > 0)
