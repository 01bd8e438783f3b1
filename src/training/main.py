"""The program: ``python -m training.main``, alone or under torchrun."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

import open_clip
from open_clip import CLIP
from training.class_embeddings import load_or_compute
from training.engine.attention import prefer_attention
from training.engine.checkpoint import seed_generators
from training.engine.distributed import Dist, from_master, init_distributed, together
from training.engine.dry_run import forecast
from training.engine.errors import Flags, as_user_error, run_program
from training.engine.folder import check_folder, named_folder, open_folder, resume_after_restart, write_texts
from training.engine.journal import Journal, setup_logging
from training.engine.loop import Loop
from training.engine.precision import Precision, make_precision
from training.evaluation.evaluate import evaluate, format_table
from training.evaluation.metrics import SegmentRows
from training.evaluation.panoptic import build_eval_data
from training.evaluation.pictures import evaluation_pictures
from training.kernels import Reader, check_attention, report_kernels
from training.models import ensemble_loaded, load_model, model_name
from training.options import Options
from training.params import parse_args
from training.trainer import Distillation, loop_options

log = logging.getLogger(__name__)

FLAGS = Flags()


class Evaluation:
    """Everything an evaluation needs, opened before anything is written."""

    def __init__(self, options: Options, model: CLIP, dist: Dist, precision: Precision) -> None:
        visual, data = model.visual, options.data
        self.options, self.dist, self.precision = options, dist, precision
        self.data = build_eval_data(
            options.eval, image_sizes=options.eval.eval_image_sizes, patch_size=visual.patch_size,
            crop_size=visual.image_size, batch_size=data.batch_size, workers=data.workers, max_skipped=data.max_skipped,
            rank=dist.rank, world_size=dist.world_size,
        )  # fmt: skip
        # Embeddings of a model whose text tower trains are computed anew each time, and never asked for again.
        self.lasting = not (options.entry.trains_texts and options.trains)
        self.embeddings = self._embed(model) if self.lasting else None

    def _embed(self, model: CLIP) -> torch.Tensor:
        return load_or_compute(
            self.options.eval, model, as_user_error(open_clip.get_tokenizer, self.options.model.model),
            self.data.class_names, names_file=self.options.eval.val_data, device=self.dist.device,
            progress=self.dist.is_master, **({} if self.lasting else {"cache_folder": None}),
        )  # fmt: skip

    def __call__(
        self, model: CLIP, journal: Journal, *, epoch: int, step: int, kind: str = "student", alpha: float = 1.0,
        trained: dict[str, Any] | None = None,
    ) -> dict:  # fmt: skip
        """Evaluate, show the table, and keep the numbers.

        Args:
            alpha: share of the student in the weights; below 1 they are recorded as an ensemble.
            trained: how and on what the model trained, to be recorded with the numbers.
        """
        kind = kind if alpha == 1 else "ensemble"
        embeddings = self._embed(model) if self.embeddings is None else self.embeddings
        options, reading = self.options, model.visual.readout
        per_class = None
        if options.eval.per_class and journal.folder is not None:
            per_class = journal.folder / f"per_class_{kind}_{step}.json"
        rows = SegmentRows() if options.eval.per_segment else None
        results = evaluate(
            model, self.data, embeddings, device=self.dist.device, dtype=self.precision.input_dtype,
            rank=self.dist.rank, world_size=self.dist.world_size, per_class_file=per_class,
            rows=rows,
        )  # fmt: skip
        table = None if rows is None else rows.gather()
        if table is not None and journal.folder is not None:
            text = json.dumps({"classes": list(self.data.class_names), **table})
            (journal.folder / f"per_segment_{kind}_{step}.json").write_text(text + "\n")
        # Every process draws, as fully sharded weights are gathered by all of them; process 0 keeps the pictures.
        pictures = evaluation_pictures(
            model, self.data, embeddings, options.eval.log_images, device=self.dist.device,
            dtype=self.precision.input_dtype,
        )  # fmt: skip
        journal.pictures({f"val/{file}": picture for file, picture in pictures}, step)
        if self.dist.is_master:
            print(f"\nmean accuracy after {epoch} epochs ({step} steps), {self.data.num_images} images")
            print(format_table(results), flush=True)
            journal.scalars({f"val/{k}": v for k, v in results.items() if "macc" in k}, step)
            read = {"readout": reading.name, "cells_normalized": reading.normalized, "sizes": self.data.image_sizes}
            read |= {"drop_padding": True} if model.visual.drop_padding else {}
            read |= {"alpha": alpha} if alpha < 1 else {}
            journal.result({"epoch": epoch, "step": step, "kind": kind, **read, **(trained or {}), **results})
        return results


def continue_after_restart(options: Options) -> Options:
    """The options, with what a restart by torchrun makes of ``--resume``. UserError without ``--name``."""
    run = options.run
    folder = None if run.name is None else named_folder(run.logs, run.name)
    return replace(options, run=replace(run, resume=resume_after_restart(folder, run.resume, FLAGS)))


def named(options: Options) -> Options:
    """The options with the name of the experiment and of the model."""
    model = replace(options.model, model=model_name(options.model.model))
    name = options.run.name
    if name is None:
        what = options.entry.name if options.trains else "evaluation"
        # Of process 0 alone: around the turn of a second others would name other folders.
        name = from_master(f"{time.strftime('%Y_%m_%d-%H_%M_%S')}-{model.model.replace('/', '-')}-{what}")
    return replace(options, model=model, run=replace(options.run, name=name))


def run(options: Options, dist: Dist) -> int:
    """Check everything, then train and evaluate. Returns the exit status."""
    precision = make_precision(options.machine.precision, dist.device)
    options = named(continue_after_restart(options))
    folder, resume = named_folder(options.run.logs, options.run.name), options.run.resume
    with together():
        if dist.is_master:
            check_folder(folder, resume, FLAGS)
        model = load_model(options)
        alpha = ensemble_loaded(options, model)
    with together():
        evaluation = Evaluation(options, model, dist, precision) if options.eval.val_data else None
    with together():
        loop = None
        if options.trains:
            task = Distillation(options, model, dist, precision, evaluation)
            loop = Loop(task, loop_options(options), dist=dist, precision=precision)
        else:
            sizes = (*options.eval.eval_image_sizes, model.visual.image_size)
            readers = {f"model at {n}": Reader(model.visual, n, precision.input_dtype) for n in sizes}
            check_attention(options.machine.attention, readers, dist.device)
    if options.run.dry_run:
        found = forecast(loop)
        if dist.is_master:
            print(found.text())
        return 0
    text = "".join(f"{key}: {value}\n" for key, value in sorted(options.flat().items()))
    texts = {"params.txt": text}
    with open_folder(folder, resume, dist, FLAGS):
        setup_logging(dist.rank, folder / "out.log" if dist.is_master else None)
        log.info(
            "experiment %s: %d process(es) on %s, precision %s", folder, dist.world_size, dist.device, precision.name
        )
        for warning in options.warnings:
            log.warning("%s", warning)
        if loop is not None:
            return loop.train(folder, resume, texts=texts)
        write_texts(folder, texts, dist, FLAGS)
        report_kernels(readers, dist.device)
        if options.readout is not None:
            as_user_error(model.visual.set_readout, options.readout)
        if options.model.drop_padding:
            as_user_error(model.visual.set_drop_padding, True)
        model.visual.to(dist.device, precision.param_dtype)
        journal = Journal(folder if dist.is_master else None, report_to=options.run.report_to)
        evaluation(model, journal, epoch=0, step=0, kind="checkpoint", alpha=alpha)
        journal.close()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The program; see :func:`~training.engine.errors.run_program` for its exit status."""
    return run_program(lambda: _main(argv), FLAGS)


def _main(argv: Sequence[str] | None) -> int:
    options = parse_args(argv)
    machine, seed = options.machine, options.run.seed
    dist = init_distributed(machine.device, machine.dist_backend, machine.dist_timeout)
    setup_logging(dist.rank)
    seed_generators(seed + dist.rank)
    with prefer_attention(machine.attention):
        return run(options, dist)


if __name__ == "__main__":
    sys.exit(main())
