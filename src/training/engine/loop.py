"""One epoch of training, readable from top to bottom."""

from __future__ import annotations

import contextlib
import datetime
import logging
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from training.engine.distributed import Dist, all_reduce_sum, gather_objects
from training.engine.errors import UserError
from training.engine.journal import Journal
from training.engine.precision import Precision
from training.engine.schedule import set_lr
from training.methods import Method

log = logging.getLogger(__name__)

NAMED_SKIPS = 20  # unusable images named in the log in each epoch; the others are counted
FEW = 32  # samples seen before the share of unusable ones is judged
EXIT_INTERRUPTED = 75  # exit status after a signal: saved, to be resumed (EX_TEMPFAIL)


class Interrupted(Exception):
    """A signal asked the run to end; its state is saved."""


class StopSignal:
    """Remembers SIGTERM and SIGINT, so that a step is finished and saved. A second SIGINT ends at once."""

    def __init__(self) -> None:
        self.received = False
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


@dataclass
class Progress:
    """Where a run is. Everything the loop counts, so that a checkpoint can hold it.

    Attributes:
        epoch: completed epochs.
        step_in_epoch: optimizer steps done of the current one.
        step: optimizer steps done in all.
        bad_steps: steps in a row with a loss or gradient that is not finite; they are skipped.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    bad_steps: int = 0


@dataclass
class Pace:
    """Sums since the last line of the log, so that a line shows means: one slow step says little.

    Attributes:
        steps, samples: done; samples of all processes.
        data, step: seconds spent waiting for data, and in all.
    """

    steps: int = 0
    samples: float = 0.0
    data: float = 0.0
    step: float = 0.0

    def add(self, samples: float, data: float, step: float) -> None:
        """Count one optimizer step."""
        self.steps, self.samples = self.steps + 1, self.samples + samples
        self.data, self.step = self.data + data, self.step + step


@dataclass
class Loop:
    """What an epoch needs, made once.

    Attributes:
        model: the method, possibly wrapped for data parallelism; ``method`` is the method itself.
        batches: epoch, first micro-batch -> iterator over prepared micro-batches.
        steps_per_epoch: optimizer steps.
        total_steps: of the whole run.
        schedule: step -> learning rate.
        save: called with the progress when a checkpoint inside an epoch is due.
        last_checkpoint: gives the path of the newest checkpoint, for messages.
    """

    model: nn.Module
    method: Method
    batches: Callable[[int, int], Iterator[dict]]
    steps_per_epoch: int
    total_steps: int
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]
    precision: Precision
    dist: Dist
    journal: Journal
    args: Any
    save: Callable[[Progress], None]
    last_checkpoint: Callable[[], str]
    stop: StopSignal
    seen: dict[str, float] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)


def step_seed(seed: int, step: int) -> int:
    """Seed of a step's random choices: the same on every process, another one each step."""
    return (seed * 1_000_003 + step) % 2**31


def train_one_epoch(loop: Loop, progress: Progress) -> None:
    """Train from ``progress`` to the end of its epoch.

    Raises:
        UserError: too many unusable images, or too many steps in a row without a finite loss.
        Interrupted: a signal was received; the state has been saved.
    """
    args, method = loop.args, loop.method
    loop.model.train()
    trainable = [p for group in loop.optimizer.param_groups for p in group["params"]]
    batches = loop.batches(progress.epoch, progress.step_in_epoch * args.accum_freq)
    loop.seen = {"samples": 0.0, "skipped": 0.0, "named": 0.0}
    bar = _bar(loop, progress)
    clock = time.perf_counter()
    with bar:
        while progress.step_in_epoch < loop.steps_per_epoch:
            micro = [next(batches) for _ in range(args.accum_freq)]
            data_time = time.perf_counter() - clock
            rate = loop.schedule(progress.step)
            set_lr(loop.optimizer, rate)
            method.begin_step(micro, seed=step_seed(args.seed, progress.step))
            losses = _forward_backward(loop, micro)
            totals = _totals(loop, micro, losses)
            grad_norm, totals["good"] = _optimizer_step(loop, trainable, finite=totals["finite"])
            method.end_step()
            progress.step += 1
            progress.step_in_epoch += 1
            _judge(loop, progress, totals, micro)
            now = time.perf_counter()
            _report(loop, progress, bar, totals, rate, grad_norm, data_time, now - clock)
            clock = now
            _save_if_due(loop, progress, totals["stop"])
    progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0


def _forward_backward(loop: Loop, micro: list[dict]) -> list[dict]:
    """Gradients of the step: summed over micro-batches, exchanged between processes with the last one only."""
    outputs = []
    scaler = loop.precision.scaler
    for i, batch in enumerate(micro):
        inner = i + 1 < len(micro) and hasattr(loop.model, "no_sync")
        with loop.model.no_sync() if inner else contextlib.nullcontext():
            with loop.precision.autocast():
                output = loop.model(batch)
            (output["loss"] if scaler is None else scaler.scale(output["loss"])).backward()
        outputs.append({k: v.detach() for k, v in output.items()})
    return outputs


def _totals(loop: Loop, micro: list[dict], outputs: list[dict]) -> dict[str, float]:
    """Sums over micro-batches and processes, in one collective and one transfer: loss, regions, samples, stop."""
    names = sorted(outputs[0])
    values = [torch.stack([o[n].double() for o in outputs]).sum() for n in names]
    counts = [sum(b["samples"] for b in micro), sum(len(b["skipped"]) for b in micro), float(loop.stop.received)]
    device = values[0].device
    packed = torch.cat([torch.stack(values), torch.tensor(counts, dtype=torch.float64, device=device)])
    totals = dict(zip([*names, "samples", "skipped", "stop"], all_reduce_sum(packed).tolist(), strict=True))
    totals["loss"] /= loop.dist.world_size
    totals["finite"] = abs(totals["loss"]) < float("inf")  # false for NaN as well
    return totals


