"""MLPs whose width is no multiple of 8, computed in a padded width where a GPU computes in half precision.

EVA02-CLIP-L-14 has an MLP of 2730 units: rows of 5460 bytes, of which one in four begins at a multiple of the 16 bytes
that tensor cores load at once, so its matrix products leave their fast kernels. Here weights and activations are
padded with zeros to the next multiple of 64, whose rows begin on lines of 128 bytes. Kernels work on tiles of at least
64 units, so that a multiple of 8 would start as many tiles: 43 of 64 units for 2730, 2736 and 2752 alike; by the counts
of ``benchmarks/roofline.py`` it would save 0.2 % of L/14's teacher.

Padded is what is computed, never what is stored: weights, their names, gradients and all that is derived of them
(checkpoints, optimizer, ensembles, identities) are those of the module, which is why training, data parallelism,
sharding, compiling and recomputation need no word about it. A copy of the weights in the type of the computation is
made in each pass, as autocast makes one anyway. By the same counts, all this pays uncompiled where products with odd
rows are slower than aligned ones by a quarter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

ALIGNED = 8  # numbers of 2 bytes in the 16 that a tensor core's load takes
MULTIPLE = 64  # numbers of 2 bytes in a line of memory, and the least width of a kernel's tile


def padded_width(width: int) -> int:
    """The width in which an MLP is computed: itself where it is a multiple of 8, else the next multiple of 64."""
    return width if width % ALIGNED == 0 else -(-width // MULTIPLE) * MULTIPLE


class _Padded:
    """The forward pass of timm's MLPs in a padded width; see :mod:`open_clip.mlp_widths`.

    Zero rows of the first weight give zero units, and zero columns of the second leave them out, whatever the
    activation makes of them. An inner norm has to see the real units alone. They are taken before the activation,
    which writes them densely without a pass of its own, and the norm's output is padded: one copy, and the norm is the
    module's own, bit by bit, in every type. Sums over zeros corrected for their number would save this copy, but take
    a kernel for the mean and round the norm's weights in bfloat16.
    """

    #: None: where it helps, on a GPU in half precision. True or False: always or never.
    pads: bool | None = None

    def _padded_type(self, x: Tensor) -> torch.dtype | None:
        """The type in which to compute padded; None for timm's own forward pass."""
        if self.pads is False or (self.pads is None and not x.is_cuda):
            return None
        kind, dtype = x.device.type, self.fc2.weight.dtype
        if not x.is_meta and torch.is_autocast_enabled(kind):  # the meta device knows no autocast
            dtype = torch.get_autocast_dtype(kind)
        return dtype if self.pads or dtype in (torch.float16, torch.bfloat16) else None

    def _first(self) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """Weights ``[n, C]`` and biases ``[n]`` of the products of the input."""
        raise NotImplementedError

    def _mix(self, products: Sequence[Tensor]) -> Tensor:
        """Units before dropout and norm, of the products."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C] -> [..., C]``, as the module without padding."""
        dtype = self._padded_type(x)
        if dtype is None:
            return super().forward(x)
        width = self.fc2.in_features
        more = padded_width(width) - width
        weights, biases = self._first()
        inner, outer = weights[0].shape[1], self.fc2.out_features
        zeros = weights[0].new_zeros(more * max(inner, outer), dtype=dtype)  # one kernel for all that is added
        rows = zeros[: more * inner].view(more, inner)
        weight = torch.cat([t for w in weights for t in (w.to(dtype), rows)])
        bias = None
        if biases[0] is not None:
            bias = torch.cat([t for b in biases for t in (b.to(dtype), zeros[:more])])
        products = F.linear(x, weight, bias)  # all at once: one large product instead of two
        normed = not isinstance(self.norm, nn.Identity)
        if normed:
            h = self._mix(products.split([width, more] * len(weights), dim=-1)[::2])
            h = self.norm(self.drop1(h)).to(dtype)
            h = torch.cat([h, h.new_zeros(*h.shape[:-1], more)], dim=-1)
        else:
            h = self.drop1(self._mix(products.chunk(len(weights), dim=-1)))
        columns = zeros[: outer * more].view(outer, more)
        h = F.linear(h, torch.cat([self.fc2.weight.to(dtype), columns], dim=1), self.fc2.bias)
        return self.drop2(h)


class PaddedMlp(_Padded, Mlp):
    """Linear, activation, linear."""

    def _first(self) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        return [self.fc1.weight], [self.fc1.bias]

    def _mix(self, products: Sequence[Tensor]) -> Tensor:
        return self.act(products[0])


class PaddedSwiGLU(_Padded, SwiGLU):
    """A gated one with two layers."""

    def _first(self) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        return [self.fc1_g.weight, self.fc1_x.weight], [self.fc1_g.bias, self.fc1_x.bias]

    def _mix(self, products: Sequence[Tensor]) -> Tensor:
        return self.act(products[0]) * products[1]


class PaddedGluMlp(_Padded, GluMlp):
    """A gated one with one layer of twice the width."""

    def _first(self) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        bias = self.fc1.bias
        return self.fc1.weight.chunk(2), (None, None) if bias is None else bias.chunk(2)

    def _mix(self, products: Sequence[Tensor]) -> Tensor:
        first, second = products
        return first * self.act(second) if self.gate_last else self.act(first) * second


_FORMS = {Mlp: PaddedMlp, SwiGLU: PaddedSwiGLU, GluMlp: PaddedGluMlp}


def pad_mlps(trunk: nn.Module, pads: bool | None = None) -> set[tuple[int, int]]:
    """Have the MLPs of odd width in a trunk compute in a padded one, in place; all else of them stays.

    Args:
        pads: None for where it helps; True for everywhere, False for nowhere.

    Returns:
        (width, padded width) of those that were found; those of a type unknown here are left alone.
    """
    found = set()
    for module in trunk.modules():
        if type(module) in _FORMS and isinstance(module.fc2, nn.Linear) and module.fc2.in_features % ALIGNED:
            module.__class__ = _FORMS[type(module)]
        if isinstance(module, _Padded):
            module.pads = pads
            found.add((module.fc2.in_features, padded_width(module.fc2.in_features)))
    return found
