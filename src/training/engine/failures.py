"""Failures of the system around the program (disk, memory, other processes), told in one line."""

from __future__ import annotations

import errno
import re

import torch
import torch.distributed as dist

EXIT_FAILED = 71  # exit status after such a failure: nothing to mend in the arguments, to be resumed (EX_OSERR)

_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file has reached the largest size that is allowed",
    errno.EROFS: "the disk has become read-only",
    errno.EIO: "the disk fails",
    errno.ESTALE: "the network disk is gone",
}
# What gloo and the rendezvous store say of a partner that is gone (plain RuntimeErrors); NCCL has errors of its own.
_PARTNER = re.compile(
    r"gloo/|Connection (closed|reset)|Broken pipe|Timed out waiting|collective operation timeout|Socket Timeout|"
    r"failed to recv|application timeout",
    re.IGNORECASE,
)
_WORKER = re.compile(r"DataLoader worker")


def explain(error: BaseException) -> str | None:
    """One line on what happened and what to do; None for an error that is not of the system around the program."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    if isinstance(error, OSError) and error.errno in _DISK:
        file = f" ({error.filename})" if error.filename else ""
        return f"{_DISK[error.errno]}{file}: free some space or choose another --logs, then go on with --resume latest"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return f"out of memory ({text}): lower --batch-size, or use --grad-checkpointing"
    if isinstance(error, RuntimeError) and _WORKER.search(text):
        return (
            f"a loader worker has died ({text}): most often memory ran out; lower --workers or --batch-size, "
            "then go on with --resume latest"
        )
    if isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and _PARTNER.search(text):
        return (
            f"another process of this run has died or hangs ({text}): its own message says why; "
            "go on with --resume latest"
        )
    return None
