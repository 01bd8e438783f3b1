"""The program: ``python -m training.main``, alone or under torchrun."""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import open_clip
from open_clip import CLIP
from training.class_embeddings import load_or_compute
from training.engine.checkpoint import find_latest, remove_unfinished
from training.engine.distributed import Dist, init_distributed, together
from training.engine.errors import UserError, as_user_error, run_program
from training.engine.journal import Journal, setup_logging, write_atomically
from training.engine.loop import Loop
from training.engine.precision import Precision, make_precision
from training.evaluation.evaluate import evaluate, format_table
from training.evaluation.panoptic import build_eval_data
from training.models import load_model
from training.params import parse_args
from training.trainer import Distillation, loop_options

log = logging.getLogger(__name__)


def make_folder(args: argparse.Namespace, dist: Dist) -> Path:
    """The experiment's folder; only process 0 writes to it.

    Raises:
        UserError: it exists and ``--resume`` is not given.
    """
    folder = Path(args.logs) / args.name
    with together():
        if dist.is_master:
            if folder.exists() and not args.resume:
                raise UserError(f"experiment {folder} exists: choose another --name, or go on with --resume latest")
            try:
                (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
                remove_unfinished(folder / "checkpoints")
            except OSError as error:
                raise UserError(f"{folder} cannot be made ({error.strerror}): choose another --logs") from error
            text = "".join(f"{key}: {value}\n" for key, value in sorted(vars(args).items()))
            write_atomically(folder / "params.txt", text)
    return folder


class Evaluation:
    """Everything an evaluation needs, opened before anything is written."""

    def __init__(self, args: argparse.Namespace, model: CLIP, dist: Dist, precision: Precision) -> None:
        visual = model.visual
        self.args, self.dist, self.precision = args, dist, precision
        self.data = build_eval_data(
            args, image_sizes=args.eval_image_sizes, patch_size=visual.patch_size, crop_size=visual.image_size,
            rank=dist.rank, world_size=dist.world_size,
        )  # fmt: skip
        # Embeddings of a model whose text tower trains are computed anew each time.
        self.embeddings = None if args.dataset_type == "contrastive" and args.train_data else self._embed(model)

    def _embed(self, model: CLIP) -> torch.Tensor:
        return load_or_compute(
            self.args, model, as_user_error(open_clip.get_tokenizer, self.args.model), self.data.class_names,
            names_file=self.args.val_data, device=self.dist.device, progress=self.dist.is_master,
        )  # fmt: skip

    def __call__(self, model: CLIP, journal: Journal, *, epoch: int, step: int, kind: str = "student") -> dict:
        """Evaluate, show the table, and keep the numbers."""
        embeddings = self._embed(model) if self.embeddings is None else self.embeddings
        results = evaluate(
            model, self.data, embeddings, device=self.dist.device, dtype=self.precision.input_dtype,
            rank=self.dist.rank, world_size=self.dist.world_size,
        )  # fmt: skip
        if self.dist.is_master:
            print(f"\nmean accuracy after {epoch} epochs ({step} steps), {self.data.num_images} images")
            print(format_table(results), flush=True)
            journal.scalars({f"val/{k}": v for k, v in results.items() if "macc" in k}, step)
            journal.result({"epoch": epoch, "step": step, "kind": kind, **results})
        return results


def continue_after_restart(args: argparse.Namespace) -> None:
    """When ``torchrun --max-restarts`` has started the processes anew, go on from the newest checkpoint.

    Raises:
        UserError: restarts are asked for without ``--name``, by which they find the experiment.
    """
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and args.name is None:
        raise UserError("torchrun's --max-restarts needs --name, by which a restarted run finds its checkpoints")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return
    folder = Path(args.logs) / args.name
    started_from_file = args.resume not in (None, "latest")
    if folder.exists() and not (started_from_file and find_latest(folder / "checkpoints") is None):
        args.resume = "latest"


def run(args: argparse.Namespace, dist: Dist) -> int:
    """Check everything, then train and evaluate. Returns the exit status."""
    precision = make_precision(args.precision, dist.device)
    continue_after_restart(args)
    if args.name is None:
        args.name = f"{time.strftime('%Y_%m_%d-%H_%M_%S')}-{args.model.replace('/', '-')}-{args.dataset_type}"
    with together():
        folder_exists = (Path(args.logs) / args.name).exists()
        if dist.is_master and folder_exists and not args.resume:
            raise UserError(
                f"experiment {Path(args.logs) / args.name} exists: choose another --name, or go on with --resume latest"
            )
        model = load_model(args)
    with together():
        evaluation = Evaluation(args, model, dist, precision) if args.val_data else None
    with together():
        loop = None
        if args.train_data:
            task = Distillation(args, model, dist, precision, evaluation)
            loop = Loop(task, loop_options(args), dist=dist, precision=precision)
    folder = make_folder(args, dist)
    setup_logging(dist.rank, folder / "out.log" if dist.is_master else None)
    log.info("experiment %s: %d process(es) on %s, precision %s", folder, dist.world_size, dist.device, precision.name)
    if loop is None:
        model.visual.to(dist.device, precision.param_dtype)
        journal = Journal(folder if dist.is_master else None)
        evaluation(model, journal, epoch=0, step=0, kind="checkpoint")
        journal.close()
        return 0
    return loop.train(folder, args.resume)


def main(argv: Sequence[str] | None = None) -> int:
    """The program; see :func:`~training.engine.errors.run_program` for its exit status."""
    return run_program(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    args = parse_args(argv)
    dist = init_distributed(args.device, args.dist_backend, args.dist_timeout)
    setup_logging(dist.rank)
    random.seed(args.seed + dist.rank)
    np.random.seed(args.seed + dist.rank)
    return run(args, dist)


if __name__ == "__main__":
    sys.exit(main())
