"""Published .pth files, read without executing anything in them.

Such a file is a pickle of tensors and, beside them, whatever the training program put there: its config, class names,
an optimizer. Only what makes up tensors and plain values is built; any other object becomes an empty stand-in.
"""

from __future__ import annotations

import collections
import pickle
import types
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from training.engine.errors import UserError

_BUILT = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
}
_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")


class StandIn:
    """In place of an object that is not built: takes anything and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Items of a list of some class."""

    def extend(self, items: Any) -> None:
        """As :meth:`append`."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)


class _Unpickler(pickle.Unpickler):
    """Finds tensors and containers; nothing that a file names is ever imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _BUILT:
            return _BUILT[module, name]
        if module in ("torch", "torch.storage") and name.removesuffix("Storage") in (*_STORAGES, "Untyped"):
            return getattr(torch, name)
        return StandIn


def _load(file: BinaryIO, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


_READER = types.SimpleNamespace(Unpickler=_Unpickler, load=_load, __name__="restricted")


def read_published(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict, ``meta``) of a published file.

    Raises:
        UserError: missing, damaged, or without a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a published .pth file")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
                if any(name.endswith("constants.pkl") for name in archive.namelist()):
                    raise ValueError("it is a TorchScript archive")
            if damaged is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", pickle_module=_READER, weights_only=False)
    except Exception as error:  # zip and pickle raise a dozen kinds for damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
        raise UserError(f"{path} is damaged or no checkpoint ({reason}): fetch it again") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = isinstance(state, dict) and {k: v for k, v in state.items() if isinstance(k, str)}
    if not tensors or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise UserError(f"{path} holds no state dict of tensors: give a published .pth file of F-ViT")
    meta = content.get("meta")
    return {k.removeprefix("module."): v.detach() for k, v in tensors.items()}, meta if isinstance(meta, dict) else {}
