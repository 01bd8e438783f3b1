"""Which kernels attention runs on, within a block of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip
ATTENTIONS = ("auto", *_BACKENDS)


@contextmanager
def prefer_attention(name: str) -> Iterator[None]:
    """Attention takes one kind of kernel within, in all threads; ``"auto"`` leaves the order as it is.

    What that kernel cannot do (flash attention: the masks of some dense readings) goes to the others. ``"math"`` is
    the exception: it can do everything, and nothing else is used.
    """
    if name == "auto":
        yield
        return
    others = [] if name == "math" else [b for n, b in _BACKENDS.items() if n != name]
    with sdpa_kernel([_BACKENDS[name], *others], set_priority=True):
        yield


def attention_for_crops(asked: str) -> str:
    """The kind of kernel for inputs whose number changes from step to step, by what ``--attention`` asks for.

    PyTorch's own choice on recent GPUs is cuDNN, which builds a kernel for every new shape (0.15 s on an H200); flash
    attention has one for all.
    """
    return "flash" if asked == "auto" else "auto"
