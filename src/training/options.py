"""The program's flags as frozen dataclasses, one for each room that takes them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from training.data.loader import REGION_SOURCES
from training.data.options import DataOptions, RegionOptions
from training.engine.attention import ATTENTIONS
from training.engine.flags import COUNT, NATURAL, NOT_NEGATIVE, POSITIVE, SHARE, flag
from training.engine.journal import REPORTS
from training.engine.precision import PRECISIONS
from training.evaluation.options import EvalOptions
from training.methods import Entry


@dataclass(frozen=True)
class ModelOptions:
    """The model that training starts from."""

    model: str = flag("EVA02-CLIP-B-16", "name of the model (open_clip.list_models()), or a config json")
    pretrained: str = flag(
        "", 'tag, checkpoint file, or "eva" with --cache-dir; "" for random weights', metavar="TAG|FILE"
    )
    cache_dir: str | None = flag(None, "download cache; with --pretrained eva the checkpoint file", metavar="DIR|FILE")
    readout: str = flag(
        "", "dense reading to train and evaluate; by default the method's, or that of the weights", metavar="NAME"
    )
    drop_padding: bool = flag(
        False, "leave padding out of the dense pass, in training and wherever these weights are read (not as published)"
    )
    lock_image: bool = flag(False, "freeze the image tower but for --lock-image-unlocked-groups")
    lock_image_unlocked_groups: int = flag(
        0, "last N groups that train: blocks for EVA; for CLIP ViT also positions and stem before them", type=NATURAL,
        metavar="N",
    )  # fmt: skip
    force_quick_gelu: bool = flag(False, "QuickGELU instead of the config's activation (OpenAI's weights)")
    downsample_factor: int | None = flag(
        None, "must equal the patch size; read from the model if absent", type=COUNT, metavar="N"
    )


@dataclass(frozen=True)
class OptimOptions:
    """Steps and their size."""

    epochs: int = flag(6, "passes over the data", type=COUNT)
    accum_freq: int = flag(1, "micro-batches per optimizer step", type=COUNT)
    lr: float = flag(1e-5, "base learning rate", type=NOT_NEGATIVE)
    wd: float = flag(0.1, "weight decay", type=NOT_NEGATIVE)
    beta1: float | None = flag(None, "AdamW; by default 0.9", type=SHARE)
    beta2: float | None = flag(None, 'AdamW; by default 0.98 for models named "vit", else 0.999', type=SHARE)
    eps: float | None = flag(None, 'AdamW; by default 1e-6 for models named "vit", else 1e-8', type=NOT_NEGATIVE)
    warmup: int = flag(1000, "steps of linear warm-up", type=NATURAL)
    lr_scheduler: str = flag("cosine", "after the warm-up", choices=("cosine", "const", "const-cooldown"))
    lr_cooldown_epochs: int = flag(1, "length of the cooldown (const-cooldown)", type=COUNT)
    lr_cooldown_power: float = flag(1.0, "power of its polynomial", type=POSITIVE)
    lr_cooldown_end: float = flag(0.0, "rate at its end", type=NOT_NEGATIVE)
    grad_clip_norm: float | None = flag(None, "clip gradients to this norm", type=POSITIVE)
    grad_checkpointing: bool = flag(False, "recompute activations: less memory, a third more time")
    max_nan_steps: int = flag(10, "steps in a row with a loss that is not finite, then stop", type=COUNT)
    alpha: float = flag(1.0, "released weights are alpha * student + (1 - alpha) * start model", type=SHARE)


@dataclass(frozen=True)
class RunOptions:
    """The experiment: its folder, checkpoints and log."""

    name: str | None = flag(None, "of the experiment; by default date, model and method")
    logs: str = flag("logs", "folder of all experiments", metavar="DIR")
    resume: str | None = flag(
        None, "go on: with an experiment, with it or a new one, from a file", metavar="latest|auto|FILE"
    )
    save_frequency: int = flag(1, "save every N epochs; 0 only at the end", type=NATURAL, metavar="N")
    save_every_n_steps: int = flag(0, "also save inside epochs; 0 never", type=NATURAL, metavar="N")
    save_most_recent: bool = flag(False, "keep epoch_latest.pt up to date after every epoch")
    keep_checkpoints: int = flag(2, "newest checkpoints of whole epochs to keep; 0 all", type=NATURAL, metavar="N")
    log_every_n_steps: int = flag(50, "steps between lines of the log and TensorBoard points", type=COUNT, metavar="N")
    seed: int = flag(0, "of weights, data order and regions", type=NATURAL)
    max_steps: int = flag(0, "end after this many optimizer steps; 0: after --epochs", type=NATURAL, metavar="N")
    report_to: str = flag("tensorboard", "where scalars go besides the log", choices=REPORTS)
    dry_run: bool = flag(False, "take four steps, say what the run will take in time, memory and disk, write nothing")
    profile: int = flag(0, "write a trace of N steps to the experiment's folder", type=NATURAL, metavar="N")


@dataclass(frozen=True)
class MachineOptions:
    """Where it runs."""

    precision: str | None = flag(None, "amp_bf16 on GPUs that have it, else fp32, if absent", choices=PRECISIONS)
    device: str | None = flag(None, "a GPU when there is one, if absent", choices=("cuda", "cpu"))
    compile: bool = flag(False, "compile the transformer blocks")
    attention: str = flag("auto", "kernel of attention; auto: PyTorch's choice, flash for crops", choices=ATTENTIONS)
    fsdp: bool = flag(False, "divide the model over the processes (FSDP2), for trunks that one GPU cannot train")
    dist_backend: str | None = flag(None, "nccl on GPUs, gloo on CPUs, if absent", choices=("nccl", "gloo"))
    dist_timeout: float = flag(1800.0, "seconds until a lost process ends the run", type=POSITIVE)


ROOMS: dict[str, type] = {
    "model": ModelOptions, "data": DataOptions, "regions": RegionOptions, "optim": OptimOptions,
    "eval": EvalOptions, "run": RunOptions, "machine": MachineOptions,
}  # fmt: skip
TITLES = {
    "model": "model", "data": "training data", "regions": "regions", "optim": "optimisation", "eval": "evaluation",
    "run": "run, checkpoints, logs", "machine": "machine",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """All options of a run.

    Attributes:
        entry: the method.
        own: its flags, an instance of ``entry.options``.
        given: names of the flags that were given (by hand or by a recipe).
        warnings: what is to be said once about flags without effect.
    """

    entry: Entry
    model: ModelOptions
    data: DataOptions
    regions: RegionOptions
    optim: OptimOptions
    eval: EvalOptions
    run: RunOptions
    machine: MachineOptions
    own: Any
    given: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether there is anything to train on."""
        return bool(self.data.train_data)

    def learned_from(self, *, unannotated: bool = False) -> list[str]:
        """What people made for the training data, besides the images: of what kind a row of results is.

        Args:
            unannotated: no boxes, as nobody annotated them.
        """
        reads = self.data.dataset_type in REGION_SOURCES and REGION_SOURCES[self.data.dataset_type].reads_annotations
        return [*(["boxes"] if reads and not unannotated else []), *self.entry.learns_from(self.own)]

    @property
    def readout(self) -> str | None:
        """Name of the dense reading to train and evaluate; None for the one that the weights were trained with."""
        return self.model.readout or (self.entry.readout if self.trains else None)

    def flat(self) -> dict[str, Any]:
        """All values by flag, and ``method``: what a checkpoint and params.txt keep."""
        values: dict[str, Any] = {"method": self.entry.name}
        for room in (*(getattr(self, name) for name in ROOMS), self.own):
            values |= {f.name: list(v) if isinstance(v := getattr(room, f.name), tuple) else v for f in fields(room)}
        return values
