"""Distillation, RegionCLIP and contrastive training as a task of the engine's loop."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import open_clip
from open_clip import CLIP
from open_clip.weights import export_state_dict
from training.class_embeddings import load_or_compute
from training.data import DevicePrefetcher, build_train_data, prepare_batch
from training.engine.distributed import Dist
from training.engine.errors import UserError, as_user_error
from training.engine.journal import Journal
from training.engine.loop import Batch, LoopOptions, Progress, Rate, Task
from training.engine.precision import Precision
from training.engine.schedule import make_schedule, step_seed
from training.methods import build_method
from training.models import StartWeights, build_optimizer, prepare_models
from training.teachers.cache import fill, open_store

log = logging.getLogger(__name__)

RELEASE = "clipself.pt"
# Arguments that make a run what it is; a resume with others is refused.
_IDENTITY = (
    "model", "dataset_type", "extract_type", "multiscale", "lock_image", "lock_image_unlocked_groups", "train_ratio",
    "seed",
)  # fmt: skip
Evaluate = Callable[..., dict]


def loop_options(args: argparse.Namespace) -> LoopOptions:
    """What the program's arguments say to the loop."""
    return LoopOptions(
        epochs=args.epochs, batch_size=args.batch_size, accum_freq=args.accum_freq, max_steps=args.max_steps,
        clip_norm=args.grad_clip_norm, max_skipped=args.max_skipped, max_bad_steps=args.max_nan_steps,
        log_every=args.log_every_n_steps, save_every_steps=args.save_every_n_steps,
        save_every_epochs=args.save_frequency, keep=args.keep_checkpoints, save_latest=args.save_most_recent,
        evaluate_first=not args.skip_first_eval, evaluate_every=args.zeroshot_frequency, profile=args.profile,
    )  # fmt: skip


class Distillation(Task):
    """The training that the program's arguments describe: made (and thereby checked) before anything is written.

    Args:
        args: the program's arguments.
        model: the start model on the CPU; becomes the student.
        dist, precision: where and how to compute.
        evaluation: called as ``evaluation(model, journal, epoch=, step=, kind=)``; None for none.

    Raises:
        UserError: wrong data, embeddings or arguments.
    """

    name = "distillation"

    def __init__(
        self,
        args: argparse.Namespace,
        model: CLIP,
        dist: Dist,
        precision: Precision,
        evaluation: Evaluate | None = None,
    ) -> None:
        self.args, self.dist, self.precision, self.evaluation = args, dist, precision, evaluation
        self.source = f"--train-data {args.train_data}"
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
        self.module = self.method = build_method(
            args, student=self.student, teacher=teacher, noun_embeddings=nouns, rank=dist.rank,
            world_size=dist.world_size,
        )  # fmt: skip
        self.start = StartWeights(self.student)

    def _noun_embeddings(self, model: CLIP) -> Any:
        tokenizer = None if self.args.train_embed_path else as_user_error(open_clip.get_tokenizer, self.args.model)
        return load_or_compute(
            self.args, model, tokenizer, self.data.class_names, flag="--train-embed-path",
            names_file=self.args.train_data, device=self.dist.device, progress=self.dist.is_master,
        ).to(self.dist.device)  # fmt: skip

    # -- data ---------------------------------------------------------------------------------------------------------

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of a whole epoch."""
        return self.data.batches_per_epoch

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """Prepared micro-batches of an epoch, from one on."""
        self.data.set_epoch(epoch, start)
        visual = self.student.visual
        prepare = partial(
            prepare_batch, device=self.dist.device, dtype=self.precision.input_dtype, mean=visual.image_mean,
            std=visual.image_std, image_size=self.image_size, crop_size=self.crop_size,
        )  # fmt: skip
        return iter(DevicePrefetcher(self.data.loader, prepare, self.dist.device))

    # -- a step -------------------------------------------------------------------------------------------------------

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW with the published split into decayed and undecayed parameters."""
        return build_optimizer(self.args, self.student)

    def schedule(self, total_steps: int, steps_per_epoch: int) -> Rate:
        """That of ``--lr-scheduler``."""
        args = self.args
        return make_schedule(
            args.lr_scheduler, base=args.lr, warmup=args.warmup, total=total_steps,
            cooldown=min(args.lr_cooldown_epochs * steps_per_epoch, total_steps),
            power=args.lr_cooldown_power, end=args.lr_cooldown_end,
        )  # fmt: skip

    def begin_step(self, micro: list[Batch], step: int) -> None:
        """The method counts regions over processes and draws what it draws."""
        self.method.begin_step(micro, seed=step_seed(self.args.seed, step))

    def end_step(self) -> None:
        """The method bounds its temperature."""
        self.method.end_step()

    # -- records ------------------------------------------------------------------------------------------------------

    def scalars(self, totals: dict[str, float]) -> dict[str, float]:
        """Means over regions, their number, and the temperature."""
        regions = totals["regions"]
        means = {k.removesuffix("_sum"): v / max(regions, 1) for k, v in totals.items() if k.endswith("_sum")}
        return {
            **means,
            "train/regions": regions,
            "train/logit_scale": self.student.logit_scale.exp().item(),
        }

    def evaluate(self, progress: Progress, journal: Journal, *, start: bool = False) -> None:
        """Evaluate the start model, or the ensemble of start model and student."""
        if self.evaluation is None:
            return
        if start:
            self.evaluation(self.student, journal, epoch=0, step=0, kind="start")
            return
        with self.start.ensembled(self.student, self.args.alpha):
            self.evaluation(self.student, journal, epoch=progress.epoch, step=progress.step)

    # -- state --------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The student, and of which start weights and experiment it is."""
        return {"name": self.args.name, "state_dict": self.student.state_dict(), "start_hash": self.start.hash}

    def load_state(self, content: dict[str, Any]) -> None:
        """The student's weights. UserError when they began from others."""
        if content.get("start_hash") != self.start.hash:
            raise UserError(
                "the checkpoint to resume began from other weights: give the same --model, --pretrained and --seed"
            )
        self.student.load_state_dict(content["state_dict"])

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with this one."""
        values = {f"--{name.replace('_', '-')}": getattr(self.args, name) for name in _IDENTITY}
        return {**values, "the number of training images": self.data.num_images}

    def options(self) -> dict[str, Any]:
        """All arguments."""
        return {k: v for k, v in vars(self.args).items() if k != "resume"}

    def versions(self) -> dict[str, str]:
        """The model package's."""
        return {"open_clip": open_clip.__version__}

    def prepare(self, progress: Progress) -> None:
        """Say what the data lacks; fill the store of teacher answers."""
        for reason, number in self.data.skipped.items():
            log.warning("%s: %d x %s (left out)", self.source, number, reason)
        log.info("%d images", self.data.num_images)
        if self.store is not None:
            fill(
                self.store, self.data.dataset, self.method.teacher, dist=self.dist, precision=self.precision,
                workers=self.args.workers,
            )  # fmt: skip
            self.method.teacher = None

    def releases(self, progress: Progress) -> dict[str, dict[str, Any]]:
        """The ensemble of student and start model in the published layout."""
        weights = export_state_dict(self.student, state=self.start.ensemble(self.student, self.args.alpha))
        content = {"epoch": progress.epoch, "name": self.args.name, "state_dict": weights}
        return {str(Path("checkpoints") / RELEASE): content}