def _optimizer_step(loop: Loop, trainable: list[nn.Parameter], *, finite: bool) -> tuple[float, bool]:
    """Clip and step, or drop gradients that are not finite.

    Returns:
        The gradient norm before clipping, and whether the step was good. float16 gradients that overflowed are: the
        scaler drops them by itself, as it must now and then to find its scale.
    """
    scaler, optimizer = loop.precision.scaler, loop.optimizer
    norm = float("nan")
    if finite:
        if scaler is not None:
            scaler.unscale_(optimizer)
        # A finite loss may have gradients that are not, and one step with them would spoil every weight for good.
        total = torch.nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None])
        if loop.args.grad_clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(trainable, loop.args.grad_clip_norm, total)
        norm = total.item()
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        elif finite := abs(norm) < float("inf"):
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


def _judge(loop: Loop, progress: Progress, totals: dict[str, float], micro: list[dict]) -> None:
    """Count unusable images and bad losses; stop when there are too many."""
    args, seen = loop.args, loop.seen
    seen["samples"] += totals["samples"]
    seen["skipped"] += totals["skipped"]
    for file, reason in (s for batch in micro for s in batch["skipped"]):
        if seen["named"] < NAMED_SKIPS:
            log.warning("skipped %s: %s", file, reason)
        seen["named"] += 1
    asked = seen["samples"] + seen["skipped"]
    enough = asked >= FEW or progress.step_in_epoch == loop.steps_per_epoch
    if enough and seen["skipped"] > args.max_skipped * asked:
        raise UserError(
            f"{seen['skipped']:.0f} of {asked:.0f} samples of {args.train_data} could not be used, more than "
            f"--max-skipped {args.max_skipped} allows: see the files named in the log"
        )
    progress.bad_steps = 0 if totals["good"] else progress.bad_steps + 1
    if not totals["good"]:
        ids = [i for part in gather_objects([b["image_ids"].tolist() for b in micro]) for row in part for i in row]
        what = "gradient" if totals["finite"] else "loss"
        log.warning(
            "step %d: the %s is not finite (loss %s), the step is skipped (images %s)",
            progress.step, what, totals["loss"], ids,
        )  # fmt: skip
        if progress.bad_steps >= args.max_nan_steps:
            raise UserError(
                f"the {what} was not finite in {progress.bad_steps} steps in a row, lastly of images {ids}: lower --lr "
                f"or check these images; the last good checkpoint is {loop.last_checkpoint()}"
            )


def _bar(loop: Loop, progress: Progress) -> tqdm:
    return tqdm(
        total=loop.steps_per_epoch,
        initial=progress.step_in_epoch,
        desc=f"epoch {progress.epoch + 1}/{loop.args.epochs}",
        unit="step",
        disable=not loop.dist.is_master,
        mininterval=1.0 if loop.dist.is_master else 0.1,
        dynamic_ncols=True,
    )


def _report(
    loop: Loop,
    progress: Progress,
    bar: tqdm,
    totals: dict[str, float],
    rate: float,
    grad_norm: float,
    data_time: float,
    step_time: float,
) -> None:
    """Progress bar every step; TensorBoard and the log, with mean times, every ``--log-every-n-steps``."""
    bar.update(1)
    now = totals["samples"] / max(step_time, 1e-9)
    bar.set_postfix(loss=f"{totals['loss']:.4f}", lr=f"{rate:.1e}", img_s=f"{now:.1f}", refresh=False)
    loop.pace.add(totals["samples"], data_time, step_time)
    every = loop.args.log_every_n_steps
    if progress.step % every and progress.step_in_epoch != loop.steps_per_epoch:
        return
    pace, loop.pace = loop.pace, Pace()
    data_time, step_time = pace.data / pace.steps, pace.step / pace.steps
    images_per_second = pace.samples / max(pace.step, 1e-9)
    scalars = {
        "train/loss": totals["loss"],
        "train/lr": rate,
        "train/images_per_second": images_per_second,
        "train/data_time": data_time,
        "train/step_time": step_time,
        "train/regions": totals["regions"],
        "train/logit_scale": loop.method.student.logit_scale.exp().item(),
    }
    if grad_norm == grad_norm:
        scalars["train/grad_norm"] = grad_norm
    for name, value in totals.items():
        if name.endswith("_sum"):
            scalars[f"train/{name.removesuffix('_sum')}"] = value / max(totals["regions"], 1)
    if loop.dist.device.type == "cuda":
        scalars["train/memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    loop.journal.scalars(scalars, progress.step)
    if loop.dist.is_master:
        log.info(
            "epoch %d step %d/%d  loss %.4f  lr %.2e  %.1f images/s  data %.3f s  step %.3f s  left %s",
            progress.epoch + 1, progress.step_in_epoch, loop.steps_per_epoch, totals["loss"], rate,
            images_per_second, data_time, step_time,
            datetime.timedelta(seconds=round((loop.total_steps - progress.step) * step_time)),
        )  # fmt: skip


def _save_if_due(loop: Loop, progress: Progress, stop: float) -> None:
    every = loop.args.save_every_n_steps
    inside = progress.step_in_epoch < loop.steps_per_epoch
    if stop:
        loop.save(progress)
        raise Interrupted
    if every and progress.step % every == 0 and inside:
        loop.save(progress)
