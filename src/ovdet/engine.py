"""Training: set-up, steps, checkpoints, exact resuming."""

from __future__ import annotations

import logging
import math
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from ovdet import files as checkpoint
from ovdet.config import config_to_dict, format_config
from ovdet.data.loader import TrainSampler, train_loader
from ovdet.distributed import Process, all_reduce_sum, average_batch_norm, many, together
from ovdet.errors import UserError, as_user_error
from ovdet.fvit.assemble import make_detector
from ovdet.fvit.config import FViTConfig
from ovdet.fvit.detector import Detector
from ovdet.fvit.inputs import read_inputs
from ovdet.journal import Scalars, setup_logging
from ovdet.schedule import lr_at, make_optimizer, scaled_lr
from ovdet.testing import FEW, SkipJudge, autocast, test, to_device

log = logging.getLogger(__name__)

BAD_STEPS = 10  # steps in a row without finite gradients that end a run
EXIT_INTERRUPTED = 75  # exit status after a signal: saved, to be resumed (EX_TEMPFAIL)


@dataclass
class Progress:
    """Where a run is: epochs done, steps done in the current one and in all, and bad steps in a row."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    bad_steps: int = 0


class StopSignal:
    """Remembers SIGTERM and SIGINT, so that a step is finished and saved; a second SIGINT ends at once."""

    def __init__(self) -> None:
        self.received = False
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of what is sampled in a step (anchors, RoIs): given by (seed, step, rank), so resuming needs no state."""
    return ((seed * 1_000_003 + step) * 1_009 + rank) % 2**63


