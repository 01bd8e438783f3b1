"""Model FLOP utilisation: what share of a device's arithmetic a run makes use of."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

COUNTED = 4  # first steps of a run whose operations are counted; regions, and so the work, differ between steps
COUNTED_COMPILED = 1
KEPT = 10_000  # operators with different shapes whose operations are remembered

# Dense matrix products per second, in units of 1e12, as the makers state them: half precision, then float32 (on tensor
# cores as TF32 where PyTorch is allowed to). The first pattern that fits counts.
_PEAKS = (
    (r"H100.*PCIe", 756.0, 378.0),
    (r"H100.*NVL", 835.0, 418.0),
    (r"H100|H200|GH200|H800", 989.0, 494.0),
    (r"B200|GB200", 2250.0, 1125.0),
    (r"A100|A800", 312.0, 156.0),
    (r"L40S", 362.0, 183.0),
    (r"L40|RTX 6000 Ada", 181.0, 90.5),
    (r"\bL4\b", 121.0, 60.0),
    (r"\bA10G?\b", 125.0, 62.5),
    (r"RTX A6000|\bA40\b", 155.0, 75.0),
    (r"RTX 4090", 165.0, 82.6),
    (r"RTX 3090", 71.0, 35.6),
    (r"V100", 125.0, 15.7),
)  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second that a GPU can do at most in matrix products of a dtype; None where nobody has said."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for pattern, half, single in _PEAKS:
        if re.search(pattern, name):
            return (half if dtype in (torch.float16, torch.bfloat16) else single) * 1e12
    return None


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


_FORMULAS = {  # beside torch's own
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class _Counter(TorchDispatchMode):
    """Counts operations and lets everything run as it would.

    torch's own counter takes compound operators apart, and what they then compute differs in the last bits. Here they
    are taken apart on tensors without data, beside the computation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    # Taking an operator apart takes milliseconds, and a step has thousands of few different kinds and shapes.
    _known: ClassVar[dict[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        kind = func._overloadpacket
        formula = flop_registry.get(kind) or _FORMULAS.get(kind)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        elif torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            self.total += self._inside(func, args, kwargs)
        return result

    def _inside(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> int:
        """Operations of a compound operator, which follow from shapes and from what is no tensor."""
        leaves, structure = tree_flatten((args, kwargs))
        key = (func, str(structure), tuple(_facts(leaf) for leaf in leaves))
        if (known := self._known.get(key)) is not None:
            return known
        with torch.no_grad(), FlopCounterMode(display=False) as inner:
            with contextlib.suppress(Exception):  # what needs its data is no product
                func(*_without_data(args), **_without_data(kwargs))
        if len(self._known) >= KEPT:
            self._known.clear()
        return self._known.setdefault(key, inner.get_total_flops())


def _facts(value: Any) -> Any:
    """What of an argument the number of operations may follow from, hashable."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return type(value), repr(value)


def _without_data(values: Any) -> Any:
    def shape(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    return tree_map_only(torch.Tensor, shape, values)


class FlopMeter:
    """Counts the operations of a run's first steps, and tells from them how busy the devices are later.

    Products of matrices, convolutions and attention count, forward and backward, a multiplication and an addition as
    two; recomputed activations count as well, what a compiled kernel fuses away does not.

    Args:
        peak: operations a second of one device; None if unknown.
        devices: how many compute.
        compiled: whether the module is compiled. PyTorch runs it uncompiled while operations are counted; as that may
            take more memory than there is, a single step is counted, with activations kept on the CPU.
    """

    def __init__(self, peak: float | None, devices: int, *, compiled: bool = False) -> None:
        self.peak, self.devices, self.compiled = peak, devices, compiled
        self.left = COUNTED_COMPILED if compiled else COUNTED
        self.operations, self.samples = 0.0, 0.0

    @contextlib.contextmanager
    def step(self, samples: int) -> Iterator[None]:
        """A step of this process with so many samples; nothing once enough steps have been counted."""
        if self.left <= 0:
            yield
            return
        memory = torch.autograd.graph.save_on_cpu() if self.compiled else contextlib.nullcontext()
        with memory, _Counter() as counter:
            yield
        self.left -= 1
        self.operations += counter.total
        self.samples += samples

    def scalars(self, samples_per_second: float) -> dict[str, float]:
        """``train/tflops`` (1e12 operations a second of each device) and, where the peak is known, ``train/mfu``."""
        if not self.samples or not self.operations:
            return {}
        rate = self.operations / self.samples * samples_per_second / self.devices
        return {"train/tflops": rate / 1e12} | ({"train/mfu": rate / self.peak} if self.peak else {})
