"""The dense half of an image tower: its dense reading, passes that feed readings, and maps.

What a dense pass is given besides images are their ``sizes``: the part of a padded input that is picture. It then
leaves out what nobody reads, or padding altogether.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from . import timm_blocks
from .packed_blocks import drops_at_random, partial_block
from .padding import Canvas, Sizes, without_prefix
from .readouts import DEFAULT, SPEC_KEY, BlockInputs, Readout, build_readout, read_spec, write_spec


class DensePasses:
    """Dense readings of a tower with a ``trunk`` (see :class:`open_clip.ImageTower`)."""

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
        built = readout if isinstance(readout, Readout) else build_readout(readout, self, **options)
        self.readout = built.to(next(self.trunk.parameters()).device)
        self._write_spec()

    def set_drop_padding(self, drop: bool) -> None:
        """Whether dense passes leave padding out; like the dense reading, what the weights' file says of them.

        Class token and cells of the image attend to each other alone, with the positions that they have in the square
        around the input. That is another function than the published one, in which padding takes part. It acts where
        calls are given ``sizes``, and on inputs that are not square. A trunk that drops activations at random cannot be
        trained so on images of different sizes.
        """
        self.drop_padding = bool(drop)
        self._write_spec()

    def dense_spec(self) -> dict[str, Any]:
        """The dense reading, and whether padding is dropped: what stands among the weights."""
        return {**self.readout.spec(), **({"drop_padding": True} if self.drop_padding else {})}

    def _write_spec(self) -> None:
        # Among the weights, so that any kind of file keeps it; the default is not written, which keeps files as ever.
        default = self.dense_spec() == build_readout(DEFAULT, self).spec()
        home = next(self.trunk.parameters()).device
        self.register_buffer("readout_spec", None if default else write_spec(self.dense_spec()).to(home))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Of ``load_state_dict``, which people call on models of their own making: it keeps the reading as well."""
        self.adopt_readout(state_dict, prefix=prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def adopt_readout(self, state: dict[str, Tensor], source: str = "state dict", prefix: str = "visual.") -> None:
        """Ahead of loading a state dict: take over the reading that it names.

        A state dict that names none leaves the model's own in place, and gets its entries here.

        Args:
            prefix: of the tower's entries; by default as a CLIP has them.
        """
        key = prefix + SPEC_KEY.removeprefix("visual.")
        if key in state:
            spec = read_spec(state[key], source)
            drop = bool(spec.pop("drop_padding", False))
            try:
                if spec != self.readout.spec():
                    self.set_readout(build_readout(tower=self, **spec))
                self.set_drop_padding(drop)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{source}: {error}") from error
            if self.readout_spec is None:
                del state[key]
        else:
            own = {prefix + n: t for n, t in self.state_dict().items() if n.startswith("readout")}
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

    # -- passes ----------------------------------------------------------------------------------------------------

    def block_inputs(self, image: Tensor, blocks: Iterable[int] = (-1,), sizes: Sizes | None = None) -> BlockInputs:
        """One pass up to the last of some blocks: the tokens that enter these, for readings and projections.

        Args:
            image: ``[B, 3, H, W]``.
            blocks: indices; negative ones count from the end.
            sizes: see :meth:`encode_dense`.

        Raises:
            ValueError: a block or size that does not exist, an image whose sides are no multiples of the patch, or
                images of different sizes without padding in a trunk in training mode that drops at random.
        """
        timm_blocks.check_dense(self.trunk)
        blocks, count = set(blocks), len(self.trunk.blocks)
        wrong = sorted(i for i in blocks if not -count <= i < count)
        if wrong:
            raise ValueError(f"blocks {wrong} do not exist: the trunk has blocks 0 to {count - 1}")
        asked, grid, prefix = {i % count for i in blocks}, self.grid(image), self.num_prefix_tokens
        canvas = Canvas.of(sizes, len(image), grid, self.patch_size) if self.drop_padding else None
        packed = canvas is not None and not canvas.uniform
        if packed and self._drops_now:
            raise ValueError("padding cannot be left out in training with dropout or drop path: set their rates to 0")
        x, table = self.embed(image, canvas)
        tokens: dict[int, Tensor] = {}
        cells: dict[int, Tensor] = {}
        for i in range(max(asked, default=-1) + 1):
            if i > 0:
                x = self.run_block(i - 1, x, table, canvas=canvas)
            if i in asked:
                tokens[i], cells[i] = x, without_prefix(x, canvas.numbers, prefix) if packed else x[:, prefix:]
        inner = grid if canvas is None or packed else canvas.taken[0]
        return BlockInputs(self, tokens, cells, table, inner, canvas)

    @property
    def _drops_now(self) -> bool:
        return self.trunk.training and drops_at_random(self.trunk)

    def _read_inputs(self, image: Tensor, reading: Readout, sizes: Sizes | None) -> BlockInputs:
        """:meth:`block_inputs` for one reading; the last block but one makes nothing that the reading leaves alone.

        Class token and cells on padding are read by no one after that block where the last one treats cells apart and
        the caller looks at the image alone. A cell of padding beside it stays, as RoIAlign looks across the border.
        """
        last, prefix = len(self.trunk.blocks) - 1, self.num_prefix_tokens
        blocks = reading.blocks(self)
        if sizes is None or self.drop_padding or not self.leave_unread or not reading.tokenwise or blocks != (last,):
            return self.block_inputs(image, blocks, sizes)
        kept = Canvas.of(sizes, len(image), self.grid(image), self.patch_size, margin=1)
        if kept.full or last == 0 or self._drops_now or timm_blocks.is_watched(self.trunk.blocks[last - 1]):
            return self.block_inputs(image, blocks)
        inputs = self.block_inputs(image, (last - 1,))
        x, table = inputs.tokens[last - 1], inputs.rotary(last - 1)
        kept_table = None if table is None else kept.rows_of(table)
        x = self.run(
            partial_block, self.trunk.blocks[last - 1], x, kept.gather(x[:, prefix:]), table, kept_table, prefix,
            kept.numbers, self.faster, self.changing_kernels,
        )  # fmt: skip
        return BlockInputs(self, {}, {last: x}, inputs.table, inputs.grid, kept)

    def dense_tokens(
        self,
        image: Tensor,
        take: Sequence[int] = (),
        readout: str | Readout | None = None,
        sizes: Sizes | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Tokens ``[B, h*w, W]`` of a dense reading, before the final norm; no prefix tokens.

        Args:
            take: indices of ordinary blocks whose outputs are returned as well, as maps ``[B, W, h, w]`` in that order.
                The index of the last block stands for the reading's tokens.
            readout, sizes: see :meth:`encode_dense`.
        """
        last = len(self.trunk.blocks) - 1
        missing = sorted(i for i in take if not 0 <= i <= last)
        if missing:
            raise ValueError(f"blocks {missing} do not exist: the trunk has blocks 0 to {last}")
        reading = self.resolve_readout(readout)
        inputs = self.block_inputs(image, (*reading.blocks(self), *(i + 1 for i in take if i < last)), sizes)
        tokens = inputs.spread(reading.all_tokens(inputs))
        levels = []
        for i in take:
            own = i == last
            cells, grid = (tokens, reading.grid(inputs)) if own else (inputs.spread(inputs.cells[i + 1]), inputs.grid)
            levels.append(cells.transpose(1, 2).unflatten(2, inputs.canvas.grid if inputs.canvas else grid))
        return tokens, levels

    def project_dense(self, x: Tensor, readout: str | Readout | None = None) -> Tensor:
        """What follows :meth:`dense_tokens`: final norm, (per-token pooling head,) projection and L2 normalisation,
        as far as the reading has them: ``[B, N, W] -> [B, N, D]``."""
        return self.resolve_readout(readout).embed(self, x)

    def encode_dense(
        self,
        image: Tensor,
        keep_shape: bool = True,
        readout: str | Readout | None = None,
        sizes: Sizes | None = None,
    ) -> Tensor:
        """Dense embedding: ``[B, D, h, w]``, or ``[B, h*w, D]`` when the shape is not kept.

        Args:
            image: ``[B, 3, H, W]``, sides multiples of the patch.
            readout: dense reading (:mod:`open_clip.readouts`), by name or built; None for the model's own. Cells have
                unit length unless the reading says otherwise (``readout.normalized``).
            sizes: per image the pixels (height, width) that it takes of the input, top left; the rest is padding, of
                which the caller reads nothing. With them less is computed: exactly the same on the image, or, where
                :attr:`drop_padding` is set, as if there were no padding. On padding the map repeats the image's border.
        """
        reading = self.resolve_readout(readout)
        inputs = self._read_inputs(image, reading, sizes)
        return reading.map(inputs) if keep_shape else reading(inputs)

    def encode_dense_many(
        self,
        image: Tensor,
        readouts: Sequence[str | Readout | None],
        sizes: Sizes | None = None,
    ) -> dict[str | None, Tensor]:
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
        inputs = self.block_inputs(image, {i for r in readings.values() for i in r.blocks(self)}, sizes)
        return {name: reading.map(inputs) for name, reading in readings.items()}

    def unreached_by_dense(self, readout: str | Readout | None = None) -> list[nn.Parameter]:
        """Parameters that a dense reading never uses: no loss on it can train them, and DDP would wait for them.

        Of fused projections some rows may be unread besides: :meth:`open_clip.readouts.Readout.unread` lists those too.
        """
        return [u.parameter for u in self.resolve_readout(readout).unread(self) if not u.index]
