"""Checkpoint files to tensors and back: which kind a file is, by its first bytes; nothing in it is executed."""

from __future__ import annotations

import logging
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .jit_archive import is_jit_archive, read_jit_archive

log = logging.getLogger(__name__)

_CONTAINERS = ("state_dict", "model", "module")

# First bytes of files that are given by mistake, and what to do about each.
_MISTAKEN = [
    (b"\xff\xd8\xff", "a JPEG picture", ""),
    (b"\x89PNG", "a PNG picture", ""),
    (b"GIF8", "a GIF picture", ""),
    (b"%PDF", "a PDF document", ""),
    (b"version https://git-lfs", "a Git LFS pointer of a few lines, not the file itself", "fetch it with git lfs pull"),
    (b"\x1f\x8b", "compressed with gzip", "unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it first"),
    (b"BZh", "compressed with bzip2", "unpack it first"),
    (b"\xfd7zXZ", "compressed with xz", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it first"),
    (b"\x89HDF", "an HDF5 file", ""),
    (b"\x93NUMPY", "a numpy array", ""),
]
_EXPECTED = "a state dict saved by torch (.pt, .pth, .bin) or safetensors"


def _first_bytes(path: Path, count: int = 512) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)


def is_safetensors(path: str | Path) -> bool:
    """Whether a file begins as safetensors do: the length of a header (8 bytes), then json."""
    head = _first_bytes(Path(path), 9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def refuse_other_files(path: str | Path) -> None:
    """Say what a file is that cannot be a checkpoint, judged by its first bytes.

    Raises:
        RuntimeError: a picture, a page, a pointer, an archive of another kind, or nothing at all.
    """
    path = Path(path)
    head = _first_bytes(path)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    found = next(((what, remedy) for start, what, remedy in _MISTAKEN if head.startswith(start)), None)
    if not head:
        found = ("empty", "fetch it again")
    elif head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        found = ("a WebP picture", "")
    elif text.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        found = ("a web page, perhaps the answer of a server that wants a login", "fetch the file behind it")
    elif text.startswith((b"{", b"[")):
        found = ("a json text", "")
    elif head[:4] == b"PK\x03\x04" and not zipfile.is_zipfile(path):
        found = ("the beginning of an archive whose end is missing", "the download stopped early, fetch it again")
    if found is not None:
        what, remedy = found
        raise RuntimeError(f"weights file {path} is {what}: {remedy or f'give {_EXPECTED}'}")


def load_state_dict_file(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint file in whatever layout it has; nothing in the file is executed.

    Takes safetensors, a torch file that is a state dict or a dict with one under ``state_dict``, ``model`` or
    ``module``, and OpenAI's TorchScript archives; the content tells, not the name. Prefixes that wrappers leave
    (``module.``, ``_orig_mod.``) are removed.

    Damage to a torch file is found by the checksums in it. A safetensors file has none: a wrong length or header is
    refused, a changed weight is not seen.

    Raises:
        FileNotFoundError: no such file.
        RuntimeError: not a checkpoint, damaged, or one that needs code to be unpickled.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist: check the path")
    refuse_other_files(path)
    try:
        content = load_file(str(path)) if is_safetensors(path) else load_torch_file(path)
    except Exception as error:  # torch and safetensors raise a dozen kinds for a damaged file
        raise RuntimeError(f"weights file {path} cannot be loaded: {_what_went_wrong(error)}") from error
    state = _find_state(content)
    if not state:
        raise RuntimeError(
            f"weights file {path} holds no state dict: expected tensors by name, or one under {_CONTAINERS}"
        )
    return state


def _what_went_wrong(error: Exception) -> str:
    """One line, without torch's advice to let the file run its code."""
    text = str(error).strip()
    if "weights_only" in text.lower():
        named = re.search(r"GLOBAL ([\w.]+)", text)
        what = f"a Python object ({named[1]})" if named else "a Python object"
        return f"it holds {what}, which only running the file's code could make; ask for its state dict alone"
    reason = text.splitlines()[0][:200] if text else type(error).__name__
    return f"it is damaged or no checkpoint; fetch it again ({type(error).__name__}: {reason})"


def load_torch_file(path: str | Path) -> Any:
    """``torch.load`` to the CPU that executes nothing and verifies the checksum of every part, which torch does not.

    Files from before torch 1.6 are no archives and have no checksums. Of a TorchScript archive the tensors are returned
    (:func:`open_clip.jit_archive.read_jit_archive`).

    Raises:
        ValueError: a checksum is wrong. Other damage raises one of the many kinds of torch, pickle and zipfile.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        if is_jit_archive(path):
            return read_jit_archive(path)
    with open(path, "rb") as file:  # of a path torch would look at the ending
        return torch.load(file, map_location="cpu", weights_only=True)


def _find_state(content: object) -> dict[str, Tensor]:
    for _ in range(3):  # containers may be nested, e.g. {"model": {"state_dict": ...}}
        if not isinstance(content, dict):
            return {}
        inner = next((content[k] for k in _CONTAINERS if isinstance(content.get(k), dict)), None)
        if inner is None:
            break
        content = inner
    return without_wrappers({str(k): v for k, v in content.items() if isinstance(v, Tensor)})


def without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what ``torch.compile`` and data-parallel wrappers put in front of their modules' names."""
    # Compiled modules say so in the middle of names too, data-parallel wrappers only in front of all of them.
    state = {k.replace("_orig_mod.", ""): v for k, v in state.items()}
    if state and all(k.startswith("module.") for k in state):
        state = {k[len("module.") :]: v for k, v in state.items()}
    return state


def save_weights(state: dict[str, Tensor], path: Path, name: str) -> None:
    """Write a state dict to ``path`` (.safetensors, or a torch file with ``epoch``, ``name`` and ``state_dict``).

    The file appears complete or not at all: it is written beside its place and renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix == ".safetensors":
            save_file({k: v.contiguous() for k, v in state.items()}, str(temporary), metadata={"format": "pt"})
        else:
            torch.save({"epoch": 0, "name": name, "state_dict": state}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
