"""Processes: what torchrun or SLURM says of this one, and the few collectives that the programs need."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.engine.errors import UserError


@dataclass(frozen=True)
class Dist:
    """This process among all.

    Attributes:
        rank, world_size: number of this process, and how many there are.
        local_rank: number on this machine.
        device: where it computes.
        distributed: whether there is a process group.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    distributed: bool

    @property
    def is_master(self) -> bool:
        """True for the process that writes and shows."""
        return self.rank == 0


def init_distributed(device: str | None = None, backend: str | None = None, timeout_s: float = 1800) -> Dist:
    """Join the processes that torchrun, or SLURM's srun, has started; a single process without them.

    Args:
        device: ``"cuda"`` or ``"cpu"``; the GPU of the local rank when there is one, by default.
        backend: nccl on GPUs and gloo on CPUs by default.
        timeout_s: after which a collective whose partner is gone raises instead of hanging.

    Raises:
        UserError: CUDA was asked for and there is none, or fewer GPUs than processes.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible to PyTorch; use --device cpu or mend the driver")
    adopt_slurm()
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    place = _own_gpu(local_rank) if kind == "cuda" else torch.device(kind)
    distributed = "RANK" in os.environ and "MASTER_ADDR" in os.environ
    if distributed and not dist.is_initialized():
        timeout = datetime.timedelta(seconds=timeout_s)
        store = _store_after_restart(timeout)
        where = {} if store is None else {"store": store, "rank": rank, "world_size": world_size}
        dist.init_process_group(backend or ("nccl" if kind == "cuda" else "gloo"), timeout=timeout, **where)
    return Dist(rank, world_size, local_rank, place, distributed)


def _own_gpu(local_rank: int) -> torch.device:
    """The GPU of this process, which becomes the current one."""
    count = torch.cuda.device_count()
    index, last = local_rank, max(local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1)
    if count == 1 and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        index = last = 0  # srun may show each task its own GPU only
    # All processes of the machine end, not the last ones alone: it is the first one that prints why.
    if last >= count:
        raise UserError(
            f"process {last} of this machine has no GPU ({count} visible): start fewer processes, or use --device cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def adopt_slurm() -> None:
    """Give the tasks of an ``srun`` without torchrun the variables that torchrun would give them.

    Without it they would be as many separate runs. Only steps of several tasks count: a batch script, or a shell in an
    allocation, has some of SLURM's variables as well but is alone.
    """
    environment = os.environ
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks < 2 or "RANK" in environment or "SLURM_PROCID" not in environment:
        return
    environment["RANK"], environment["WORLD_SIZE"] = environment["SLURM_PROCID"], str(tasks)
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
    here = tasks_of_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""), int(environment.get("SLURM_NODEID", "0")))
    environment.setdefault("LOCAL_WORLD_SIZE", str(here or 1))
    environment.setdefault("MASTER_ADDR", first_host(environment.get("SLURM_STEP_NODELIST", "127.0.0.1")))
    # The same for all tasks of a step, another one for another step on the machine.
    number = int(environment.get("SLURM_JOB_ID", "0")) * 7 + int(environment.get("SLURM_STEP_ID", "0"))
    environment.setdefault("MASTER_PORT", str(20_000 + number % 10_000))


def tasks_of_node(tasks: str, node: int) -> int | None:
    """Tasks of a machine by SLURM's notation: ``4(x2),3`` are 4, 4 and 3. None where it does not say."""
    counts: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [int(number)] * int(times or 1)
    return counts[node] if node < len(counts) else None


def first_host(nodes: str) -> str:
    """First machine of a list in SLURM's notation: ``gpu[07-09,12],login`` -> ``gpu07``."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes.strip())
    if found is None:
        raise UserError(f'SLURM_STEP_NODELIST is "{nodes}", which names no machine: set MASTER_ADDR')
    return "".join(part for part in found.groups() if part)


def _store_after_restart(timeout: datetime.timedelta) -> dist.Store | None:
    """A clean part of torchrun's key-value store for processes that it has restarted; None where it is not needed.

    torchrun keeps one store for all restarts. A restarted process may find there the address at which its partner was
    before, and wait for it until the time-out. Machines may count restarts differently, so this is for one machine; for
    several there is torchrun's TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    environment = os.environ
    restarts = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restarts == "0" or not shared or environment.get("GROUP_WORLD_SIZE") != "1":
        return None
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return dist.PrefixStore(f"restart{restarts}", store)


