"""The GPU kernels that a model's attention and MLPs run on: checked (``--attention``), and said at the start."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend

from open_clip import ImageTower
from training.engine.attention import prefer_attention
from training.engine.errors import UserError

log = logging.getLogger(__name__)


class Reader(NamedTuple):
    """A tower as it will be used.

    Attributes:
        side: of its input, pixels.
        dtype: in which it computes.
        attention: kind of kernel that it takes for itself, as in :func:`~training.engine.attention.prefer_attention`.
    """

    tower: ImageTower
    side: int
    dtype: torch.dtype
    attention: str = "auto"


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
    :func:`~training.engine.attention.prefer_attention`.

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
    kernels = {}
    for owner, reader in readers.items():
        with prefer_attention(reader.attention):
            kernels[owner] = attention_kernel(reader, device)
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
