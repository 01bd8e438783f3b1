"""Parameters of a TorchScript archive (OpenAI's published CLIP files), read without running its code.

Such a file is a zip: ``data.pkl`` describes a tree of modules by their class names and attributes, ``data/N`` hold the
tensors' bytes, and ``code/`` the program. Only the first two are read, and of the pickle only what builds tensors and
plain containers.
"""

from __future__ import annotations

import collections
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class _Module:
    """What a pickled module becomes: its attributes, in order."""

    def __init__(self, *_: object) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    # as_strided checks nothing below zero on its own account
    if offset < 0 or any(v < 0 for v in (*size, *stride)):
        raise pickle.UnpicklingError("a tensor has negative sizes")
    return torch.as_strided(storage, size, stride, offset).clone()


def _first(value: object, *_: object) -> object:
    return value


_GLOBALS = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch.jit._pickle", "build_tensorlist"): _first,
    ("torch.jit._pickle", "build_intlist"): _first,
    ("torch.jit._pickle", "build_doublelist"): _first,
    ("torch.jit._pickle", "build_boollist"): _first,
    ("torch.jit._pickle", "restore_type_tag"): _first,
    ("collections", "OrderedDict"): collections.OrderedDict,
}


class _Reader(pickle.Unpickler):
    """Unpickles tensors, plain containers and modules without behaviour; anything else is refused."""

    def __init__(self, file: BinaryIO, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of a model's weights")
        return _GLOBALS[(module, name)]

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _device, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("a stored tensor has no known type")
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            if not data:
                self.storages[key] = torch.empty(0, dtype=dtype)
            else:
                self.storages[key] = torch.frombuffer(data, dtype=dtype)
            if len(self.storages[key]) < count:
                raise pickle.UnpicklingError(f"tensor data {key} is shorter than its description says")
        return self.storages[key]


def _root(archive: zipfile.ZipFile) -> str | None:
    """Folder inside the archive that holds ``data.pkl`` and ``code/``; None for an archive without code."""
    names = archive.namelist()
    root = next((n[: -len("/data.pkl")] for n in names if n.count("/") == 1 and n.endswith("/data.pkl")), None)
    return root if root is not None and any(n.startswith(f"{root}/code/") for n in names) else None


def is_jit_archive(path: str | Path) -> bool:
    """Whether a file is a TorchScript archive: a zip with a pickled tree of modules and their code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return _root(archive) is not None


def read_jit_archive(path: str | Path) -> dict[str, Tensor]:
    """Parameters and buffers of a TorchScript archive by their names; none of its code runs.

    Raises:
        pickle.UnpicklingError, KeyError, ValueError: damaged, or more in it than modules and tensors.
    """
    with zipfile.ZipFile(path) as archive:
        root = _root(archive)
        if root is None:
            raise ValueError("it is no TorchScript archive")
        with archive.open(f"{root}/data.pkl") as file:
            tree = _Reader(file, archive, root).load()
    state: dict[str, Tensor] = {}
    _collect(tree, "", state)
    return state


def _collect(module: object, prefix: str, state: dict[str, Tensor]) -> None:
    if not isinstance(module, _Module):
        return
    for name, value in module.attributes.items():
        if isinstance(value, Tensor):
            state[prefix + name] = value
        else:
            _collect(value, f"{prefix}{name}.", state)
