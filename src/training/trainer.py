"""Training of a dense CLIP by any method as a task of the engine's loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import open_clip
from open_clip import CLIP, ImageTower
from open_clip.identity import architecture_hash
from open_clip.readouts import hold_unread
from open_clip.weights import export_state_dict
from training.class_embeddings import load_or_compute
from training.data import DevicePrefetcher, View, build_train_data, prepare_batch
from training.engine.data.records import log_left_out
from training.engine.distributed import Dist
from training.engine.errors import UserError, as_user_error
from training.engine.journal import Journal
from training.engine.loop import Batch, LoopOptions, Progress, Rate, Task
from training.engine.precision import Precision
from training.engine.schedule import make_schedule, step_seed
from training.engine.sharding import whole_state
from training.kernels import Reader, check_attention, report_kernels
from training.methods import Setting
from training.models import (
    StartWeights,
    build_optimizer,
    prepare_student,
    prepare_teachers,
    separable_blocks,
    undecayed_names,
)
from training.options import Options
from training.teachers.cache import fill, open_store, why_not_kept

log = logging.getLogger(__name__)

RELEASE = "clipself.pt"
TEXTS = 256  # embedded at a time
# Options that make a run what it is; a resume with others is refused.
_IDENTITY = (
    "method", "model", "dataset_type", "readout", "drop_padding", "extract_type", "multiscale", "lock_image",
    "lock_image_unlocked_groups", "train_ratio", "seed",
)  # fmt: skip
Evaluate = Callable[..., dict]


def loop_options(options: Options) -> LoopOptions:
    """What the program's options say to the loop."""
    optim, run, data = options.optim, options.run, options.data
    return LoopOptions(
        epochs=optim.epochs, batch_size=data.batch_size, accum_freq=optim.accum_freq, max_steps=run.max_steps,
        clip_norm=optim.grad_clip_norm, max_skipped=data.max_skipped, max_bad_steps=optim.max_nan_steps,
        log_every=run.log_every_n_steps, save_every_steps=run.save_every_n_steps,
        save_every_epochs=run.save_frequency, keep=run.keep_checkpoints, save_latest=run.save_most_recent,
        evaluate_first=not options.eval.skip_first_eval, evaluate_every=options.eval.zeroshot_frequency,
        profile=run.profile, report_to=run.report_to,
        fsdp=options.machine.fsdp,
    )  # fmt: skip


