"""Training GLIP as a task of the engine's loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ovdet import task
from ovdet.config import config_to_dict
from ovdet.glip import files, tuning
from ovdet.glip.build import count_parameters
from ovdet.glip.config import GlipConfig
from ovdet.glip.data.dataset import Collate, TrainDataset
from ovdet.glip.data.sets import open_set, training_sets
from ovdet.glip.data.sources import DetectionSource
from ovdet.glip.losses import GroundTruth
from ovdet.glip.model import GLIP
from ovdet.glip.testing import Test, format_metrics
from ovdet.parts.boxes import to_device
from training.engine.checkpoint import save_atomically
from training.engine.data.records import log_left_out
from training.engine.data.sampler import EpochBatchSampler
from training.engine.data.workers import Loader
from training.engine.distributed import Dist
from training.engine.errors import UserError
from training.engine.files import write_json
from training.engine.journal import Journal
from training.engine.loop import Batch, Progress, Rate, Task
from training.engine.optim import adamw
from training.engine.precision import Precision
from training.engine.schedule import process_seed

log = logging.getLogger(__name__)

LAST, BEST = "model_last.pt", "model_best.pt"
FLAGS = replace(task.FLAGS, accum_freq="train.batch_size", checkpointing="model.checkpoint=true")


class Trainee(nn.Module):
    """The model as the loop calls it: a batch to losses."""

    def __init__(self, model: GLIP, world_size: int) -> None:
        super().__init__()
        self.model, self.world_size = model, world_size

    def train(self, mode: bool = True) -> Trainee:
        """As usual, but what is frozen as a whole stays in eval mode."""
        super().train(mode)
        if mode:
            tuning.set_training(self.model)
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        losses = self.model(batch["images"], batch["sizes"], batch["text"], batch["truth"], world_size=self.world_size)
        if not batch["samples"]:  # nothing could be read; the process takes part all the same
            losses = {name: 0 * loss for name, loss in losses.items()}
        return losses | {"loss": sum(losses.values())}


class Grounding(Task):
    """The training that a config describes: made (and thereby checked) before anything is written.

    Args:
        config: the whole config.
        model: with the weights that it starts from, on the CPU; trained in place.
        test: what it is evaluated on; None for nothing.
        dist, precision: where and how to compute.
        work_dir: folder of the run.

    Raises:
        UserError: faulty data, or nothing trains.
    """

    name = "glip"
    evaluations_steer = True  # the rate and the end, by patience

    def __init__(
        self, config: GlipConfig, model: GLIP, test: Test | None, dist: Dist, precision: Precision, work_dir: Path
    ) -> None:
        self.config, self.model, self.test = config, model, test
        self.dist, self.precision, self.work_dir = dist, precision, work_dir
        train, data = config.train, config.data
        if test is None and (train.patience or train.stop_patience):
            raise UserError("train.patience needs an evaluation: set data.val_annotations")
        tuning.apply_mode(model, train.mode, train.behaviour)
        model.image.set_grad_checkpointing(config.model.checkpoint)
        model.text.set_grad_checkpointing(config.model.checkpoint)
        sets = training_sets(config)
        self.source = ", ".join(s.set.annotations for s in sets)
        self.dataset = TrainDataset(
            [open_set(s, model.tokenizer) for s in sets], [s.set.copies for s in sets], model.tokenizer,
            sizes=data.sizes, longest=data.longest, flip=data.flip, seed=train.seed, exif=data.exif,
        )  # fmt: skip
        self.sampler = EpochBatchSampler(
            size=len(self.dataset), batch_size=train.batch_size, rank=dist.rank, world_size=dist.world_size,
            seed=train.seed,
        )  # fmt: skip
        self.loader = Loader(
            self.dataset, workers=data.workers, seed=train.seed + dist.rank, batch_sampler=self.sampler,
            collate_fn=Collate(model.image.divisor), pin_memory=dist.device.type == "cuda",
        )  # fmt: skip
        self.trained = [name for name, p in model.named_parameters() if p.requires_grad]
        self.base = files.rest_hash(model, self.trained)
        model.to(dist.device)
        self.module = Trainee(model, dist.world_size)
        self.average = tuning.Average(model, train.ema) if train.ema else None
        self.patience = tuning.Patience(train.patience, train.stop_patience, train.decay_factor)

    # -- data ---------------------------------------------------------------------------------------------------------

    @property
    def batches_per_epoch(self) -> int:
        return self.sampler.batches_per_epoch

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        self.sampler.set_epoch(epoch, start)
        device = self.dist.device
        for batch in self.loader:
            if batch["images"] is None:
                batch |= self._nothing()
            batch["images"] = to_device(batch["images"], device)
            batch["truth"] = [GroundTruth(*(to_device(part, device) for part in truth)) for truth in batch["truth"]]
            yield batch

    def _nothing(self) -> Batch:
        """What stands in for a batch of which no image could be read."""
        side, limit = self.model.image.divisor * 2, self.model.tokenizer.limit
        return {
            "images": torch.zeros(1, 3, side, side, dtype=torch.uint8),
            "sizes": [(side, side)],
            "text": [self.model.tokenizer.encode("nothing")],
            "truth": [GroundTruth(torch.zeros(0, 4), torch.zeros(0, limit, dtype=torch.bool))],
        }

    # -- a step -------------------------------------------------------------------------------------------------------

    def optimizer(self) -> torch.optim.Optimizer:
        self._optimizer = adamw(tuning.parameter_groups(self.model, self.config.train), lr=self.config.train.lr)
        self._decays = [group["weight_decay"] for group in self._optimizer.param_groups]
        return self._optimizer

    def schedule(self, total_steps: int, steps_per_epoch: int) -> Rate:
        train = self.config.train
        self.total_steps = total_steps
        if train.warmup_steps >= total_steps:
            log.warning(
                "train.warmup_steps is %d, but the run has %d steps: the rate never reaches train.lr; lower it",
                train.warmup_steps, total_steps,
            )  # fmt: skip

        def rate(step: int, epoch: int) -> float:
            falls = self.patience.rate
            if not train.patience:
                falls = tuning.decayed(step, total_steps, train.decay_at, train.decay_factor)
            return train.lr * falls * tuning.warmed(step, train.warmup_steps, train.warmup_factor)

        return rate

    def begin_step(self, micro: list[Batch], step: int) -> None:
        torch.manual_seed(process_seed(self.config.train.seed, step, self.dist.rank))  # dropout
        for share in self.config.train.weight_decay_at[:1]:
            shares = [share * s for s in self.config.train.decay_at]
            factor = tuning.decayed(step, self.total_steps, shares, self.config.train.decay_factor)
            for group, decay in zip(self._optimizer.param_groups, self._decays, strict=True):
                group["weight_decay"] = decay * factor

    def end_step(self) -> None:
        if self.average is not None:
            self.average.update(self.model)

    def ended(self, progress: Progress) -> bool:
        return self.patience.ended

    # -- records ------------------------------------------------------------------------------------------------------

    def scalars(self, totals: dict[str, float]) -> dict[str, float]:
        parts = ("loss_token", "loss_box", "loss_centerness")
        return {name.removeprefix("loss_"): totals[name] / self.dist.world_size for name in parts}

    def evaluate(self, progress: Progress, journal: Journal, *, start: bool = False) -> None:
        if self.test is None:
            return
        metrics = self._test(progress)
        if self.dist.is_master:
            log.info("after epoch %d (step %d)\n%s", progress.begun, progress.step, format_metrics(metrics))
        journal.scalars({f"val/{k.replace(' ', '_')}": v for k, v in metrics.items()}, progress.step)
        journal.result({"epoch": progress.begun, "step": progress.step, "kind": "val", **metrics})

    def _test(self, progress: Progress) -> dict[str, float]:
        """Test, note the gain, and keep the model where it is the best so far."""
        self.model.eval()
        metrics = self.test(self.model, self.precision)
        metric = self.config.train.metric
        if metric not in metrics:
            raise UserError(f'train.metric "{metric}" is not among the results: use one of {", ".join(metrics)}')
        if self.patience.add(metrics[metric]) and self.dist.is_master:
            save_atomically(self._content(), self.work_dir / BEST, FLAGS.folder)
            write_json(self.work_dir / "best.json", {"epoch": progress.begun, "step": progress.step, **metrics})
        return metrics

    # -- state --------------------------------------------------------------------------------------------------------

    def _content(self) -> dict[str, Any]:
        """The file for users: all of the network, or what was trained beside the weights that it started from."""
        whole = self.config.train.mode == "full" and self.config.image.kind == "swin" and not self.config.text.frozen
        content = files.content_of(self.model, self.config, part=None if whole else self.trained, base_hash=self.base)
        if self.average is not None:
            content["model_ema"] = content["model"] | self.average.values
        return content

    def state(self) -> dict[str, Any]:
        state = self.model.state_dict()
        return {
            "state_dict": {name: state[name] for name in self.trained},
            "average": {} if self.average is None else self.average.values,
            "evaluations": list(self.patience.values),
        }

    def load_state(self, content: dict[str, Any]) -> None:
        state = content["state_dict"]
        if set(state) != set(self.trained):
            raise ValueError("it trains other parameters")
        self.model.load_state_dict(state, strict=False)
        if self.average is not None:
            for name, value in self.average.values.items():
                value.copy_(content["average"][name])
        self.patience.values = list(content["evaluations"])

    def identity(self) -> dict[str, Any]:
        config = config_to_dict(self.config)
        kept = {f"{s}.{k}": v for s in ("image", "text", "head") for k, v in config[s].items() if k != "weights"}
        train = config["train"]
        kept |= {f"train.{k}": train[k] for k in ("mode", "behaviour", "seed", "ema")}
        return kept | {"training sets": self.source, "frozen weights": self.base}

    def options(self) -> dict[str, Any]:
        config = config_to_dict(self.config)
        return {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}

    def prepare(self, progress: Progress) -> None:
        """Say what trains, and what the data lacks."""
        log.info(
            "%s of %s (%.1f M parameters), %d images in %s", self.config.train.mode, self.config.path or "a config",
            count_parameters(self.model) / 1e6, len(self.dataset), self.source,
        )  # fmt: skip
        for source in self.dataset.sources:
            if isinstance(source, DetectionSource):
                log_left_out(source.annotations.file, source.annotations.skipped)

    def releases(self, progress: Progress) -> dict[str, dict[str, Any]]:
        return {LAST: self._content()}
