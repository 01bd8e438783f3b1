"""A training run from its first to its last step."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
from open_clip import CLIP
from open_clip.weights import export_state_dict
from training.class_embeddings import load_or_compute
from training.data import DevicePrefetcher, build_train_data, prepare_batch
from training.engine.checkpoint import (
    RELEASE,
    find_latest,
    make_checkpoint,
    prune,
    read_checkpoint,
    restore,
    save_atomically,
)
from training.engine.distributed import Dist, barrier, together
from training.engine.errors import UserError
from training.engine.journal import Journal
from training.engine.loop import EXIT_INTERRUPTED, Interrupted, Loop, Progress, StopSignal, train_one_epoch
from training.engine.optim import build_optimizer
from training.engine.precision import Precision
from training.engine.profiler import profile_steps
from training.engine.schedule import make_schedule
from training.methods import build_method
from training.models import StartWeights, as_user_error, prepare_models, wrap
from training.teachers.cache import fill, open_store

log = logging.getLogger(__name__)

STEP_CHECKPOINTS = 2  # checkpoints inside an epoch that are kept: the newest, and one in case it is damaged


class Trainer:
    """A training run: made (and thereby checked) before anything is written, then carried out by :meth:`train`.

    Args:
        args: the program's arguments.
        model: the start model on the CPU; becomes the student.
        dist, precision: where and how to compute.

    Raises:
        UserError: wrong data, embeddings or arguments.
    """

    def __init__(self, args: argparse.Namespace, model: CLIP, dist: Dist, precision: Precision) -> None:
        self.args, self.dist, self.precision = args, dist, precision
        contrastive = args.dataset_type == "contrastive"
        tokenizer = as_user_error(open_clip.get_tokenizer, args.model) if contrastive else None
        self.crop_size = model.visual.image_size
        self.image_size = self.crop_size if contrastive else args.det_image_size
        self.data = build_train_data(
            args, image_size=self.image_size, crop_size=self.crop_size, rank=dist.rank, world_size=dist.world_size,
            tokenizer=tokenizer,
        )  # fmt: skip
        self.store = None
        if args.cache_teacher:
            self.store = self.data.dataset.store = open_store(args.cache_teacher, self.data.dataset, model, precision)
        nouns = self._noun_embeddings(model) if args.dataset_type == "region_clip" else None
        self.student, teacher = prepare_models(args, model, dist, precision)
        self.method = build_method(
            args, student=self.student, teacher=teacher, noun_embeddings=nouns, rank=dist.rank,
            world_size=dist.world_size,
        )  # fmt: skip
        self.start = StartWeights(self.student)
        self.optimizer = as_user_error(build_optimizer, args, self.method)
        self.steps_per_epoch = self.data.batches_per_epoch // args.accum_freq
        if self.steps_per_epoch == 0:
            raise UserError(
                f"--accum-freq {args.accum_freq} exceeds an epoch's {self.data.batches_per_epoch} batches: lower it"
            )
        self.total_steps = self.steps_per_epoch * args.epochs
        if args.max_steps:
            self.total_steps = min(self.total_steps, args.max_steps)
        self.progress = Progress()
        self.folder: Path | None = None
        self.journal = Journal(None)
        self.last_checkpoint = "none"

    def _noun_embeddings(self, model: CLIP) -> Any:
        tokenizer = None if self.args.train_embed_path else as_user_error(open_clip.get_tokenizer, self.args.model)
        return load_or_compute(
            self.args, model, tokenizer, self.data.class_names, flag="--train-embed-path",
            names_file=self.args.train_data, device=self.dist.device, progress=self.dist.is_master,
        ).to(self.dist.device)  # fmt: skip

    # -- the run ------------------------------------------------------------------------------------------------------

    def train(self, folder: Path, evaluation: Any = None) -> int:
        """Train to the end, or until a signal.

        Args:
            folder: the experiment's.
            evaluation: called as ``evaluation(model, journal, epoch=, step=, kind=)``; None for none.

        Returns:
            Exit status: 0 done, 75 interrupted and saved.
        """
        args, progress, self.folder = self.args, self.progress, folder
        if args.resume:
            with together():
                self._resume()
        self.journal = Journal(folder if self.dist.is_master else None, progress.step if args.resume else None)
        self._log_size()
        if evaluation and not args.skip_first_eval and progress.step == 0:
            evaluation(self.student, self.journal, epoch=0, step=0, kind="start")
        if self.store is not None:
            fill(
                self.store, self.data.dataset, self.method.teacher, dist=self.dist, precision=self.precision,
                workers=args.workers,
            )  # fmt: skip
            self.method.teacher = None
        loop = self._make_loop()
        try:
            while progress.epoch < args.epochs and progress.step < self.total_steps:
                left = self.total_steps - progress.step
                loop.steps_per_epoch = min(self.steps_per_epoch, progress.step_in_epoch + left)
                train_one_epoch(loop, progress)
                self._after_epoch(evaluation)
        except Interrupted:
            log.warning("interrupted: saved as %s; go on with --resume latest", self.last_checkpoint)
            return EXIT_INTERRUPTED
        finally:
            loop.stop.restore()
            self.journal.close()
        return 0

    def _make_loop(self) -> Loop:
        args = self.args
        schedule = make_schedule(
            args.lr_scheduler, base=args.lr, warmup=args.warmup, total=self.total_steps,
            cooldown=min(args.lr_cooldown_epochs * self.steps_per_epoch, self.total_steps),
            power=args.lr_cooldown_power, end=args.lr_cooldown_end,
        )  # fmt: skip
        batches = self.batches
        if args.profile and self.dist.is_master:
            batches = profile_steps(batches, self.folder / "profile", args.profile * args.accum_freq)
        return Loop(
            model=wrap(self.method, self.dist),
            method=self.method,
            batches=batches,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
            optimizer=self.optimizer,
            schedule=schedule,
            precision=self.precision,
            dist=self.dist,
            journal=self.journal,
            args=args,
            save=self._save_inside,
            last_checkpoint=lambda: self.last_checkpoint,
            stop=StopSignal(),
        )

    def batches(self, epoch: int, start: int) -> Iterator[dict]:
        """Prepared micro-batches of an epoch, from one on."""
        self.data.set_epoch(epoch, start)
        visual = self.student.visual
        prepare = partial(
            prepare_batch, device=self.dist.device, dtype=self.precision.input_dtype, mean=visual.image_mean,
            std=visual.image_std, image_size=self.image_size, crop_size=self.crop_size,
        )  # fmt: skip
        return iter(DevicePrefetcher(self.data.loader, prepare, self.dist.device))

    def _after_epoch(self, evaluation: Any) -> None:
        args, progress = self.args, self.progress
        last = progress.epoch >= args.epochs or progress.step >= self.total_steps
        if last or (args.save_frequency and progress.epoch % args.save_frequency == 0):
            self._save(f"epoch_{progress.epoch}.pt")
            if self.dist.is_master:
                prune(self.folder / "checkpoints", 0, "epoch_*_step_*.pt")
                if args.keep_checkpoints:
                    prune(self.folder / "checkpoints", args.keep_checkpoints, "epoch_[0-9]*.pt")
        if args.save_most_recent:
            self._save("epoch_latest.pt")
        if evaluation and (last or args.zeroshot_frequency and progress.epoch % args.zeroshot_frequency == 0):
            with self.start.ensembled(self.student, args.alpha):
                evaluation(self.student, self.journal, epoch=progress.epoch, step=progress.step)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save_inside(self, progress: Progress) -> None:
        """A checkpoint inside an epoch; the newest few are kept until the epoch ends."""
        self._save(f"epoch_{progress.epoch}_step_{progress.step_in_epoch}.pt")
        if self.dist.is_master:
            prune(self.folder / "checkpoints", STEP_CHECKPOINTS, "epoch_*_step_*.pt")

    def _save(self, name: str) -> None:
        """Write a checkpoint, and the release file of the weights at that moment. Every process calls this."""
        args, progress = self.args, self.progress
        content = make_checkpoint(
            name=args.name, student=self.student, optimizer=self.optimizer, scaler=self.precision.scaler,
            epoch=progress.epoch, step_in_epoch=progress.step_in_epoch, step=progress.step,
            start_hash=self.start.hash, args=vars(args), device=self.dist.device,
        )  # fmt: skip
        path = self.folder / "checkpoints" / name
        with together():
            if self.dist.is_master:
                save_atomically(content, path)
                weights = export_state_dict(self.student, state=self.start.ensemble(self.student, args.alpha))
                release = {"epoch": progress.epoch, "name": args.name, "state_dict": weights}
                save_atomically(release, path.parent / RELEASE)
        self.last_checkpoint = str(path)

    def _resume(self) -> None:
        folder = self.folder / "checkpoints"
        if self.args.resume == "latest":
            found = find_latest(folder)
            if found is None:
                log.warning("no complete checkpoint in %s: the run starts from the beginning", folder)
                return
            path, checkpoint = found
        else:
            path = Path(self.args.resume)
            checkpoint = read_checkpoint(path)
        restore(
            checkpoint, path, student=self.student, optimizer=self.optimizer, scaler=self.precision.scaler,
            start_hash=self.start.hash, rank=self.dist.rank, world_size=self.dist.world_size, device=self.dist.device,
        )  # fmt: skip
        progress = self.progress
        progress.epoch, progress.step = int(checkpoint["epoch"]), int(checkpoint["step"])
        progress.step_in_epoch = int(checkpoint["step_in_epoch"])
        self.last_checkpoint = str(path)
        log.info("resumed %s: epoch %d, step %d", path, progress.epoch + 1, progress.step_in_epoch)
        barrier()

    def _log_size(self) -> None:
        for reason, number in self.data.skipped.items():
            log.warning("%s: %d x %s (left out)", self.args.train_data, number, reason)
        trained = sum(p.numel() for g in self.optimizer.param_groups for p in g["params"])
        log.info(
            "%d images, %d steps an epoch; %.1f of %.1f million parameters train", self.data.num_images,
            self.steps_per_epoch, trained / 1e6, sum(p.numel() for p in self.student.parameters()) / 1e6,
        )  # fmt: skip
