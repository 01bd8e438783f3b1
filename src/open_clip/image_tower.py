"""Image tower: a timm trunk and its two readings, global (class token or pooled) and dense.

Two trunk families of timm are supported, ``timm.models.eva.Eva`` (EVA-01, EVA-02, PE, DINOv3) and
``timm.models.vision_transformer.VisionTransformer`` (OpenAI and LAION CLIP, SigLIP). The trunk holds the weights; the
forward pass is written out here because a dense reading (:mod:`open_clip.readouts`) enters it in places where timm has
no door. What is known of blocks and attention stands in :mod:`open_clip.timm_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import timm_blocks
from .checks import check_images
from .readouts import DEFAULT, SPEC_KEY, BlockInputs, Readout, build_readout, read_spec, write_spec
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
        if not isinstance(trunk, timm_blocks.TRUNKS):
            raise TypeError(f"image trunk {type(trunk).__name__} is not supported: use an Eva or VisionTransformer")
        self.trunk = trunk
        self.image_size = int(image_size)
        self.patch_size = int(trunk.patch_embed.patch_size[0])
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.interpolation, self.resize_mode = interpolation, resize_mode
        self.grad_checkpointing = False
        self.set_readout(DEFAULT)

    def _apply(self, fn: Callable, recurse: bool = True) -> ImageTower:
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

    def embed(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
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
        return x, timm_blocks.rotary_table(trunk, grid)

    def run_block(self, index: int, x: Tensor, rope: Tensor | None, attn_mask: Tensor | None = None) -> Tensor:
        """Block ``index`` as usual, recomputed in the backward pass when gradient checkpointing is on."""
        kwargs = {}
        if rope is not None:
            kwargs["rope"] = timm_blocks.block_rotary(self.trunk, rope, index)
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
        if self.trunk.global_pool == "token" and not self.pools_by_attention and timm_blocks.has_prefix_reading(block):
            arguments = (block, x, timm_blocks.block_rotary(self.trunk, rope, last), self.num_prefix_tokens)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(timm_blocks.prefix_block, *arguments, use_reentrant=False)
            else:
                x = timm_blocks.prefix_block(*arguments)
        else:
            x = self.run_block(last, x, rope)
        return self.trunk.forward_head(self.trunk.norm(x))

    # -- dense reading --------------------------------------------------------------------------------------------

    @property
    def pools_by_attention(self) -> bool:
        """True for a trunk with an attention-pooling head (SigLIP) instead of a class token."""
        return getattr(self.trunk, "attn_pool", None) is not None

    def set_readout(self, readout: str | Readout, **options: Any) -> None:
        """Make a dense reading the model's own: what ``readout=None`` means, and what its weights' file names.

        Args:
            readout: a name and its options, see :func:`open_clip.readouts.build_readout`; or a reading built for
                this tower.

        Raises:
            ValueError, TypeError: as ``build_readout``.
        """
        self.readout = readout if isinstance(readout, Readout) else build_readout(readout, self, **options)
        # Among the weights, so that any kind of file keeps it; the default is not written, which keeps files as ever.
        default = self.readout.spec() == build_readout(DEFAULT, self).spec()
        self.register_buffer("readout_spec", None if default else write_spec(self.readout))

    def adopt_readout(self, state: dict[str, Tensor], source: str = "state dict") -> None:
        """Ahead of loading a CLIP's state dict: take over the reading that it names.

        A state dict that names none leaves the model's own in place, and gets its entries here.
        """
        if SPEC_KEY in state:
            spec = read_spec(state[SPEC_KEY], source)
            try:
                if spec != self.readout.spec():
                    self.set_readout(build_readout(tower=self, **spec))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{source}: {error}") from error
            if self.readout_spec is None:
                del state[SPEC_KEY]
        else:
            own = {f"visual.{n}": t for n, t in self.state_dict().items() if n.startswith("readout")}
            state.update({n: t for n, t in own.items() if n not in state})

    def resolve_readout(self, readout: str | Readout | None) -> Readout:
        """The reading that ``readout=`` means: the model's own (None, or its name), another one by name, or itself.

        Raises:
            ValueError: an unknown name, or one of a reading with parameters that is not the model's own.
        """
        if isinstance(readout, Readout):
            return readout
        if readout is None or readout == self.readout.name:
            return self.readout
        built = build_readout(readout, self)
        if built.name == self.readout.name:  # "gated" is short for "gated:3"
            return self.readout
        if next(built.parameters(), None) is not None:
            raise ValueError(f'the reading "{readout}" has weights of its own: make it the model\'s by set_readout')
        return built

    def block_inputs(self, image: Tensor, blocks: Iterable[int] = (-1,)) -> BlockInputs:
        """One pass up to the last of some blocks: the tokens that enter these, for readings and projections.

        Args:
            image: ``[B, 3, H, W]``.
            blocks: indices; negative ones count from the end.

        Raises:
            ValueError: a block that does not exist, or an image whose sides are no multiples of the patch.
        """
        timm_blocks.check_dense(self.trunk)
        blocks, count = set(blocks), len(self.trunk.blocks)
        wrong = sorted(i for i in blocks if not -count <= i < count)
        if wrong:
            raise ValueError(f"blocks {wrong} do not exist: the trunk has blocks 0 to {count - 1}")
        asked = {i % count for i in blocks}
        x, table = self.embed(image)
        tokens: dict[int, Tensor] = {}
        cells: dict[int, Tensor] = {}
        for i in range(max(asked, default=-1) + 1):
            if i > 0:
                x = self.run_block(i - 1, x, table)
            if i in asked:
                tokens[i], cells[i] = x, x[:, self.num_prefix_tokens :]
        return BlockInputs(self, tokens, cells, table, self.grid(image))

    def dense_tokens(
        self, image: Tensor, take: Sequence[int] = (), readout: str | Readout | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Tokens ``[B, h*w, W]`` of a dense reading, before the final norm; no prefix tokens.

        Args:
            take: indices of ordinary blocks whose outputs are returned as well, as maps ``[B, W, h, w]`` in that order.
                The index of the last block stands for the reading's tokens.
            readout: see :meth:`encode_dense`.
        """
        last = len(self.trunk.blocks) - 1
        missing = sorted(i for i in take if not 0 <= i <= last)
        if missing:
            raise ValueError(f"blocks {missing} do not exist: the trunk has blocks 0 to {last}")
        reading = self.resolve_readout(readout)
        inputs = self.block_inputs(image, (*reading.blocks(self), *(i + 1 for i in take if i < last)))
        tokens = reading.tokens(inputs)
        levels = []
        for i in take:
            cells, grid = (inputs.cells[i + 1], inputs.grid) if i < last else (tokens, reading.grid(inputs))
            levels.append(cells.transpose(1, 2).unflatten(2, grid))
        return tokens, levels

    def project_dense(self, x: Tensor, readout: str | Readout | None = None) -> Tensor:
        """What follows :meth:`dense_tokens`: final norm, (per-token pooling head,) projection and L2 normalisation,
        as far as the reading has them: ``[B, N, W] -> [B, N, D]``."""
        return self.resolve_readout(readout).embed(self, x)

    def encode_dense(self, image: Tensor, keep_shape: bool = True, readout: str | Readout | None = None) -> Tensor:
        """Dense embedding: ``[B, D, h, w]``, or ``[B, h*w, D]`` when the shape is not kept.

        Args:
            image: ``[B, 3, H, W]``, sides multiples of the patch.
            readout: dense reading (:mod:`open_clip.readouts`), by name or built; None for the model's own. Cells have
                unit length unless the reading says otherwise (``readout.normalized``).
        """
        reading = self.resolve_readout(readout)
        inputs = self.block_inputs(image, reading.blocks(self))
        return reading.map(inputs) if keep_shape else reading(inputs)

    def encode_dense_many(self, image: Tensor, readouts: Sequence[str | Readout | None]) -> dict[str | None, Tensor]:
        """Maps ``[B, D, h, w]`` of several readings from one pass of the blocks that they have in common.

        Returns:
            By the name as it was given; of a built reading by its ``name``.

        Raises:
            ValueError: two built readings of the same name.
        """
        readings: dict[str | None, Readout] = {}
        for one in readouts:
            name = one.name if isinstance(one, Readout) else one
            reading = self.resolve_readout(one)
            if readings.setdefault(name, reading).spec() != reading.spec():
                raise ValueError(f'two readings are named "{name}": read one at a time')
        inputs = self.block_inputs(image, {i for r in readings.values() for i in r.blocks(self)})
        return {name: reading.map(inputs) for name, reading in readings.items()}

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

    def unreached_by_dense(self, readout: str | Readout | None = None) -> list[nn.Parameter]:
        """Parameters that a dense reading never uses: no loss on it can train them, and DDP would wait for them.

        Of fused projections some rows may be unread besides: :meth:`open_clip.readouts.Readout.unread` lists those too.
        """
        return [u.parameter for u in self.resolve_readout(readout).unread(self) if not u.index]
