"""Processes: what torchrun says of this one, and the few collectives that are needed."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ovdet.errors import UserError


@dataclass(frozen=True)
class Process:
    """This process among all: its number, how many there are, and where it computes."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_master(self) -> bool:
        """True for the process that writes and shows."""
        return self.rank == 0


def join(device: str | None = None) -> Process:
    """Join the processes that torchrun started (nccl on GPUs, gloo on CPUs); alone without torchrun.

    Args:
        device: ``"cuda"`` or ``"cpu"``; a GPU when there is one, by default.

    Raises:
        UserError: CUDA is asked for and missing, or there are fewer GPUs than processes.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of this machine has no GPU ({torch.cuda.device_count()} visible): start fewer "
                "processes, or use --device cpu"
            )
        torch.cuda.set_device(local)
        place = torch.device("cuda", local)
    else:
        place = torch.device(kind)
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ and not dist.is_initialized():
        # Evaluation of a large file keeps process 0 busy for a while; the others wait in a collective.
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return Process(rank, int(os.environ.get("WORLD_SIZE", "1")), place)


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def many() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over processes, in place."""
    if many():
        dist.all_reduce(tensor)
    return tensor


def gather_to_all(value: Any) -> list[Any]:
    """The values of all processes, in rank order."""
    if not many():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_to_master(value: Any) -> list[Any] | None:
    """The values of all processes, in rank order, on process 0; None on the others."""
    if not many():
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def from_master(value: Any) -> Any:
    """Process 0's value on every process."""
    if not many():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def broadcast(make: Callable[[], Tensor], *, shape: tuple[int, ...]) -> Tensor:
    """A float32 tensor that process 0 makes and all receive; on the CPU."""
    if not many():
        return make()
    value = make() if dist.get_rank() == 0 else torch.empty(shape)
    value = value.cuda() if dist.get_backend() == "nccl" else value
    dist.broadcast(value, 0)
    return value.cpu()


def average_batch_norm(model: nn.Module) -> None:
    """Average the running statistics of ordinary batch norms over the processes, which each saw other images.

    Nothing to do for synchronised batch norm, where they are equal.
    """
    if not many():
        return
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            for value in (module.running_mean, module.running_var):
                dist.all_reduce(value)
                value /= dist.get_world_size()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A stretch of set-up after which all processes know whether it went well everywhere.

    A :class:`UserError` of one becomes one of all, so that nobody waits for a process that has left.
    """
    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    messages = [m for m in gather_to_all(message) if m is not None]
    if messages:
        raise UserError(messages[0])
