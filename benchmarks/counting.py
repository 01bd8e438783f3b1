"""What a piece of PyTorch code does, counted without doing it: FLOP, bytes moved, kernels.

The code runs on the meta device: shapes only, no memory, no arithmetic. Attention is counted as one fused kernel, as
flash attention moves queries, keys, values and the output once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_counts: list[Count] = []  # of the pieces under way, the innermost last


@dataclass
class Count:
    """Kernels that were started: (FLOP, bytes read and written, whether it is attention) of each.

    A FLOP is half a multiply-add of matrix products and attention; other arithmetic is free beside its bytes.
    """

    kernels: list[tuple[float, float, bool]] = field(default_factory=list)

    @property
    def flop(self) -> float:
        """FLOP of all kernels."""
        return sum(k[0] for k in self.kernels)

    @property
    def bytes(self) -> float:
        """Bytes that all kernels read and write."""
        return sum(k[1] for k in self.kernels)

    def __add__(self, other: Count) -> Count:
        return Count(self.kernels + other.kernels)

    def seconds(self, *, flops: float, bandwidth: float, launch: float = 0.0, attention: float = 1.0) -> float:
        """Time of one kernel after the other, each bound by arithmetic, memory or its start (Williams et al. 2009).

        Args:
            flops: FLOP/s of matrix products. bandwidth: bytes/s of memory. launch: seconds to start a kernel.
            attention: share of ``flops`` that attention reaches.
        """
        return sum(max(f / (flops * (attention if a else 1)), b / bandwidth, launch) for f, b, a in self.kernels)

    def products(self) -> Count:
        """The kernels with arithmetic alone: what would be left if all others were fused into them."""
        return Count([k for k in self.kernels if k[0]])


def _size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, Tensor))


def _on_host(*values: Any) -> bool:
    """Whether every tensor lies on the CPU: arithmetic of the host, beside the device whose kernels are counted."""
    devices = {t.device.type for t in tree_leaves(values) if isinstance(t, Tensor)}
    return devices == {"cpu"}


class _Counting(TorchDispatchMode):
    """Counts every operator that starts a kernel: one whose result is neither a view nor freshly allocated memory."""

    FREE = ("empty", "detach", "lift_fresh", "resize_", "_unsafe_view", "new_empty")

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[-1]
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if views or name.startswith(self.FREE) or _on_host(args, kwargs, out):
            return out
        flops = flop_registry.get(function.overloadpacket)
        flop = 0 if flops is None else flops(*args, **(kwargs or {}), out_val=out)
        self.count.kernels.append((float(flop), float(_size(args) + _size(kwargs) + _size(out)), False))
        return out


class _FusedAttention(torch.autograd.Function):
    """Attention as one kernel forward and one backward; the counts are added by hand, the shapes are right."""

    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        context.save_for_backward(q, k, v)
        _attention(q, k, v, products=2)
        return q.new_empty(*q.shape[:-1], v.shape[-1])

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = context.saved_tensors
        # The recomputation of q k^T inside the kernel is time that is really spent, so it is counted here.
        _attention(q, k, v, products=5, passes=2)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _attention(q: Tensor, k: Tensor, v: Tensor, *, products: int, passes: int = 1) -> None:
    count, batch = _counts[-1], math.prod(q.shape[:-2])
    flop = products * 2.0 * batch * q.shape[-2] * k.shape[-2] * q.shape[-1]
    count.kernels += [(flop / passes, 2.0 * _size(q) + _size((k, v)), True)] * passes


@contextlib.contextmanager
def counting() -> Iterator[Count]:
    """Count what runs inside, forward and backward.

    Example::

        with counting() as count:
            model(torch.empty(2, 3, 224, 224, device="meta")).sum().backward()
        print(count.flop)
    """
    count = Count()

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _FusedAttention.apply(q, k, v)

    def no_autocast(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # the meta device knows none: dtypes are those of the tensors

    _counts.append(count)
    try:
        with (
            mock.patch.object(F, "scaled_dot_product_attention", attention),
            mock.patch.object(torch, "autocast", no_autocast),
            _Counting(count),
        ):
            yield count
    finally:
        _counts.pop()
