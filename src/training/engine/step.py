"""One optimizer step: forward, backward, and an update that leaves nothing behind where it is not finite."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.engine.distributed import Dist, all_reduce_sum, send_numbers
from training.engine.precision import Precision
from training.engine.sharding import Sharded, total_norm
from training.engine.task import Batch, Task


@dataclass
class Outcome:
    """What a step came to. On a GPU its numbers are still on their way; :meth:`read` waits for them.

    Attributes:
        step: number of the step, from 1.
        names: of the numbers.
        numbers: float64 on the CPU.
        arrived: when they are there; None: they are.
        image_ids, skipped: of this process's micro-batches; unusable samples are (file, reason).
    """

    step: int
    names: list[str]
    numbers: Tensor
    arrived: torch.cuda.Event | None
    image_ids: list
    skipped: list[tuple[str, str]]

    def read(self) -> dict[str, float]:
        """``loss`` (mean over processes), what the task gave (sums), ``samples``, ``skipped``, ``stop``, ``grad_norm``
        (before clipping; NaN where the loss was not finite), ``good``."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return dict(zip(self.names, self.numbers.tolist(), strict=True))


class Stepper:
    """Carries out the steps of a task.

    Where the optimizer can skip a step by a flag on its device (all fused ones), the CPU waits for nothing: the flag is
    computed there, and the totals are read when they have arrived. Otherwise they are read before the update.

    Args:
        model: the task's module, as data parallelism wraps it.
        clip_norm: largest norm of the gradient; None: not clipped.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        precision: Precision,
        dist: Dist,
        clip_norm: float | None,
    ) -> None:
        self.task, self.model, self.optimizer = task, model, optimizer
        self.precision, self.dist, self.clip_norm = precision, dist, clip_norm
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.sharded = isinstance(model, Sharded)
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        self.deferred = fused and precision.scaler is None and not self.sharded

    def __call__(self, micro: list[Batch], step: int, *, stop: Callable[[], bool]) -> Outcome:
        """Do step ``step`` (from 0).

        Args:
            micro: this process's micro-batches.
            stop: says whether this process was asked to end; summed over processes.
        """
        running = [(b, b.detach().clone()) for b in self.task.running_buffers()]
        self._begin(micro, step)
        outputs = [self._forward_backward(batch, last=i + 1 == len(micro)) for i, batch in enumerate(micro)]
        if self.sharded:
            self.model.average_whole()
        names, totals = self._totals(micro, outputs, stop())
        norm, good = self._update(totals[names.index("loss")])
        with torch.no_grad():
            for buffer, before in running:
                buffer.copy_(torch.where(good, buffer, before))
        self.task.end_step()
        numbers = torch.cat([totals, norm.double().reshape(1), good.double().reshape(1)])
        numbers, arrived = self._send(numbers)
        return Outcome(
            step + 1, [*names, "grad_norm", "good"], numbers, arrived,
            [i for batch in micro for i in batch["image_ids"]], [s for batch in micro for s in batch["skipped"]],
        )  # fmt: skip

    def _begin(self, micro: list[Batch], step: int) -> None:
        """The task's preparation, in which it may ask frozen parts of its module."""
        if self.sharded:
            self.model.ahead(lambda: self.task.begin_step(micro, step))
        else:
            self.task.begin_step(micro, step)

    def _forward_backward(self, batch: Batch, *, last: bool) -> dict[str, Tensor]:
        """Gradients, added to those there are; exchanged between processes with the step's last micro-batch only."""
        scaler = self.precision.scaler
        with self._unexchanged() if not last else contextlib.nullcontext():
            with self.precision.autocast():
                output = self.model(batch)
            (output["loss"] if scaler is None else scaler.scale(output["loss"])).backward()
        return {k: v.detach() for k, v in output.items()}

    @contextlib.contextmanager
    def _unexchanged(self) -> Iterator[None]:
        if hasattr(self.model, "no_sync"):
            with self.model.no_sync():
                yield
        else:
            yield

    def _totals(self, micro: list[Batch], outputs: list[dict[str, Tensor]], stop: bool) -> tuple[list[str], Tensor]:
        """Sums over micro-batches and processes, in one collective: names, and float64 on the device."""
        names = sorted(outputs[0])
        sums = torch.stack([torch.stack([o[n].double() for o in outputs]).sum() for n in names])
        counts = [sum(b["samples"] for b in micro), sum(len(b["skipped"]) for b in micro), float(stop)]
        totals = all_reduce_sum(torch.cat([sums, send_numbers(counts, sums.device)]))
        totals[names.index("loss")] /= self.dist.world_size
        return [*names, "samples", "skipped", "stop"], totals

    def _update(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip and step, or drop gradients that are not finite.

        Returns:
            The gradient norm before clipping, and whether the step was good. float16 gradients that overflowed are: the
            scaler drops them by itself, as it must now and then to find its scale.
        """
        scaler, optimizer, finite = self.precision.scaler, self.optimizer, loss.isfinite()
        norm, good = loss.new_full((), float("nan")), finite
        if self.deferred or finite.item():
            if scaler is not None:
                scaler.unscale_(optimizer)
            # A finite loss may have gradients that are not, and one step with them would spoil every weight for good.
            norm = self._norm([p.grad for p in self.parameters if p.grad is not None])
            if self.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
            if scaler is None:
                good = finite & norm.isfinite()
            self._step_optimizer(good)
            norm = torch.where(finite, norm, float("nan"))
        optimizer.zero_grad(set_to_none=True)
        return norm, good

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        return total_norm(gradients) if self.sharded else torch.nn.utils.get_total_norm(gradients)

    def _step_optimizer(self, good: Tensor) -> None:
        scaler, optimizer = self.precision.scaler, self.optimizer
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        elif self.deferred:
            optimizer.found_inf = (~good).float()  # what a gradient scaler tells a fused optimizer: nothing is changed
            optimizer.step()
            del optimizer.found_inf
        elif good.item():
            optimizer.step()

    def _send(self, numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """Numbers on their way to the CPU, without waiting for them."""
        if numbers.device.type != "cuda":
            return numbers, None
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return host, arrived