class Trainer:
    """One training run.

    Args:
        config: the whole config.
        process: this process among all.
        work_dir: folder of the run: ``config.toml``, ``train.log``, ``tensorboard/``, ``latest.pt`` (to resume from)
            and small detector files ``epoch_N.pt``.
        resume: go on from ``latest.pt`` where there is one.
        max_steps: end after so many steps in all; 0: after ``train.epochs``.
        save_every_steps: write ``latest.pt`` also inside epochs; 0: at the end of epochs only.

    Raises:
        UserError: faulty input, before anything is written.
    """

    def __init__(
        self,
        config: FViTConfig,
        process: Process,
        work_dir: Path,
        *,
        resume: bool = False,
        max_steps: int = 0,
        save_every_steps: int = 0,
    ) -> None:
        self.config, self.process, self.work_dir = config, process, work_dir
        self.max_steps, self.save_every_steps = max_steps, save_every_steps
        if config.train.precision == "amp_fp16" and process.device.type != "cuda":
            raise UserError("train.precision=amp_fp16 needs a GPU: use amp_bf16 or fp32")
        with together():
            inputs = read_inputs(config, work_dir, resume=resume)
        self.vocabulary, self.validation, self.vit = inputs.vocabulary, inputs.validation, inputs.vit.identity
        detector = make_detector(
            config, inputs.vit, inputs.vocabulary, device=process.device, progress=process.is_master
        )
        del inputs.vit  # the text tower has done its work
        if config.train.sync_batch_norm and many() and process.device.type == "cuda":
            detector = nn.SyncBatchNorm.convert_sync_batchnorm(detector)
        self.detector: Detector = detector
        self.optimizer = make_optimizer(detector.named_parameters(), config.train)
        self.trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler("cuda") if config.train.precision == "amp_fp16" else None
        self.sampler = TrainSampler(
            size=len(inputs.dataset), batch_size=config.train.batch_size, rank=process.rank,
            world_size=process.world_size, seed=config.train.seed,
        )  # fmt: skip
        self.progress = Progress()
        if inputs.resumed is not None:
            with together():
                self._restore(inputs.resumed)
        self.base_lr = scaled_lr(config.train, process.world_size)
        self.dataset = inputs.dataset
        self.loader: DataLoader = train_loader(
            inputs.dataset, self.sampler, workers=config.data.workers, pin=process.device.type == "cuda"
        )
        self.model: nn.Module = detector
        if many():
            ids = [process.device.index] if process.device.type == "cuda" else None
            # Running statistics are equal (SyncBatchNorm) or averaged before they are used: no need to broadcast them.
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                detector, [name for name, _ in detector.named_buffers()]
            )
            self.model = DistributedDataParallel(detector, device_ids=ids, gradient_as_bucket_view=True)
        self.judge = SkipJudge(inputs.dataset.annotations.file)
        self.skips = torch.zeros(2, dtype=torch.float64)  # unusable images and all images, of all processes
        self.stop: StopSignal | None = None
        self.scalars = Scalars(None)

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, dict[str, float]]:
        """Train to the end; returns the last metrics. After a signal: saves, and SystemExit with status 75."""
        self._open()
        config, progress, metrics = self.config.train, self.progress, {}
        try:
            while progress.epoch < config.epochs and not self._finished():
                self._epoch()
                metrics = self._end_of_epoch() or metrics
        finally:
            self.scalars.close()
            self.stop.restore()
        return metrics

    def _open(self) -> None:
        """Make the folder, and say what is about to happen."""
        config, process = self.config, self.process
        if process.is_master:
            try:
                self.work_dir.mkdir(parents=True, exist_ok=True)
                (self.work_dir / "config.toml").write_text(format_config(config), encoding="utf-8")
                setup_logging(process.rank, self.work_dir / "train.log")
            except OSError as error:
                raise UserError(
                    f"--work-dir {self.work_dir} cannot be written ({error.strerror}): choose another one"
                ) from error
        self.stop = StopSignal()
        self.scalars = Scalars(self.work_dir if process.is_master else None, self.progress.step)
        count = sum(p.numel() for p in self.trainable)
        novel = sum(self.vocabulary.novel)
        log.info(
            "%s: %d images, %d classes (%d novel), %d steps an epoch of %d x %d images, rate %.3g, %.1f M parameters "
            "trained on the frozen %s (%s)",
            "resuming" if self.progress.step else "training", len(self.dataset), len(self.vocabulary.names), novel,
            self.sampler.steps, process.world_size, config.train.batch_size, self.base_lr, count / 1e6,
            self.vit["name"], self.vit["weights"],
        )  # fmt: skip
        if many() and process.device.type != "cuda":
            log.info("batch norm is not synchronised on CPUs: each process normalises by its own images")

    def _epoch(self) -> None:
        """The rest of the current epoch."""
        progress = self.progress
        self.sampler.set_position(progress.epoch, progress.step_in_epoch)
        self.model.train()
        bar = tqdm(
            total=self.sampler.steps, initial=progress.step_in_epoch, unit="step", dynamic_ncols=True,
            desc=f"epoch {progress.epoch + 1}/{self.config.train.epochs}", disable=not self.process.is_master,
        )  # fmt: skip
        batches = iter(self.loader)
        clock = time.perf_counter()
        with bar:
            while progress.step_in_epoch < self.sampler.steps and not self._finished():
                batch = next(batches)
                waited = time.perf_counter() - clock
                self._step(batch, waited, clock, bar)
                clock = time.perf_counter()
        if progress.step_in_epoch >= self.sampler.steps:
            progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0

    def _step(self, batch: dict[str, Any], waited: float, clock: float, bar: tqdm) -> None:
        """One optimizer step, its log line, and what a checkpoint or signal asks for."""
        config, progress = self.config.train, self.progress
        rate = lr_at(progress.step, progress.epoch, base=self.base_lr, config=config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(step_seed(config.seed, progress.step, self.process.rank))
        losses = self._losses(batch)
        norm = self._update(sum(losses.values()))
        progress.step += 1
        progress.step_in_epoch += 1
        totals = self._totals(losses, batch)
        self._judge(norm, totals, batch)
        elapsed = time.perf_counter() - clock
        images = config.batch_size * self.process.world_size / max(elapsed, 1e-9)
        bar.update(1)
        bar.set_postfix(loss=f"{totals['loss']:.3f}", lr=f"{rate:.1e}", img_s=f"{images:.3g}", refresh=False)
        if progress.step % config.log_every == 0 or progress.step_in_epoch == self.sampler.steps or self._finished():
            self._report(totals, rate, norm, images, waited)
        inside = progress.step_in_epoch < self.sampler.steps
        if totals["stop"]:
            self._save_latest()
            log.warning("stopped by a signal after step %d: --resume goes on from here", progress.step)
            raise SystemExit(EXIT_INTERRUPTED)
        if self.save_every_steps and progress.step % self.save_every_steps == 0 and inside:
            self._save_latest()

    def _losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        device, size = self.process.device, self.config.data.image_size
        if batch["images"] is None:  # nothing could be read: every process takes its step all the same
            batch["images"], batch["sizes"] = torch.zeros(1, 3, size, size, dtype=torch.uint8), [(size, size)]
            empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
            if self.config.model.masks:
                empty["masks"] = torch.zeros(0, size, size, dtype=torch.bool)
            batch["targets"] = [empty]
        targets = [{k: v.to(device, non_blocking=True) for k, v in t.items()} for t in batch["targets"]]
        with autocast(self.config.train.precision, device):
            return self.model(to_device(batch, self.detector, device), batch["sizes"], targets)

    def _update(self, loss: Tensor) -> float:
        """Backward, clip, step. Returns the gradient norm before clipping, equal on all processes.

        Gradients that are not finite are dropped; averaged over processes, they are so everywhere or nowhere.
        """
        scaler, limit = self.scaler, self.config.train.clip
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trainable, limit if limit > 0 else math.inf).item()
        if scaler is not None:
            scaler.step(self.optimizer)  # skips by itself where float16 gradients overflowed
            scaler.update()
        elif math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _totals(self, losses: dict[str, Tensor], batch: dict[str, Any]) -> dict[str, float]:
        """Mean losses, and unusable images and signals of all processes, in one collective."""
        names = sorted(losses)
        counts = [len(batch["skipped"]), len(batch["image_ids"]) + len(batch["skipped"]), float(self.stop.received)]
        values = torch.stack([losses[n].detach().double() for n in names])
        packed = all_reduce_sum(torch.cat([values, torch.tensor(counts, dtype=torch.float64, device=values.device)]))
        totals = dict(zip([*names, "skipped", "seen", "stop"], packed.tolist(), strict=True))
        for name in names:
            totals[name] /= self.process.world_size
        totals["loss"] = sum(totals[name] for name in names)
        return totals

    def _judge(self, norm: float, totals: dict[str, float], batch: dict[str, Any]) -> None:
        """Stop where too many images are unusable, or gradients are not finite for too long."""
        self.judge(batch["skipped"], 0)
        self.skips += torch.tensor([totals["skipped"], totals["seen"]], dtype=torch.float64)
        skipped, seen = self.skips.tolist()
        if seen >= FEW or self.progress.step_in_epoch == self.sampler.steps:
            self.judge.check(skipped, seen)
        if math.isfinite(norm):
            self.progress.bad_steps = 0
            return
        self.progress.bad_steps += 1
        if self.scaler is None or self.progress.bad_steps > 1:  # float16 overflows now and then while its scale settles
            log.warning("step %d: gradients are not finite, the step is left out (images %s)",
                        self.progress.step, batch["image_ids"])  # fmt: skip
        if self.progress.bad_steps >= BAD_STEPS:
            raise UserError(
                f"gradients were not finite in {BAD_STEPS} steps in a row: lower train.lr, or use another "
                "train.precision"
            )

    # -- records ------------------------------------------------------------------------------------------------------

    def _report(self, totals: dict[str, float], rate: float, norm: float, images: float, waited: float) -> None:
        progress = self.progress
        losses = {k: v for k, v in totals.items() if k.startswith("loss")}
        values = {f"train/{k}": v for k, v in losses.items()}
        values |= {
            "train/lr": rate,
            "train/grad_norm": norm,
            "train/images_per_second": images,
            "train/data_time": waited,
        }
        if self.process.device.type == "cuda":
            values["train/memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.scalars.add(values, progress.step)
        log.info(
            "epoch %d step %d/%d  %s  rate %.2e  norm %.2f  %.3g images/s  data %.3f s",
            progress.epoch + 1, progress.step_in_epoch, self.sampler.steps,
            "  ".join(f"{k} {v:.4f}" for k, v in sorted(losses.items())), rate, norm, images, waited,
        )  # fmt: skip

    def _finished(self) -> bool:
        return 0 < self.max_steps <= self.progress.step

    def _end_of_epoch(self) -> dict[str, dict[str, float]]:
        """Save and, where it is due, evaluate."""
        config, epoch = self.config.train, self.progress.epoch
        last = epoch >= config.epochs or self._finished()
        self._save_latest()
        if self.process.is_master and self.progress.step_in_epoch == 0 and (last or epoch % config.save_every == 0):
            checkpoint.save(self._content(), self.work_dir / f"epoch_{epoch}.pt")
        if self.validation is None or not config.eval_every or not (last or epoch % config.eval_every == 0):
            return {}
        kinds = ["bbox", "segm"] if self.config.model.masks else ["bbox"]
        metrics = test(
            self.config, self.detector, self.validation, self.vocabulary, process=self.process, kinds=kinds,
            folder=self.work_dir / f"epoch_{epoch}" if self.progress.step_in_epoch == 0 else self.work_dir / "test",
        )  # fmt: skip
        for kind, values in metrics.items():
            self.scalars.add({f"val/{kind}_{k}": v for k, v in values.items() if v >= 0}, self.progress.step)
        return metrics

    def _save_latest(self) -> None:
        """Write ``latest.pt``: the detector file, and what resuming needs. Every process calls it."""
        average_batch_norm(self.detector)
        if not self.process.is_master:
            return
        content = self._content()
        content |= {
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "progress": asdict(self.progress),
            "images_per_step": self.config.train.batch_size * self.process.world_size,
        }
        checkpoint.save(content, self.work_dir / checkpoint.LATEST)

    def _content(self) -> dict[str, Any]:
        names, novel = self.vocabulary.names, self.vocabulary.novel
        return checkpoint.detector_content(
            self.detector,
            vit=self.vit,
            config=config_to_dict(self.config),
            base=[name for name, is_novel in zip(names, novel, strict=True) if not is_novel],
            novel=[name for name, is_novel in zip(names, novel, strict=True) if is_novel],
        )

    def _restore(self, content: dict[str, Any]) -> None:
        path = self.work_dir / checkpoint.LATEST
        missing = [k for k in ("optimizer", "progress", "images_per_step") if k not in content]
        if missing:
            raise UserError(f"checkpoint {path} has no {', '.join(missing)}: it cannot be resumed from")
        progress = Progress(**content["progress"])
        images = self.config.train.batch_size * self.process.world_size
        if progress.step_in_epoch and content["images_per_step"] != images:
            raise UserError(
                f"checkpoint {path} is inside an epoch of {content['images_per_step']} images a step, now there are "
                f"{images}: choose processes and train.batch_size so that their product is the same"
            )
        with as_user_error():
            self.detector.load_trainable_state_dict(checkpoint.detector_state(content))
            self.optimizer.load_state_dict(content["optimizer"])
        if self.scaler is not None and content["scaler"] is not None:
            self.scaler.load_state_dict(content["scaler"])
        self.progress = progress
