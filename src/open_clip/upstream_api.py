"""Members of OpenCLIP's models that neither training nor dense readings need, as classes to inherit from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class ImageSize(int):
    """Native side of a square model: a number, which also unpacks as OpenCLIP's (height, width)."""

    @staticmethod
    def of(size: int | Sequence[int]) -> ImageSize | tuple[int, int]:
        """An :class:`ImageSize` of a side or of two equal ones; a plain (height, width) of two others."""
        sides = (size, size) if isinstance(size, int) else tuple(int(s) for s in size)
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"image size is {size}: give a side, or height and width, in pixels")
        return ImageSize(sides[0]) if sides[0] == sides[1] else sides

    def __iter__(self):
        return iter((int(self), int(self)))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index):
        return (int(self), int(self))[index]

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, (tuple, list)) else int(self) == other

    __hash__ = int.__hash__


def taken_blocks(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Indices of blocks, ascending: all (None), the last n (a number), or those of a list, negative from the end."""
    if indices is None:
        return list(range(count))
    wanted = range(count - indices, count) if isinstance(indices, int) else [i + count if i < 0 else i for i in indices]
    wrong = [i for i in wanted if not 0 <= i < count]
    if wrong:
        raise ValueError(f"blocks {wrong} do not exist: there are {count}")
    return sorted(set(wanted))


class ImageTowerAPI:
    """OpenCLIP's members of an image tower, on top of :class:`open_clip.image_tower.ImageTower`'s own."""

    fill_color = 0

    @property
    def grid_size(self) -> tuple[int, int]:
        """Cells (h, w) at the native size."""
        return self.native_grid

    @property
    def preprocess_cfg(self) -> dict[str, Any]:
        """How images are prepared: size (h, w), mode, mean, std, interpolation, resize_mode, fill_color."""
        size = self.image_size
        return {
            "size": (size, size) if type(size) is int else tuple(size),
            "mode": "RGB",
            "mean": tuple(self.image_mean),
            "std": tuple(self.image_std),
            "interpolation": self.interpolation,
            "resize_mode": self.resize_mode,
            "fill_color": self.fill_color,
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are usually not decayed: positions and extra tokens."""
        names = {f"trunk.{n}" for n in self.trunk.no_weight_decay()}
        return names & {n for n, _ in self.named_parameters()}

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: str = "NCHW",
        output_extra_tokens: bool = False,
    ) -> dict[str, Tensor | list[Tensor]]:
        """Outputs of blocks of the global reading.

        Args:
            x: normalised images ``[B, 3, H, W]``.
            indices: a number for the last so many blocks, a list of blocks (negative from the end), None for all.
            stop_early: compute no block behind the last wanted; the global embedding is then read from that one.
            normalize_intermediates: apply the final norm to them.
            intermediates_only: leave the global embedding out.
            output_fmt: ``"NCHW"`` (maps ``[B, W, h, w]``) or ``"NLC"`` (``[B, h*w, W]``).
            output_extra_tokens: also return class token and registers ``[B, n, W]``.

        Returns:
            ``image_intermediates``, one per block in forward order; ``image_intermediates_prefix`` if asked for;
            ``image_features``, the global embedding ``[B, D]``.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f'output_fmt is "{output_fmt}": use NCHW or NLC')
        grid, count, prefix = self.grid(x), len(self.trunk.blocks), self.num_prefix_tokens
        wanted = taken_blocks(count, indices)
        x, rope = self.embed(x)
        maps, extra = [], []
        for i in range(max(wanted, default=-1) + 1 if stop_early else count):
            x = self.run_block(i, x, rope)
            if i in wanted:
                tokens = self.trunk.norm(x) if normalize_intermediates else x
                extra.append(tokens[:, :prefix])
                patches = tokens[:, prefix:]
                maps.append(patches.transpose(1, 2).unflatten(2, grid) if output_fmt == "NCHW" else patches)
        out: dict[str, Tensor | list[Tensor]] = {"image_intermediates": maps}
        if output_extra_tokens and prefix:
            out["image_intermediates_prefix"] = extra
        if not intermediates_only:
            out["image_features"] = self.trunk.forward_head(self.trunk.norm(x))
        return out


class CLIPAPI:
    """OpenCLIP's members of a model, on top of :class:`open_clip.model.CLIP`'s own.

    Attributes:
        config: the config that the model was built from, with what the factory changed; None for towers put together
            by hand.
    """

    config: dict | None = None

    # The text tower's parts by the names that they have where OpenCLIP's text tower is not a module of its own.

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.text.vocab_size

    @property
    def token_embedding(self) -> nn.Embedding:
        """Table of token embeddings."""
        return self.text.token_embedding

    @property
    def positional_embedding(self) -> nn.Parameter:
        """Position embeddings of the text tower ``[L, W]``."""
        return self.text.positional_embedding

    @property
    def transformer(self) -> nn.Module:
        """Blocks of the text tower."""
        return self.text.transformer

    @property
    def ln_final(self) -> nn.LayerNorm:
        """Final norm of the text tower."""
        return self.text.ln_final

    @property
    def text_projection(self) -> nn.Module | nn.Parameter | None:
        """Projection of the text tower to the joint dimension."""
        return self.text.text_projection

    @property
    def attn_mask(self) -> Tensor | None:
        """Causal mask of the text tower ``[L, L]``; None for one that sees both ways."""
        return self.text.attn_mask

    @property
    def text_pool_type(self) -> str:
        """Token at which the text tower is read."""
        return self.text.pool

    @property
    def text_eos_id(self) -> int:
        """Id of the end token where the text tower is read at one."""
        return self.text.eos_id

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled similarities of images and texts: ``[B_image, B_text]`` and its transpose."""
        features = [self.encode_image(image, normalize=True), self.encode_text(text, normalize=True)]
        return self._logits(*features)

    def _logits(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logit_scale.exp() * image_features @ text_features.T
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return logits, logits.T

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are usually not decayed: positions and extra tokens of both towers."""
        towers = {"visual": self.visual, "text": self.text}
        return {f"{tower}.{name}" for tower, module in towers.items() for name in module.no_weight_decay()}

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freeze the text tower except its last ``unlocked_layers`` groups; 0 freezes all of it.

        See :meth:`open_clip.text_tower.TextTower.lock`.
        """
        self.text.lock(unlocked_layers, freeze_layer_norm)

    def forward_intermediates(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        image_indices: int | Sequence[int] | None = None,
        text_indices: int | Sequence[int] | None = None,
        stop_early: bool = False,
        normalize: bool = True,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        image_output_fmt: str = "NCHW",
        image_output_extra_tokens: bool = False,
        text_output_fmt: str = "NLC",
        text_output_extra_tokens: bool = False,
        output_logits: bool = False,
        output_logit_scale_bias: bool = False,
    ) -> dict[str, Tensor | list[Tensor]]:
        """Outputs of blocks of both towers beside what :meth:`forward` returns.

        Arguments and results are those of :meth:`ImageTowerAPI.forward_intermediates` and
        :meth:`open_clip.text_tower.TextTower.forward_intermediates`, and:

        Args:
            normalize: embeddings of unit length.
            output_logits: also ``image_logits`` and ``text_logits`` (see :meth:`get_logits`); needs both inputs.
            output_logit_scale_bias: also ``logit_scale``, exponentiated, and ``logit_bias`` where there is one.
        """
        if output_logits and (image is None or text is None or intermediates_only):
            raise ValueError("output_logits needs the embeddings of images and texts")
        out: dict[str, Any] = {}
        common = {
            "stop_early": stop_early, "normalize_intermediates": normalize_intermediates,
            "intermediates_only": intermediates_only,
        }  # fmt: skip
        if image is not None:
            out |= self.visual.forward_intermediates(
                image, indices=image_indices, output_fmt=image_output_fmt,
                output_extra_tokens=image_output_extra_tokens, **common,
            )  # fmt: skip
        if text is not None:
            out |= self.text.forward_intermediates(
                text, indices=text_indices, output_fmt=text_output_fmt,
                output_extra_tokens=text_output_extra_tokens, **common,
            )  # fmt: skip
        for name in ("image_features", "text_features"):
            if name in out and normalize:
                out[name] = F.normalize(out[name], dim=-1)
        if output_logits:
            logits = self._logits(out["image_features"], out["text_features"])
            out["image_logits"], out["text_logits"] = logits
        if output_logits or output_logit_scale_bias:
            out["logit_scale"] = self.logit_scale.exp()
            if self.logit_bias is not None:
                out["logit_bias"] = self.logit_bias
        return out
