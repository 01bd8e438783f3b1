"""What a checkpoint holds of a run besides its task, and how it is put back: exactly, or refused in one line."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from training.engine import shards
from training.engine.checkpoint import random_state, restore_random_state
from training.engine.distributed import Dist, gather_objects
from training.engine.errors import Flags, UserError
from training.engine.task import Progress, Task

log = logging.getLogger(__name__)


def general_state(
    task: Task,
    progress: Progress,
    optimizer: torch.optim.Optimizer | None,
    scaler: torch.amp.GradScaler | None,
    *,
    device: torch.device,
    global_batch: int,
) -> dict[str, Any]:
    """Everything that a run needs to go on, but for the task's own state; every process calls it.

    Args:
        optimizer: None where its state is kept elsewhere.
        global_batch: samples of an optimizer step, of all processes.
    """
    return {
        **asdict(progress),
        "task": task.name,
        "optimizer": {} if optimizer is None else optimizer.state_dict(),
        **({"scaler": scaler.state_dict()} if scaler is not None else {}),
        "random_states": gather_objects(random_state(device)),
        "global_batch": global_batch,
        "identity": task.identity(),
        "args": task.options(),
        "versions": {"torch": str(torch.__version__), **task.versions()},
    }


def restore(
    content: dict[str, Any],
    path: Path,
    task: Task,
    progress: Progress,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    *,
    dist: Dist,
    global_batch: int,
    flags: Flags,
) -> None:
    """Put a checkpoint back into task, optimizer, scaler, progress and (on as many processes) the generators.

    Raises:
        UserError: it belongs to another kind of run, or stands inside an epoch of another global batch.
    """
    _check_identity(content, path, task)
    _check_position(content, path, global_batch, flags)
    _name_changes(content.get("args", {}), task.options())
    try:
        if path.is_dir():
            _load_shards(content, path, task, optimizer)
        else:
            shards.spread_state(content, task.state()["state_dict"], optimizer)
            _load_optimizer(optimizer, content["optimizer"])
        task.load_state(content)
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"checkpoint {path} does not fit this run ({reason}): give the arguments it was made with"
        ) from error
    if scaler is not None and "scaler" in content:
        scaler.load_state_dict(content["scaler"])
    for name in asdict(progress):
        setattr(progress, name, int(content.get(name, 0)))  # bad_steps is absent in files of former versions
    states = content["random_states"]
    if len(states) == dist.world_size:
        restore_random_state(states[dist.rank], dist.device)
    else:
        log.warning("resuming on %d processes a run of %d: the data order is kept", dist.world_size, len(states))


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The moments of a checkpoint; weight decay and the like are what this run says."""
    chosen = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, chosen, strict=True):
        group.update(own)


def _load_shards(content: dict[str, Any], path: Path, task: Task, optimizer: torch.optim.Optimizer) -> None:
    """Fill the task's and the optimizer's own tensors."""
    content["state_dict"] = task.state()["state_dict"]
    shards.make_state(content["tensors"], optimizer, task.module)
    tensors = shards.tensors_of(content["state_dict"], optimizer, task.module)
    differing = sorted(tensors.keys() ^ set(content["tensors"]))
    if differing:
        raise ValueError(f"it differs in {len(differing)} tensors, such as {differing[0]}")
    shards.load_tensors(path, tensors)


def _check_identity(content: dict[str, Any], path: Path, task: Task) -> None:
    if content.get("task", task.name) != task.name:
        raise UserError(f"checkpoint {path} is of {content['task']}, not of {task.name}: give another one")
    before, now = content.get("identity", {}), task.identity()
    differing = [k for k in now if k in before and before[k] != now[k]]
    if differing:
        key = differing[0]
        raise UserError(
            f"checkpoint {path} is of another run: {key} was {_short(before[key])}, now it is {_short(now[key])}; "
            "give the same, or begin a new run"
        )


def _check_position(content: dict[str, Any], path: Path, global_batch: int, flags: Flags) -> None:
    """Inside an epoch a position counts steps, which are as many samples as the global batch has."""
    before = content.get("global_batch", global_batch)
    if content["step_in_epoch"] and before != global_batch:
        raise UserError(
            f"checkpoint {path} is inside an epoch of {before} samples a step, now there are {global_batch}: choose "
            f"processes, {flags.batch_size} and {flags.accum_freq} so that their product is the same, or go on from "
            "the end of an epoch"
        )


def _name_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    """A run that goes on with other options says so."""
    for key in sorted(before.keys() & now.keys()):
        if before[key] != now[key]:
            log.warning("resuming with another %s: it was %s, now it is %s", key, _short(before[key]), _short(now[key]))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
