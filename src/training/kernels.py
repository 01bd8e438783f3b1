"""The GPU kernels that a model's attention and MLPs run on: chosen (``--attention``), and said at the start."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from open_clip import ImageTower
from training.engine.errors import UserError

log = logging.getLogger(__name__)

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip
ATTENTIONS = ("auto", *_BACKENDS)


class Reader(NamedTuple):
    """A tower as it will be used.

    Attributes:
        side: of its input, pixels.
        dtype: in which it computes.
    """

    tower: ImageTower
    side: int
    dtype: torch.dtype


@contextmanager
def prefer_attention(name: str) -> Iterator[None]:
    """Attention takes one kind of kernel within, in all threads; ``"auto"`` leaves PyTorch its own order.

    What that kernel cannot do (flash attention: the masks of some dense readings) goes to the others. ``"math"`` is
    the exception: it can do everything, and nothing else is used.
    """
    if name == "auto":
        yield
        return
    others = [] if name == "math" else [b for n, b in _BACKENDS.items() if n != name]
    with sdpa_kernel([_BACKENDS[name], *others], set_priority=True):
        yield


def attention_kernel(reader: Reader, device: torch.device | str) -> str:
    """Name of the attention kernel that PyTorch takes for a tower's blocks on a device: flash, cudnn, efficient or
    math."""
    tower = reader.tower
    heads = tower.trunk.blocks[0].attn.num_heads
    tokens = (reader.side // tower.patch_size) ** 2 + tower.num_prefix_tokens
    q = torch.empty(1, heads, tokens, tower.width // heads, dtype=reader.dtype, device=device)
    backend = SDPBackend(torch.ops.aten._fused_sdp_choice(q, q, q))
    return backend.name.lower().removesuffix("_attention")


def check_attention(name: str, readers: Mapping[str, Reader], device: torch.device) -> None:
    """See that every tower's attention is of the kind that was asked for; to be called inside
    :func:`prefer_attention`.

    Raises:
        UserError: a tower, its type or the device cannot have it.
    """
    if name == "auto":
        return
    for owner, reader in readers.items():
        kernel = attention_kernel(reader, device)
        if kernel != name:
            kind = str(reader.dtype).removeprefix("torch.")
            raise UserError(
                f"--attention {name}: PyTorch has no such kernel for the {owner} in {kind} on {device.type} and would "
                f"take {kernel}: use --attention auto or {kernel}, or another --precision"
            )


def report_kernels(readers: Mapping[str, Reader], device: torch.device) -> None:
    """Log which attention kernels PyTorch takes, and which MLPs are computed in a padded width.

    A slow attention on a GPU deserves a warning.
    """
    kernels = {owner: attention_kernel(reader, device) for owner, reader in readers.items()}
    log.info("attention kernels: %s", ", ".join(f"{owner} {kernel}" for owner, kernel in kernels.items()))
    if device.type != "cuda":
        return
    for owner, reader in readers.items():
        if reader.dtype in (torch.float16, torch.bfloat16):
            for width, padded in sorted(reader.tower.padded_widths):
                log.info("MLPs of the %s: %d units are computed as %d, in aligned rows", owner, width, padded)
    slow = [owner for owner, kernel in kernels.items() if kernel == "math"]
    if slow:
        log.warning(
            "attention of the %s is not fused, which is slow and takes much memory: --precision amp_bf16 has fused "
            "kernels on every recent GPU", " and the ".join(slow),
        )  # fmt: skip
