"""The one training loop.

A minimal task, complete::

    class Line(Task):
        name, source = "line", "the formula"

        def __init__(self):
            self.module = Squares(nn.Linear(1, 1))     # module(batch) -> {"loss": scalar}

        batches_per_epoch = 10

        def batches(self, epoch, start):
            for i in range(start, 10):
                x = torch.randn(8, 1, generator=torch.Generator().manual_seed(step_seed(epoch, i)))
                yield {"x": x, "y": 3 * x, "samples": 8, "skipped": [], "image_ids": [i]}

        def optimizer(self):
            return adamw(decay_groups(self.module.named_parameters(), 0.1), lr=0.1)

        def schedule(self, total_steps, steps_per_epoch):
            return make_schedule("cosine", base=0.1, warmup=2, total=total_steps)

        def state(self):
            return {"state_dict": self.module.state_dict()}

        def load_state(self, content):
            self.module.load_state_dict(content["state_dict"])

        def identity(self):
            return {"formula": "y = 3 x"}

    run = Loop(Line(), LoopOptions(epochs=2, batch_size=8), dist=init_distributed("cpu"), precision=make_precision(...))
    status = run.train(folder, resume="latest")        # 0: done; 75: a signal, saved
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from training.engine.checkpoint import Checkpoints
from training.engine.distributed import Dist, agree, from_master, gather_objects, wrap
from training.engine.errors import EXIT_DONE, EXIT_INTERRUPTED, UserError
from training.engine.flops import FlopMeter, peak_flops
from training.engine.folder import write_texts
from training.engine.journal import Journal, Pace, check_report
from training.engine.precision import Precision
from training.engine.profiler import profile_steps
from training.engine.saves import Saves
from training.engine.schedule import set_lr
from training.engine.sharding import Sharded
from training.engine.signals import Interrupted, StopSignal
from training.engine.skips import SkipPolicy
from training.engine.step import Outcome, Stepper
from training.engine.task import Batch, LoopOptions, Progress, Rate, Task

__all__ = ["Batch", "Loop", "LoopOptions", "Progress", "Rate", "Task"]

log = logging.getLogger(__name__)

LAG = {"cuda": 1, "cpu": 0}  # steps whose numbers may be under way while the next one is made


class Loop:
    """A training run: made, and thereby checked, before anything is written; then carried out by :meth:`train`.

    Args:
        task: what is trained.
        options: how.
        dist, precision: where, and in which numbers.

    Raises:
        UserError: nothing trains, an epoch is shorter than a step, weights would be kept in half precision, or what
            sends scalars to ``report_to`` is not installed.
    """

    def __init__(self, task: Task, options: LoopOptions, *, dist: Dist, precision: Precision) -> None:
        self.task, self.options, self.dist, self.precision = task, options, dist, precision
        check_report(options.report_to)
        if precision.param_dtype in (torch.bfloat16, torch.float16):
            raise UserError(
                f"{options.flags.precision} {precision.name} keeps the weights in half precision, where most steps of "
                "training round to nothing: it is for evaluation; train with amp_bf16 or fp32"
            )
        if options.fsdp and precision.scaler is not None:
            raise UserError(f"{options.flags.precision} {precision.name} does not go with --fsdp: use amp_bf16")
        self.steps_per_epoch = task.batches_per_epoch // options.accum_freq
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{options.flags.accum_freq} {options.accum_freq} exceeds an epoch's {task.batches_per_epoch} batches: "
                "lower it"
            )
        self.total_steps = self.steps_per_epoch * options.epochs
        if options.max_steps:
            self.total_steps = min(self.total_steps, options.max_steps)
        agree()  # before either waits for the other processes
        self.model: nn.Module = Sharded(task, dist) if options.fsdp else wrap(task.module, dist)
        if options.fsdp:
            task.inside = self.model.inside
        task.placed()
        self.optimizer = task.optimizer()
        self.stepper = Stepper(
            task, self.model, self.optimizer, precision=precision, dist=dist, clip_norm=options.clip_norm
        )
        if not self.stepper.parameters:
            raise UserError("nothing trains: every parameter is frozen")
        self.schedule: Rate = task.schedule(self.total_steps, self.steps_per_epoch)
        whole = self.steps_per_epoch * self._global_batch()
        self.skips = SkipPolicy(task.source, options.max_skipped, options.flags.max_skipped, whole=whole)
        dtype = precision.autocast_dtype or precision.param_dtype
        self.flops = FlopMeter(peak_flops(dist.device, dtype), dist.world_size)
        self.progress, self.pace = Progress(), Pace()
        self.pending: deque[Outcome] = deque()
        self.journal = Journal(None)

    # -- the run ------------------------------------------------------------------------------------------------------

    def train(self, folder: Path, resume: str | Path | None = None, *, texts: Mapping[str, str] | None = None) -> int:
        """Train to the end, or until a signal.

        Args:
            folder: of the run; it exists.
            resume: ``"latest"`` or ``"auto"`` (of the folder, where there is one), a checkpoint file, or None.
            texts: files that tell of the run, by name. Written when it is certain that it can go on: those of a run
                that is resumed with what does not fit stay as they are.

        Returns:
            Exit status: 0 done, 75 interrupted and saved.

        Raises:
            UserError: a checkpoint that does not fit, too many unusable samples, too many bad steps in a row.
        """
        task, options, progress = self.task, self.options, self.progress
        self.checkpoints = Checkpoints(folder, keep=options.keep, flags=options.flags)
        self.saves = Saves(
            self.checkpoints, task, progress, self.optimizer, self.precision.scaler, options=options, dist=self.dist,
            global_batch=self._global_batch(),
        )  # fmt: skip
        if resume:
            self.saves.resume(resume)
        write_texts(folder, texts or {}, self.dist, options.flags)
        self.journal = Journal(
            folder if self.dist.is_master else None, progress.step if resume else None, report_to=options.report_to
        )
        self._announce()
        task.prepare(progress)
        if resume:
            self._catch_up()
        if options.evaluate_first and progress.step == 0:
            task.evaluate(progress, self.journal, start=True)
        self.batches = task.batches
        if options.profile and self.dist.is_master:
            self.batches = profile_steps(task.batches, folder / "profile", options.profile * options.accum_freq)
        try:
            with StopSignal() as self.stop:
                while self._goes_on():
                    self._epoch()
                    self._after_epoch()
                if not self.saves.released:  # at its end when it was resumed: its last save may have been broken off
                    self.saves.release()
                task.finish(folder)
        except Interrupted:
            log.warning(
                "interrupted: saved as %s; go on with %s", self.checkpoints.last, options.flags.resume
            )  # fmt: skip
            return EXIT_INTERRUPTED
        finally:
            self.journal.close()
        return EXIT_DONE

    def _goes_on(self) -> bool:
        """Whether steps are to be done, or only what comes after the last one: the signal may have come in that."""
        progress = self.progress
        left = progress.step < self.total_steps or self.checkpoints.inside_epoch
        return progress.epoch < self.options.epochs and left and not self.task.ended(progress)

    def _announce(self) -> None:
        trained, every = (
            sum(p.numel() for p in part) for part in (self.stepper.parameters, self.task.module.parameters())
        )
        log.info(
            "%d steps an epoch, %d in all; %.1f of %.1f million parameters train",
            self.steps_per_epoch, self.total_steps, trained / 1e6, every / 1e6,
        )  # fmt: skip
        if self.task.warmup >= self.total_steps:
            flag = self.options.flags.warmup
            log.warning(
                "the warm-up of %d steps (%s) is no shorter than the run of %d steps: the rate never stays at its full "
                "size, and little is learned; set %s to %d, or train longer",
                self.task.warmup, flag, self.total_steps, flag, self.total_steps // 10,
            )  # fmt: skip

    def _epoch(self) -> None:
        """From the progress to the end of its epoch, or of the run."""
        progress, accumulate = self.progress, self.options.accum_freq
        self.end = min(self.steps_per_epoch, progress.step_in_epoch + self.total_steps - progress.step)
        self.model.train()
        self.skips.reset(progress.usable, progress.skipped)
        batches = self.batches(progress.epoch, progress.step_in_epoch * accumulate)
        clock = time.perf_counter()
        with self._bar() as bar, ExitStack() as at_end:
            at_end.callback(getattr(batches, "close", lambda: None))  # a generator may have something to finish
            while progress.step_in_epoch < self.end:
                micro = [next(batches) for _ in range(accumulate)]
                waited = time.perf_counter() - clock
                rate = self.schedule(progress.step, progress.epoch)
                set_lr(self.optimizer, rate)
                with self.flops.step(sum(b["samples"] for b in micro)):
                    outcome = self.stepper(micro, progress.step, stop=lambda: self.stop.received)
                progress.step += 1
                progress.step_in_epoch += 1
                self.pending.append(outcome)
                # A GPU has the next step queued before the numbers of the last one are asked for.
                totals, samples = self._read(keep=0 if self._reading_is_due() else LAG[self.dist.device.type])
                now = time.perf_counter()
                self._report(bar, totals, samples, rate, waited, now - clock)
                saving = time.perf_counter()
                self._save_if_due(totals)
                clock = now + time.perf_counter() - saving  # to save is not to wait for data
        if self.end == self.steps_per_epoch:  # not where the run ends inside it: it may be given more steps later
            progress.epoch, progress.step_in_epoch, progress.usable, progress.skipped = progress.epoch + 1, 0, 0, 0

    def _reading_is_due(self) -> bool:
        """Whether the state after this very step is about to be told or saved."""
        step, every = self.progress.step, self.options.save_every_steps
        told = step % self.options.log_every == 0 or self.progress.step_in_epoch == self.end
        return told or (every > 0 and step % every == 0)

    def _read(self, *, keep: int) -> tuple[dict[str, float], float]:
        """Judge all steps that are done but the ``keep`` newest; the numbers of the last one judged, and the samples of
        all of them."""
        totals: dict[str, float] = {}
        samples = 0.0
        while len(self.pending) > keep:
            outcome = self.pending.popleft()
            totals = outcome.read()
            samples += totals["samples"]
            self._judge(outcome, totals)
        return totals, samples

    def _judge(self, outcome: Outcome, totals: dict[str, float]) -> None:
        """Count unusable samples and bad losses; stop when there are too many."""
        progress, flags = self.progress, self.options.flags
        self.skips.name(outcome.skipped)
        self.skips.count(totals["samples"], totals["skipped"])
        progress.usable, progress.skipped = int(self.skips.usable), int(self.skips.skipped)
        self.skips.judge()
        if totals["good"]:
            progress.bad_steps = 0
            return
        progress.bad_steps += 1
        ids = [i for part in gather_objects([int(i) for i in outcome.image_ids]) for i in part]
        what = "gradient" if math.isfinite(totals["loss"]) else "loss"
        log.warning(
            "step %d: the %s is not finite (loss %s), the step is skipped (images %s)",
            outcome.step, what, totals["loss"], ids,
        )  # fmt: skip
        if progress.bad_steps >= self.options.max_bad_steps:
            raise UserError(
                f"the {what} was not finite in {progress.bad_steps} steps in a row, lastly of images {ids}: lower "
                f"{flags.lr} or check these images; the last good checkpoint is {self.checkpoints.last}"
            )

    # -- records ------------------------------------------------------------------------------------------------------

    def _bar(self) -> tqdm:
        progress = self.progress
        return tqdm(
            total=self.end,
            initial=progress.step_in_epoch,
            desc=f"epoch {progress.epoch + 1}/{self.options.epochs}",
            unit="step",
            disable=not self.dist.is_master,
            mininterval=1.0 if self.dist.is_master else 0.1,
            dynamic_ncols=True,
        )

    def _report(
        self, bar: tqdm, totals: dict[str, float], samples: float, rate: float, waited: float, took: float
    ) -> None:
        """Progress bar every step; TensorBoard and the log, with mean times, every ``log_every`` steps.

        Args:
            totals: of the step that was read last; empty while none has arrived.
            samples: of all steps that were read now.
        """
        progress = self.progress
        bar.update(1)
        if totals:
            speed = samples / max(took, 1e-9)
            bar.set_postfix(loss=f"{totals['loss']:.4f}", lr=f"{rate:.1e}", img_s=f"{speed:.1f}", refresh=False)
        self.pace.add(samples, waited, took)
        if progress.step % self.options.log_every and progress.step_in_epoch != self.end:
            return
        pace, self.pace = self.pace, Pace()
        own = self.task.scalars(totals)
        scalars = {"train/loss": totals["loss"], "train/lr": rate, **pace.scalars()}
        scalars |= self.flops.scalars(pace.samples_per_second)
        if totals["grad_norm"] == totals["grad_norm"]:
            scalars["train/grad_norm"] = totals["grad_norm"]
        scalars |= {k if "/" in k else f"train/{k}": v for k, v in own.items()}
        if self.dist.device.type == "cuda":
            scalars["train/memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.journal.scalars(scalars, progress.step)
        shown = "".join(f"  {k} {v:.4f}" for k, v in own.items() if "/" not in k)
        log.info(
            "epoch %d step %d/%d  loss %.4f%s  lr %.2e  %s", progress.epoch + 1, progress.step_in_epoch, self.end,
            totals["loss"], shown, rate, pace.text(self.total_steps - progress.step),
        )  # fmt: skip

    # -- checkpoints and evaluation -----------------------------------------------------------------------------------

    def _after_epoch(self) -> None:
        options, progress = self.options, self.progress
        if self._at_end() or (options.save_every_epochs and progress.begun % options.save_every_epochs == 0):
            self.saves.save(f"epoch_{progress.begun}.pt")
            if self.dist.is_master:
                self.checkpoints.prune_after_epoch()
        if options.save_latest:
            self.saves.save("epoch_latest.pt")
        if self._evaluation_is_due():
            self.task.evaluate(progress, self.journal)

    def _at_end(self) -> bool:
        """Whether the last step has been done."""
        return self.progress.epoch >= self.options.epochs or self.progress.step >= self.total_steps

    def _evaluation_is_due(self) -> bool:
        """Whether the state after an epoch, or after the last step, is one to evaluate."""
        every = self.options.evaluate_every
        return bool(every and self.progress.begun % every == 0) or (self._at_end() and self.options.evaluate_last)

    def _catch_up(self) -> None:
        """Evaluate where a run was broken off in its evaluation: the checkpoint was written before that."""
        progress = self.progress
        between = progress.step > 0 and (progress.step_in_epoch == 0 or self._at_end())
        known = from_master(self.journal.knows(progress.step)) and not self.task.evaluations_steer
        if between and not self.checkpoints.inside_epoch and self._evaluation_is_due() and not known:
            self.task.evaluate(progress, self.journal)

    def _save_if_due(self, totals: dict[str, float]) -> None:
        every, progress, stop = self.options.save_every_steps, self.progress, totals.get("stop", 0)
        inside = progress.step_in_epoch < self.end
        if stop or (every and progress.step % every == 0 and inside):
            self._read(keep=0)
            self.saves.save(f"epoch_{progress.epoch}_step_{progress.step_in_epoch}.pt")
            if self.dist.is_master:
                self.checkpoints.prune_inside_epoch()
        if stop:
            raise Interrupted

    def _global_batch(self) -> int:
        return self.options.batch_size * self.options.accum_freq * self.dist.world_size
