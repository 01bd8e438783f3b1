"""What the loop trains: a Task, and the options that steer the loop."""

# ruff: noqa: B027 (hooks that do nothing unless a task says what)
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.engine.errors import Flags
from training.engine.journal import Journal

Batch = dict[str, Any]
Rate = Callable[[int, int], float]  # (step, epoch), both from 0 -> learning rate


@dataclass
class Progress:
    """Where a run is. Everything the loop counts, so that a checkpoint can hold it.

    Attributes:
        epoch: completed epochs.
        step_in_epoch: optimizer steps done of the current one.
        step: optimizer steps done in all.
        bad_steps: steps in a row with a loss or gradient that is not finite; they are dropped.
        usable, skipped: samples of the current epoch so far, of all processes; absent in files of former versions.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    bad_steps: int = 0
    usable: int = 0
    skipped: int = 0

    @property
    def begun(self) -> int:
        """Epochs with the one under way: what a run that ends inside an epoch has come to."""
        return self.epoch + (self.step_in_epoch > 0)


@dataclass(frozen=True)
class LoopOptions:
    """How the loop runs.

    Attributes:
        epochs: passes over the data.
        accum_freq: micro-batches of each process in an optimizer step.
        max_steps: end after so many steps in all; 0: after ``epochs``.
        clip_norm: largest norm of the gradient; None: not clipped.
        max_skipped: share of unusable samples of an epoch above which the run stops: at its end, or as soon as that
            is beyond doubt.
        max_bad_steps: steps in a row that are not finite at which the run stops.
        log_every: steps between lines of the log and points of TensorBoard.
        save_every_steps: also save inside epochs; 0: never.
        save_every_epochs: save after every so many epochs; 0: only at the end.
        keep: newest checkpoints of whole epochs to keep; 0: all.
        save_latest: keep ``epoch_latest.pt`` up to date after every epoch.
        evaluate_first: evaluate before the first step.
        evaluate_every: evaluate after every so many epochs; 0: never.
        evaluate_last: evaluate after the last step, whatever ``evaluate_every`` says.
        report_to: where scalars go besides the log: "tensorboard", "wandb" or "none".
        fsdp: divide parameters and optimizer states over the processes (FSDP2).
        profile: optimizer steps to trace with torch's profiler; 0: none.
        batch_size: samples of a micro-batch of one process; with it a resumed run knows that it goes through the same
            data.
        flags: what the program calls its options, for messages.
    """

    epochs: int
    batch_size: int
    accum_freq: int = 1
    max_steps: int = 0
    clip_norm: float | None = None
    max_skipped: float = 0.1
    max_bad_steps: int = 10
    log_every: int = 50
    save_every_steps: int = 0
    save_every_epochs: int = 1
    keep: int = 0
    save_latest: bool = False
    evaluate_first: bool = True
    evaluate_every: int = 1
    evaluate_last: bool = True
    fsdp: bool = False
    profile: int = 0
    report_to: str = "tensorboard"
    flags: Flags = field(default_factory=Flags)


class Task(ABC):
    """What is trained, on which data and how well. The loop knows a task by these members and nothing else of it.

    Every process makes its own and all of them see the same calls in the same order, so a method may use collectives.

    Attributes:
        name: of the kind of training ("distillation"); kept in checkpoints, which another kind refuses.
        module: what data parallelism wraps. ``module(batch)`` gives a dict of scalar tensors with the same keys for
            every batch. ``loss`` is differentiated; it is this process's share, such that the mean over processes of
            the sum over the micro-batches of a step is the step's loss. All others are detached and are summed over
            micro-batches and processes for :meth:`scalars`. Every parameter of the optimizer gets a gradient in every
            backward pass, a zero one if need be, lest processes wait for each other.
        source: where the data comes from, for messages ("--train-data FILE").
        warmup: steps of its schedule until the rate is at its full size, to tell a run that ends before.
        evaluations_steer: what evaluations find changes the rest of the run, as when rates fall with patience. A
            checkpoint is written before the evaluation that follows it, so a resumed run then makes that again.
    """

    name: str
    module: nn.Module
    source: str
    warmup: int = 0
    evaluations_steer: bool = False

    # -- data ---------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def batches_per_epoch(self) -> int:
        """Micro-batches of a whole epoch, the same for each process."""

    @abstractmethod
    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """Micro-batches of an epoch on their device, from number ``start`` on, the same whenever asked.

        A batch is a dict. The loop reads three of its entries: ``samples``, the number of usable samples; ``skipped``,
        a list of (file, reason) of unusable ones; ``image_ids``, a list or tensor of ids, for messages. A batch of
        which nothing is left still comes, with what makes every process take part in the step. An iterator that can be
        closed (a generator) is, at the end of the epoch or of the run.
        """

    # -- a step -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer; called once, when the module has been placed and sharded. See :mod:`training.engine.optim`.

        A parameter group may have a ``lr_factor``, by which the scheduled rate is multiplied (1 if absent).
        """

    @abstractmethod
    def schedule(self, total_steps: int, steps_per_epoch: int) -> Rate:
        """Function (step, epoch) -> learning rate, for a run of so many steps. See :mod:`training.engine.schedule`."""

    def begin_step(self, micro: list[Batch], step: int) -> None:
        """Before the first forward pass of a step: counts over processes, the step's random choices.

        Args:
            micro: this process's micro-batches.
            step: number of the step, from 0; with :func:`~training.engine.schedule.step_seed` the source of all
                randomness, so that a resumed run needs no generator's state.
        """

    def end_step(self) -> None:
        """After the optimizer: bounds on parameters, moving averages. Also after a dropped step."""

    def running_buffers(self) -> list[Tensor]:
        """Buffers that a forward pass in training mode changes; a dropped step gives them back.

        By default the running statistics of all normalisation layers.
        """
        layers = [m for m in self.module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        return [b for m in layers for b in m.buffers(recurse=False)]

    def ended(self, progress: Progress) -> bool:
        """Before each epoch: whether the run is to end here, as when nothing has been gained for long. Default: no."""
        return False

    # -- full sharding ------------------------------------------------------------------------------------------------

    def blocks(self) -> list[nn.Module]:
        """Parts of the module that full sharding gathers one at a time, as their ``forward`` is entered: the
        transformer's blocks, but for those whose insides are used otherwise. Default: none."""
        return []

    def whole_parts(self) -> list[nn.Module]:
        """Parts of the module that full sharding leaves whole: those that go away before the first step."""
        return []

    def placed(self) -> None:
        """Once, when the module has been placed (and sharded) and before :meth:`optimizer`; parameters are other
        objects than before where they were sharded."""

    def inside(self, call: Callable[[], Any], part: nn.Module | None = None) -> Any:
        """Call something that uses the module, or a ``part`` of it, outside of its forward pass. The loop replaces this
        method where parameters must be gathered for that: the part's are, for as long as the call takes."""
        return call()

    # -- records ------------------------------------------------------------------------------------------------------

    def scalars(self, totals: dict[str, float]) -> dict[str, float]:
        """Values for TensorBoard by tag, and (those without a "/") for the log's line.

        Args:
            totals: the sums of what ``module`` gave, over micro-batches and processes; ``loss`` is the step's loss.
        """
        return {}

    def evaluate(self, progress: Progress, journal: Journal, *, start: bool = False) -> None:
        """Evaluate the module, show and record the result. ``start``: before the first step. Default: nothing.

        A run that is resumed where an evaluation was due, but is not in the journal's records, makes up for it.
        """

    # -- state --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the task (``state_dict`` by convention); tensors and plain values only."""

    @abstractmethod
    def load_state(self, content: dict[str, Any]) -> None:
        """Put a checkpoint's content (as :meth:`state` gave it, among other entries) back.

        Raises:
            RuntimeError, ValueError, KeyError: it does not fit; the loop tells the user.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run, by the name that the user knows it by; plain values.

        A resume with another value is refused: the start weights, the method, what trains.
        """

    def options(self) -> dict[str, Any]:
        """All options of the run as plain values; those that a resume changes are named in the log."""
        return {}

    def versions(self) -> dict[str, str]:
        """Versions of packages that a checkpoint should tell, besides torch's."""
        return {}

    def prepare(self, progress: Progress) -> None:
        """Once, after a checkpoint has been restored and before anything is evaluated or trained."""

    def before_saving(self) -> None:
        """On every process, right before :meth:`state`: statistics that processes keep apart are brought together."""

    def releases(self, progress: Progress) -> dict[str, dict[str, Any]]:
        """Files for users of the model, written after each checkpoint: path below the run's folder -> content.

        Process 0 alone calls it; under full sharding all do, to gather what is divided
        (:func:`~training.engine.sharding.whole_state`).
        """
        return {}

    def finish(self, folder: Path) -> None:
        """After the last step of a run that ended by itself, on every process."""
