"""Model FLOP utilisation: what share of a device's arithmetic a run makes use of."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

COUNTED = 4  # first steps of a run whose operations are counted; regions, and so the work, differ between steps

# Dense matrix products per second, in units of 1e12, as the makers state them: half precision, float32 on tensor cores
# (as TF32), float32 itself; None where nobody has said. The first pattern that fits counts.
_PEAKS = (
    (r"H100.*PCIe", 756.0, 378.0, 51.0),
    (r"H100.*NVL", 835.0, 418.0, 60.0),
    (r"H100|H200|GH200|H800", 989.0, 494.0, 67.0),
    (r"B200|GB200", 2250.0, 1125.0, None),
    (r"A100|A800", 312.0, 156.0, 19.5),
    (r"L40S", 362.0, 183.0, 91.6),
    (r"L40|RTX 6000 Ada", 181.0, 90.5, 90.5),
    (r"\bL4\b", 121.0, 60.0, 30.3),
    (r"\bA10G?\b", 125.0, 62.5, 31.2),
    (r"RTX A6000", 155.0, 75.0, 38.7),
    (r"\bA40\b", 155.0, 75.0, 37.4),
    (r"RTX 4090", 165.0, 82.6, 82.6),
    (r"RTX 3090", 71.0, 35.6, 35.6),
    (r"V100", 125.0, 15.7, 15.7),
)  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second that a GPU can do at most in matrix products of a dtype; None where nobody has said.

    Those of float32 are done as TF32 where PyTorch is told so, which it is not by itself.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for pattern, half, tf32, single in _PEAKS:
        if re.search(pattern, name):
            peak = half if dtype in (torch.float16, torch.bfloat16) else tf32 if _as_tf32() else single
            return peak and peak * 1e12
    return None


def _as_tf32() -> bool:
    """Whether products of float32 matrices may be done as TF32; PyTorch 2.9 has another switch than those before."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


_FORMULAS = {  # beside torch's own
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
_BELOW = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)  # the kernels themselves


class _Counter:
    """Counts operations and lets everything run as it would.

    A ``TorchDispatchMode``, such as torch's own counter, changes what it counts: while one is active, derivatives are
    computed by other formulas (of ``prod``, for one), compound operators may be taken apart and compiled code does not
    run, and all of that is rounded otherwise. Here the operators that count get, for as long as this lasts, a stop
    right before their kernels, below everything that decides what is computed.
    """

    def __init__(self) -> None:
        self.total = 0
        self._inside = threading.local()  # a backward pass has its own threads

    def __enter__(self) -> _Counter:
        self._library = torch.library.Library("aten", "IMPL")
        for packet, formula in {**flop_registry, **_FORMULAS}.items():
            if str(packet).startswith("aten."):
                for overload in packet.overloads():
                    operator = getattr(packet, overload)
                    name = operator.name().removeprefix("aten::")
                    self._library.impl(name, self._stop(operator, formula), "BackendSelect", with_keyset=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._library._destroy()

    def _stop(self, operator: Any, formula: Callable[..., int]) -> Callable[..., Any]:
        def stop(keys: Any, *args: Any, **kwargs: Any) -> Any:
            counts = not getattr(self._inside, "operator", False)  # kernels may be made of further products
            self._inside.operator = True
            try:
                result = operator.redispatch(keys & _BELOW, *args, **kwargs)
            finally:
                self._inside.operator = not counts
            if counts and not _is_meta(args):  # as the compiler's trials are
                self.total += formula(*args, **kwargs, out_val=result)
            return result

        return stop


def _is_meta(args: tuple) -> bool:
    return any(isinstance(a, torch.Tensor) and a.device.type == "meta" for a in args)


_counting = threading.Lock()  # there is one table of operators


class FlopMeter:
    """Counts the operations of a run's first steps, and tells from them how busy the devices are later.

    Products of matrices, convolutions and attention count, forward and backward, a multiplication and an addition as
    two; recomputed activations count as well, what a compiled kernel computes by itself does not.

    Args:
        peak: operations a second of one device; None if unknown.
        devices: how many compute.
    """

    def __init__(self, peak: float | None, devices: int) -> None:
        self.peak, self.devices, self.left = peak, devices, COUNTED
        self.operations, self.samples = 0.0, 0.0

    @contextlib.contextmanager
    def step(self, samples: int) -> Iterator[None]:
        """A step of this process with so many samples; nothing once enough steps have been counted."""
        if self.left <= 0 or not _counting.acquire(blocking=False):
            yield
            return
        try:
            with _Counter() as counter:
                yield
        finally:
            _counting.release()
        self.left -= 1
        self.operations += counter.total
        self.samples += samples

    def scalars(self, samples_per_second: float) -> dict[str, float]:
        """``train/tflops`` (1e12 operations a second of each device) and, where the peak is known, ``train/mfu``."""
        if not self.samples or not self.operations:
            return {}
        rate = self.operations / self.samples * samples_per_second / self.devices
        return {"train/tflops": rate / 1e12} | ({"train/mfu": rate / self.peak} if self.peak else {})