class Distillation(Task):
    """The training that the program's options describe: made (and thereby checked) before anything is written.

    Args:
        options: the program's.
        model: the start model on the CPU; becomes the student.
        dist, precision: where and how to compute.
        evaluation: called as ``evaluation(model, journal, epoch=, step=, kind=, alpha=, trained=)``; None for none.

    Raises:
        UserError: wrong data, embeddings or options.
    """

    name = "distillation"

    def __init__(
        self,
        options: Options,
        model: CLIP,
        dist: Dist,
        precision: Precision,
        evaluation: Evaluate | None = None,
    ) -> None:
        self.choices, self.dist, self.precision, self.evaluation = options, dist, precision, evaluation
        self.warmup = options.optim.warmup
        self.source = f"--train-data {options.data.train_data}"
        self.teachers = prepare_teachers(options, model, dist, precision)
        self.fields = options.entry.fields(options.own)
        self.views = self._views(model)
        self.data = self._open_data()
        self.stores = {}
        if options.data.cache_teacher:
            for name, teacher in self.teachers.items():
                reason = why_not_kept(self.data.dataset, teacher)
                store = None if reason else open_store(options.data.cache_teacher, self.data.dataset, teacher)
                if store is not None and options.run.dry_run and store.missing(delete=False):
                    reason = "a dry run fills no cache, so its steps ask"
                if reason:
                    log.info("--cache-teacher: the teacher %s stays: %s", name, reason)
                else:
                    self.stores[name] = store
                    self.views.pop(name, None)
            self.data.dataset.stores = self.stores
            self.data.dataset.crops = any(view.source == "crops" for view in self.views.values())
        # One for all epochs: the memory of its stream serves no other stream.
        self.prefetcher = DevicePrefetcher(self.data.loader, self._prepare, dist.device)
        self.student = prepare_student(options, model, dist, precision)
        check_attention(options.machine.attention, self._readers(), dist.device)
        setting = Setting(
            student=self.student, teachers=self.teachers, readout=options.readout, class_names=self.data.class_names,
            embed=self._embed, rank=dist.rank, world_size=dist.world_size,
        )  # fmt: skip
        self.module = self.method = options.entry.build(options.own, setting)
        for teacher in self.teachers.values():
            teacher.forget_texts()
        self.start = StartWeights(self.student)
        self.architecture = architecture_hash(self.student)
        self.undecayed = undecayed_names(self.student)

    def _views(self, model: CLIP) -> dict[str, View]:
        """What student and teachers look at, by name."""
        visual, contrastive = model.visual, self.choices.data.dataset_type == "contrastive"
        size = visual.image_size if contrastive else self.choices.data.det_image_size
        pixels = (tuple(visual.image_mean), tuple(visual.image_std), self.precision.input_dtype)
        views = {"images": View("images", size, *pixels)}
        views |= {name: teacher.view for name, teacher in self.teachers.items()}
        if "crops" in self.fields and "crops" not in views:  # for the student itself
            views["crops"] = View("crops", visual.image_size, *pixels)
        return views

    def _open_data(self) -> Any:
        options = self.choices
        crop_sizes = [view.size for view in self.views.values() if view.source == "crops"]
        captioned = options.data.dataset_type == "contrastive" or {"captions", "region_captions"} & set(self.fields)
        tokenize = as_user_error(open_clip.get_tokenizer, options.model.model) if captioned else None
        return build_train_data(
            options.data, options.regions, image_size=self.views["images"].size, crop_size=max(crop_sizes, default=1),
            fields=self.fields, seed=options.run.seed, rank=self.dist.rank, world_size=self.dist.world_size,
            tokenize=tokenize, pin_memory=self.dist.device.type == "cuda",
        )  # fmt: skip

    def _embed(self, names: Sequence[str] | None, *, teacher: str | None = None, plain: bool = False) -> Tensor:
        """Text embeddings ``[C, D]`` of unit length on the device; see :class:`~training.methods.Setting`.

        Args:
            names: class names; None for those of the annotations, or for the file of ``--train-embed-path``.
            teacher: whose text tower; None for the student's.
            plain: texts as they are, instead of an ensemble of prompts about a class.
        """
        options = self.choices
        model = self.student if teacher is None else self.teachers[teacher].model
        tower = options.model.model if teacher is None else self.teachers[teacher].spec.model
        if names is None and getattr(options.own, "train_embed_path", ""):
            tokenizer = None
        else:
            tokenizer = as_user_error(open_clip.get_tokenizer, tower)
        if plain:
            device = next(model.text.parameters()).device
            with torch.no_grad():
                parts = [tokenizer(list(names[i : i + TEXTS])) for i in range(0, len(names), TEXTS)]
                embeddings = torch.cat([model.encode_text(p.to(device)).float() for p in parts])
            return F.normalize(embeddings, dim=-1).to(self.dist.device)
        return load_or_compute(
            options.own if names is None else object(), model, tokenizer, names or self.data.class_names,
            flag="--train-embed-path", names_file=options.data.train_data, device=None if teacher else self.dist.device,
            progress=self.dist.is_master,
        ).to(self.dist.device)  # fmt: skip

    # -- data ---------------------------------------------------------------------------------------------------------

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of a whole epoch."""
        return self.data.batches_per_epoch

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """Prepared micro-batches of an epoch, from one on."""
        self.data.set_epoch(epoch, start)
        return iter(self.prefetcher)

    def _prepare(self, batch: dict[str, Any]) -> Batch:
        if self.stores and "answers" not in batch:  # nothing of it is left; its teachers may be gone all the same
            none = {name: torch.from_numpy(store.nothing()) for name, store in self.stores.items()}
            batch = {**batch, "answers": none}
        return prepare_batch(batch, self.views, self.dist.device)

    # -- full sharding ------------------------------------------------------------------------------------------------

    def blocks(self) -> list[nn.Module]:
        """Blocks of the student and of teachers that are called as modules only."""
        stored = self.stores.keys()
        asked = [(t.model, t.spec.readout) for name, t in self.teachers.items() if name not in stored]
        return [b for model, readout in [(self.student, None), *asked] for b in separable_blocks(model, readout)]

    def whole_parts(self) -> list[nn.Module]:
        """Teachers that go when their answers are stored."""
        return [self.teachers[name] for name in self.stores]

    def placed(self) -> None:
        """Remember the start weights, as they are divided."""
        self.start.keep(self.student)

    # -- a step -------------------------------------------------------------------------------------------------------

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW with the published split into decayed and undecayed parameters."""
        optimizer = build_optimizer(self.choices.optim, self.choices.model.model, self.student, self.undecayed)
        hold_unread(optimizer, self.method.unread())
        return optimizer

    def schedule(self, total_steps: int, steps_per_epoch: int) -> Rate:
        """That of ``--lr-scheduler``."""
        optim = self.choices.optim
        return make_schedule(
            optim.lr_scheduler, base=optim.lr, warmup=optim.warmup, total=total_steps,
            cooldown=min(optim.lr_cooldown_epochs * steps_per_epoch, total_steps),
            power=optim.lr_cooldown_power, end=optim.lr_cooldown_end,
        )  # fmt: skip

    def begin_step(self, micro: list[Batch], step: int) -> None:
        """The method counts its items over processes and draws what it draws."""
        self.method.begin_step(micro, seed=step_seed(self.choices.run.seed, step))

    def end_step(self) -> None:
        """The method bounds its temperature."""
        self.method.end_step()

    # -- records ------------------------------------------------------------------------------------------------------

    def scalars(self, totals: dict[str, float]) -> dict[str, float]:
        """Means of the method's quantities over their items, the items' numbers, and the temperature."""
        logged = self.method.logged()
        means = {name: totals[f"{name}_sum"] / (totals[group] or 1) for name, group in logged.items()}
        items = {f"train/{group}": totals[group] for group in dict.fromkeys(logged.values())}
        return {**means, **items, "train/logit_scale": self.student.logit_scale.exp().item()}

    def evaluate(self, progress: Progress, journal: Journal, *, start: bool = False) -> None:
        """Evaluate the start model, or the ensemble of start model and student."""
        if self.evaluation is None:
            return
        learned_from = self.choices.learned_from(unannotated=self.data.unannotated)
        trained = {"method": self.choices.entry.name, "learned_from": learned_from}
        run = partial(
            self.evaluation, self.student, journal, epoch=progress.begun, step=progress.step, trained=trained
        )  # fmt: skip
        if start:
            self.inside(partial(run, kind="start"), self.student)
            return
        alpha = self.choices.optim.alpha
        with self.start.ensembled(self.student, alpha):
            self.inside(partial(run, alpha=alpha), self.student)

    # -- state --------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The student, and of which start weights and experiment it is."""
        name = self.choices.run.name
        return {"name": name, "state_dict": self.student.state_dict(), "start_hash": self.start.hash}

    def load_state(self, content: dict[str, Any]) -> None:
        """The student's weights. UserError when they began from others."""
        if content.get("start_hash") != self.start.hash:
            raise UserError(
                "the checkpoint to resume began from other weights: give the same --model, --pretrained and --seed"
            )
        self.student.load_state_dict(content["state_dict"])

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with this one."""
        flat = self.choices.flat()
        values = {f"--{name.replace('_', '-')}": flat[name] for name in _IDENTITY if name in flat}
        return {
            **values, "the model's architecture": self.architecture,
            "the number of training images": self.data.num_images,
        }  # fmt: skip

    def options(self) -> dict[str, Any]:
        """All options."""
        return {k: v for k, v in self.choices.flat().items() if k != "resume"}

    def versions(self) -> dict[str, str]:
        """The model package's."""
        return {"open_clip": open_clip.__version__}

    def prepare(self, progress: Progress) -> None:
        """Say what the data lacks; fill the stores of teachers' answers."""
        log_left_out(self.source, self.data.skipped)
        log.info("%d images", self.data.num_images)
        report_kernels(self._readers(), self.dist.device)
        for name, store in self.stores.items():
            fill(
                store, self.data.dataset, self.method.teachers[name], dist=self.dist, precision=self.precision,
                workers=self.choices.data.workers,
            )  # fmt: skip
            del self.method.teachers[name], self.teachers[name]

    def _readers(self) -> dict[str, Reader]:
        """Student and teachers, by who they are, as far as their blocks are known."""
        pixels = self.precision.input_dtype
        readers = {"student": Reader(self.student.visual, self.views["images"].size, pixels)}
        for name, teacher in self.teachers.items():
            tower = getattr(teacher.model, "visual", teacher.model)
            if isinstance(tower, ImageTower):
                readers[f"teacher {name}"] = Reader(tower, teacher.view.size, teacher.view.dtype, teacher.attention)
        return readers

    def releases(self, progress: Progress) -> dict[str, dict[str, Any]]:
        """The ensemble of student and start model in the published layout."""
        mixed = whole_state(self.start.ensemble(self.student, self.choices.optim.alpha), keep=self.dist.is_master)
        if not self.dist.is_master:
            return {}
        weights = export_state_dict(self.student, state=mixed)
        content = {"epoch": progress.epoch, "name": self.choices.run.name, "state_dict": weights}
        return {str(Path("checkpoints") / RELEASE): content}

    def finish(self, folder: Path) -> None:
        """Say where the model is."""
        log.info("done: the model is %s (for --pretrained)", folder / "checkpoints" / RELEASE)
