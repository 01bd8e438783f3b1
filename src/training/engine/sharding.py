"""Full sharding (FSDP2): parameters, gradients and optimizer states of a task divided over the processes.

For trunks that do not fit on one device with their optimizer. Each block of the task gathers its parameters when it is
entered and gives them up again; what belongs to no block is gathered for the whole of a forward pass. To gather is to
wait for all processes: in a step each makes the same passes through the blocks, whatever its share of the data. An
evaluation, whose shares differ, has the blocks of what it evaluates gathered from beginning to end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from training.engine.distributed import Dist, many
from training.engine.errors import UserError
from training.engine.task import Task


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is divided over processes (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def is_divided(module: nn.Module) -> bool:
    """Whether blocks within a module are gathered as they are entered, so that every process must enter them alike."""
    if not many():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in module.modules())


def most_of_processes(number: int, device: torch.device) -> int:
    """The largest of the processes' numbers; every process calls it."""
    most = torch.tensor(number, device=device)
    torch_dist.all_reduce(most, torch_dist.ReduceOp.MAX)
    return int(most)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process calls it for a sharded one."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def whole_state(state: dict[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """A state dict with whole tensors, sharded ones on the CPU; they are gathered one at a time.

    Args:
        keep: False on processes that only take part in the gathering; they get what is not sharded.
    """
    found = {}
    for name, value in state.items():
        if not is_sharded(value):
            found[name] = value
            continue
        full = whole(value.detach())
        if keep:
            found[name] = full.cpu()
    return found


def spread(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, equal on all processes, divided as ``like`` is; itself where that is whole."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """2-norm of all gradients together, of which some may be sharded; the same on every process."""
    gradients = list(gradients)
    parts = ([g for g in gradients if is_sharded(g)], [g for g in gradients if not is_sharded(g)])
    norms = [whole(torch.nn.utils.get_total_norm(part)) for part in parts if part]
    return torch.linalg.vector_norm(torch.stack(norms))


class _Root(nn.Module):
    """Runs any call with the module's own parameters gathered."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, call: Callable[[], Any]) -> Any:
        # A call and not a batch: of its arguments FSDP would copy each tensor to the device.
        return call()


class Sharded(nn.Module):
    """A task's module under full sharding; ``sharded(batch)`` is ``module(batch)``.

    Args:
        task: its module is on the device, whole, and equal on all processes.
        dist: several processes.

    Raises:
        UserError: a single process, or CPUs with a torch that divides nothing on them.
    """

    def __init__(self, task: Task, dist: Dist) -> None:
        super().__init__()
        if not dist.distributed:
            raise UserError("--fsdp divides the model over processes: start several with torchrun")
        if dist.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
            raise UserError(f"--fsdp: torch {torch.__version__} divides no model on CPUs; update torch, or use GPUs")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(dist.device.type, (dist.world_size,))
        parameters = list(task.module.parameters())
        kept_whole = {p for part in task.whole_parts() for p in part.parameters()}
        # Scalars cannot be divided; what does not train may have stayed on the CPU.
        kept_whole |= {p for p in parameters if p.ndim == 0 or p.device.type != dist.device.type}
        self.blocks = task.blocks()  # a list: they are modules of the task's already
        for block in self.blocks:
            fully_shard(block, mesh=mesh, ignored_params=kept_whole & set(block.parameters()))
        self.root = fully_shard(_Root(task.module), mesh=mesh, ignored_params=kept_whole)
        self._whole = [p for p in kept_whole if p.requires_grad]
        # Once outside of inference mode: the memory that is gathered into must be usable in training.
        self.root(lambda: [(block.unshard(), block.reshard()) for block in self.blocks])
        self.root.reshard()

    def forward(self, batch: Any) -> Any:
        """Loss of a batch."""
        return self.root(lambda: self.root.module(batch))

    def ahead(self, call: Callable[[], Any]) -> Any:
        """Use the module ahead of a step's forward pass, without gradients; every process makes the same passes."""
        with torch.no_grad():
            result = self.root(call)
        self.root.reshard()
        return result

    def inside(self, call: Callable[[], Any], part: nn.Module | None = None) -> Any:
        """Use the module outside of its forward pass (to evaluate it), without gradients and as each process likes.

        Args:
            part: of the module, all that is used; it is gathered whole for as long. None: the module.
        """
        within = set((self.root.module if part is None else part).modules())
        blocks = [block for block in self.blocks if block in within]

        def gathered() -> Any:
            for block in blocks:
                block.set_reshard_after_forward(False, recurse=False)
                block.unshard()
            try:
                return call()
            finally:
                for block in blocks:
                    block.set_reshard_after_forward(True, recurse=False)
                    block.reshard()

        return self.ahead(gathered)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes within keep their gradients to themselves, as in DistributedDataParallel."""
        self.root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.root.set_requires_gradient_sync(True)

    def average_whole(self) -> None:
        """Exchange the gradients of parameters that are not divided."""
        for parameter in self._whole:
            if parameter.grad is not None:
                torch_dist.all_reduce(parameter.grad)
                parameter.grad /= torch_dist.get_world_size()
