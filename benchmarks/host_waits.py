"""Counts the places where a host would wait for its GPU, without a GPU.

A value that is read on the host, a boolean index, a result whose size depends on values, and a copy of host data that
waits: each of them halts the host until the device has caught up. Counted by call, from the operations that occur.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "equal", "allclose"}
_SIZED = {"nonzero", "argwhere", "unique", "unique_consecutive", "masked_select", "bincount", "histc"}
_HOST_DATA = {"new_tensor"}


class HostWaits(TorchFunctionMode):
    """``with HostWaits() as waits: ...`` counts; ``waits.places`` says where (file and line) and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self._inner = _Operators(self)

    @property
    def count(self) -> int:
        """All of them."""
        return sum(self.places.values())

    def __enter__(self) -> HostWaits:
        self._inner.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._inner.__exit__(*error)

    def note(self, name: str) -> None:
        """Count one, by the innermost line of the project's own code."""
        own = [f for f in traceback.extract_stack() if "/site-packages/" not in f.filename and __file__ != f.filename]
        own = [f for f in own if "<" not in f.filename]
        where = f"{own[-1].filename.split('/')[-1]}:{own[-1].lineno}" if own else "?"
        self.places[f"{where} {name}"] += 1

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _READS | _SIZED | _HOST_DATA and not _asked_for_host(name, args):
            self.note(name)
        elif name in ("__getitem__", "__setitem__") and _has_mask(args[1]):
            self.note("boolean index")
        elif name in ("tensor", "as_tensor") and kwargs.get("device") is not None and not isinstance(args[0], Tensor):
            self.note("host data")
        elif name == "repeat_interleave" and isinstance(args[1] if len(args) > 1 else None, Tensor):
            if kwargs.get("output_size") is None:
                self.note(name)
        return func(*args, **kwargs)


class _Operators(TorchDispatchMode):
    """Operators that the level of functions does not see."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if str(func).startswith("torchvision.nms"):
            self.waits.note("nms")
        return func(*args, **(kwargs or {}))


def _asked_for_host(name: str, args: tuple) -> bool:
    return name == "equal" and not (args and isinstance(args[0], Tensor))


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) for part in parts)
