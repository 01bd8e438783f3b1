"""Checkpoints of sharded runs: a folder that each process writes its part of, whole or not at all, and verified.

``epoch_N.shards`` holds the files of torch.distributed.checkpoint, and ``meta.pt`` with everything else and the
checksums of the files. Any number of processes, sharded or not, can read it.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.engine.distributed import agree, barrier, from_master, gather_objects, many, together
from training.engine.errors import UserError
from training.engine.files import checksum, flush, read_file, save_atomically
from training.engine.sharding import is_sharded, spread

SUFFIX = ".shards"
META = "meta.pt"
_OLD = ".old"  # behind the name of a checkpoint that another one takes the place of
_MODEL, _OPTIMIZER = "model", "optimizer"


# -- what is saved ----------------------------------------------------------------------------------------------------


def tensors_of(state_dict: dict[str, Tensor], optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Everything large of a run by name: ``model/NAME`` and ``optimizer/NAME/KEY``. The tensors themselves."""
    found = {f"{_MODEL}/{name}": value for name, value in state_dict.items()}
    names = {id(p): n for n, p in module.named_parameters()}
    for parameter, state in optimizer.state.items():
        found |= {f"{_OPTIMIZER}/{names[id(parameter)]}/{key}": value for key, value in state.items()}
    return found


def make_state(keys: list[str], optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Give an optimizer the (empty) state of those names among ``keys`` that it lacks."""
    parameters = dict(module.named_parameters())
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for key in keys:
        kind, _, rest = key.partition("/")
        name, _, entry = rest.rpartition("/")
        if kind != _OPTIMIZER or id(parameters.get(name)) not in trained:
            continue
        parameter = parameters[name]
        fresh = torch.zeros((), dtype=torch.float32, device=parameter.device)
        optimizer.state[parameter].setdefault(entry, fresh if entry == "step" else torch.zeros_like(parameter))


# -- writing ----------------------------------------------------------------------------------------------------------


def write_shards(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any], *, rank: int, folder_flag: str) -> None:
    """Write a checkpoint; every process calls it with its part.

    Raises:
        UserError: the disk is full or not writable; what was there before is as it was.
    """
    import torch.distributed.checkpoint as dcp  # takes a second, which runs that are not sharded save
    from torch.distributed.checkpoint.api import CheckpointException

    temporary = path.with_name(f".{path.name}.{from_master(os.getpid())}")
    try:
        with together():
            try:
                dcp.save({k: v.detach() for k, v in tensors.items()}, checkpoint_id=temporary, no_dist=not many())
            except (CheckpointException, OSError, RuntimeError) as error:
                raise UserError(
                    f"checkpoint {path} cannot be written ({_reason(error)}): free some space or choose another "
                    f"{folder_flag}"
                ) from error
        own = (f"__{rank}_", ".") if rank == 0 else (f"__{rank}_",)
        mine = {f.name: _settle(f) for f in sorted(temporary.iterdir()) if f.name.startswith(own)}
        sums = {name: value for part in gather_objects(mine) for name, value in part.items()}
        with together():
            if rank == 0:
                for name in sums:
                    if not (temporary / name).is_file():  # each machine has written to a disk of its own
                        raise UserError(
                            f"checkpoint {path} cannot be written ({name}, of another process, is not there): choose a "
                            f"{folder_flag} that all machines share"
                        )
                save_atomically(meta | {"shards": sums, "tensors": sorted(tensors)}, temporary / META, folder_flag)
                _put(temporary, path)
    except UserError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _put(temporary: Path, path: Path) -> None:
    """Give a complete checkpoint its name. One of the same step, which a run that went back comes to again, is moved
    aside for that, and deleted when the new one is there."""
    old = path.with_name(f".{path.name}{_OLD}")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(temporary, path)
    flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Undo replacements of checkpoints that a killed process has left half done."""
    for old in folder.glob(f".*{SUFFIX}{_OLD}"):
        path = folder / old.name[1:].removesuffix(_OLD)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, path)


def _settle(file: Path) -> str:
    flush(file)
    return checksum(file)


# -- reading ----------------------------------------------------------------------------------------------------------


def read_meta(path: Path) -> dict[str, Any]:
    """Everything small of a checkpoint. UserError when it is damaged or no checkpoint."""
    if not (path / META).is_file():
        raise UserError(f"checkpoint {path} has no {META}: it is damaged, or no checkpoint; use an earlier one")
    content = read_file(path / META)
    missing = [name for name in content["shards"] if not (path / name).is_file()]
    if missing:
        raise UserError(f"checkpoint {path} is damaged ({missing[0]} is missing): use an earlier one")
    return content


def verify(path: Path, meta: dict[str, Any]) -> None:
    """See that no file has changed; each process looks at its share. UserError on all where one has."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if many() else (0, 1)
    share = sorted(meta["shards"])[rank::world_size]
    mine = [name for name in share if checksum(path / name) != meta["shards"][name]]
    wrong = [name for part in gather_objects(mine) for name in part]
    if wrong:
        raise UserError(f"checkpoint {path} is damaged (the checksum of {wrong[0]} is wrong): use an earlier one")


def load_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, sharded in any way or whole, by their names; every process calls it.

    Raises:
        ValueError: a tensor that the checkpoint lacks or that has another shape there, or a table of contents that
            would run code.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process reads

        values = {k: v.detach() for k, v in tensors.items()}
        agree()
        try:
            dcp.load(values, storage_reader=_reader(path), no_dist=not many())
        except CheckpointException as error:
            raise ValueError(_reason(error)) from error
    barrier()


def _reason(error: BaseException) -> str:
    """The one line of interest among the tracebacks of all processes."""
    lines = [line.strip() for line in str(error).splitlines() if "Error: " in line]
    return (lines or str(error).splitlines() or [type(error).__name__])[-1][:200]


class _Restricted(pickle.Unpickler):
    """Reads the table of contents of torch.distributed.checkpoint, and makes nothing but what that consists of."""

    _ALLOWED = {
        "torch": {"Size"},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        },
        "pathlib": {"PosixPath"},
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        number = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if number or name in self._ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint: reading it might run code")


def _reader(path: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            metadata = _Restricted(io.BytesIO((path / ".metadata").read_bytes())).load()
            if getattr(metadata, "storage_meta", None) is None:
                from torch.distributed.checkpoint.metadata import StorageMeta

                metadata.storage_meta = StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(path)


def spread_state(content: dict[str, Any], state_dict: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Divide the whole tensors of an ordinary checkpoint's content as a sharded run has them."""
    own = content["state_dict"]
    content["state_dict"] = {k: spread(v, state_dict[k]) if k in state_dict else v for k, v in own.items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, state in content["optimizer"]["state"].items():
        like = parameters[index]
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == like.shape and is_sharded(like):
                state[key] = spread(value, like)