def end_distributed() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def many() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over processes, in place; the tensor itself without a process group. Made in every step, so without
    :func:`agree`: not for use inside :func:`together`."""
    if many():
        dist.all_reduce(tensor)
    return tensor


def agree(failure: str | None = None) -> None:
    """See that no process has failed, by the same exchange on all of them.

    Whatever waits for other processes begins with it, and :func:`together` ends with it. So a process that fails in a
    stretch of set-up, and the others, which may have come to a broadcast by then, meet here, and none waits for good.

    Args:
        failure: what this process has to say, if it has failed.

    Raises:
        UserError: a process has failed; the same on all.
    """
    if many():
        _exchange(failure, None)


def _exchange(failure: str | None, value: Any) -> list[Any]:
    """The values of all processes, in rank order; UserError where one has failed."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (failure, value))
    for rank, (found, _) in enumerate(parts):
        if found is not None:
            raise UserError(f"process {rank}: {found}" if rank else found, rank=rank)
    return [value for _, value in parts]


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes, in rank order."""
    return _exchange(None, value) if many() else [value]


def gather_to_master(value: Any) -> list[Any] | None:
    """The values of all processes, in rank order, on process 0; None on the others."""
    if not many():
        return [value]
    agree()
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def from_master(value: Any) -> Any:
    """Process 0's value on every process."""
    if not many():
        return value
    agree()
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def on_master(function: Callable[[], Any]) -> Any:
    """What process 0 makes, on every process; the others wait. Its UserError is raised everywhere."""
    value = None
    agree()  # before something is made that takes minutes, and for nobody
    with together():
        if not many() or dist.get_rank() == 0:
            value = function()
    return from_master(value)


def average_batch_norm(model: nn.Module) -> None:
    """Average the running statistics of ordinary batch norms over the processes, which each saw other samples.

    Nothing to do for synchronised batch norm, where they are equal.
    """
    if not many():
        return
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            for value in (module.running_mean, module.running_var):
                dist.all_reduce(value)
                value /= dist.get_world_size()


def send_numbers(values: Sequence[float], device: torch.device) -> Tensor:
    """float64 numbers on a device, without waiting for its queue."""
    on_gpu = device.type == "cuda"
    return torch.tensor(values, dtype=torch.float64, pin_memory=on_gpu).to(device, non_blocking=on_gpu)


def wrap(module: nn.Module, where: Dist) -> nn.Module:
    """A module under data parallelism; frozen parts and buffers are left alone: not broadcast, not waited for.

    A module whose loss does not reach all that trains says so by an attribute ``reaches_all``, false.
    """
    if not where.distributed:
        return module
    trainable = {n for n, p in module.named_parameters() if p.requires_grad}
    names = [n for n, _ in module.named_parameters()] + [n for n, _ in module.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        module, [n for n in names if n not in trainable]
    )
    agree()
    # Without device_ids: with them each batch's CPU tensors (counts, ids) would be copied to the GPU, one by one.
    unused = not getattr(module, "reaches_all", True)
    return DistributedDataParallel(module, gradient_as_bucket_view=True, find_unused_parameters=unused)


def barrier() -> None:
    """Wait for all processes."""
    agree()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A stretch of set-up after which all processes agree whether it went well.

    A UserError of one (an image root that is missing on its machine) becomes a UserError of all, so that nobody waits
    for a process that has left. What else stands here may be used inside, other stretches as well.
    """
    try:
        yield
    except UserError as error:
        if error.rank is None:  # else it has come from the others, who are on their way out
            agree(str(error))
        raise
    agree()
