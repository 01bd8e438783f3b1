"""Checkpoints: written whole or not at all, verified when read, and enough to go on exactly."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import open_clip
from open_clip.weights import load_torch_file
from training.engine.distributed import gather_objects
from training.engine.errors import UserError

log = logging.getLogger(__name__)

RELEASE = "clipself.pt"


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """``torch.save`` to a temporary file, flushed to disk, then renamed; a failure leaves the old file as it was.

    Raises:
        UserError: the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"checkpoint {path} cannot be written ({reason}): free some space or choose another --logs"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint as :func:`save_atomically` wrote it; nothing in it is executed.

    The checksum of every part is verified, so that a damaged file is never taken for good.

    Raises:
        UserError: missing, damaged, or no training checkpoint.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: check --resume")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is cut off, or no checkpoint at all")
        content = load_torch_file(path)
    except Exception as error:  # zip and pickle raise a dozen kinds for damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
        raise UserError(f"checkpoint {path} is damaged ({reason}): use an earlier one") from error
    missing = [
        k for k in ("epoch", "step", "state_dict", "optimizer") if not isinstance(content, dict) or k not in content
    ]
    if missing:
        raise UserError(f"checkpoint {path} has no {', '.join(missing)}: it is no training checkpoint of this program")
    return content


def remove_unfinished(folder: Path) -> None:
    """Delete what :func:`save_atomically` leaves of a file when the process is killed while it writes."""
    for path in folder.glob(".*.pt.*"):
        if path.suffix[1:].isdigit():
            path.unlink(missing_ok=True)


def find_latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Newest complete checkpoint of a folder with its content; damaged ones are passed over with a warning."""
    files = [f for f in folder.glob("epoch_*.pt") if f.is_file()]
    for path in sorted(files, key=lambda f: (f.stat().st_mtime_ns, f.name), reverse=True):
        try:
            return path, read_checkpoint(path)
        except UserError as error:
            log.warning("%s", error)
    return None


def prune(folder: Path, keep: int, pattern: str) -> None:
    """Delete all but the ``keep`` newest checkpoints that match a pattern."""
    files = sorted(folder.glob(pattern), key=lambda f: (f.stat().st_mtime_ns, f.name), reverse=True)
    for path in files[keep:]:
        path.unlink(missing_ok=True)


# -- random states ----------------------------------------------------------------------------------------------------


def random_state(device: torch.device) -> dict[str, Any]:
    """States of this process's generators, as plain values that load without unpickling code."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set this process's generators."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def weights_hash(state: dict[str, Tensor]) -> str:
    """SHA-256 over names and values of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# -- the whole --------------------------------------------------------------------------------------------------------


def make_checkpoint(
    *,
    name: str,
    student: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    epoch: int,
    step_in_epoch: int,
    step: int,
    start_hash: str,
    args: dict[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """Everything that a run needs to go on; every process calls it (random states are gathered).

    Args:
        epoch: completed epochs.
        step_in_epoch: optimizer steps done in the epoch that is under way.
        step: optimizer steps done in all; the position in the schedule.
        start_hash: of the weights that the run started from (its teacher, and the other part of its ensemble).
        args: the program's arguments, as plain values.
    """
    return {
        "epoch": epoch,
        "step_in_epoch": step_in_epoch,
        "step": step,
        "name": name,
        "state_dict": student.state_dict(),
        "optimizer": optimizer.state_dict(),
        **({"scaler": scaler.state_dict()} if scaler is not None else {}),
        "random_states": gather_objects(random_state(device)),
        "start_hash": start_hash,
        "args": args,
        "versions": {"torch": str(torch.__version__), "open_clip": open_clip.__version__},
    }


def restore(
    checkpoint: dict[str, Any],
    path: Path,
    *,
    student: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    start_hash: str,
    rank: int,
    world_size: int,
    device: torch.device,
) -> None:
    """Put a checkpoint back into student, optimizer, scaler and (on as many processes) the generators.

    Raises:
        UserError: it belongs to another model, start model or set of trainable parameters.
    """
    if checkpoint.get("start_hash") != start_hash:
        raise UserError(f"checkpoint {path} began from other weights: give the same --model, --pretrained and --seed")
    try:
        student.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"checkpoint {path} does not fit this run ({reason}): give the arguments it was made with"
        ) from error
    if scaler is not None and "scaler" in checkpoint:
        scaler.load_state_dict(checkpoint["scaler"])
    states = checkpoint["random_states"]
    if len(states) == world_size:
        restore_random_state(states[rank], device)
    else:
        log.warning("resuming on %d processes a run of %d: the data order is kept", world_size, len(states))
