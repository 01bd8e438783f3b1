"""Training of the student as a task of the engine's loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip.padding import Canvas, Sizes
from open_clip.transform import normalize
from ovseg.dense import DenseReader
from ovseg.external import ExternalModel
from ovseg.maskclip_plus.data import TrainingData
from ovseg.maskclip_plus.fill import fill_labels, mark_unlabelled
from ovseg.maskclip_plus.losses import distillation_loss, segmentation_loss
from ovseg.maskclip_plus.network import Student, class_logits, release_of
from ovseg.refine import key_smoothing, prompt_denoising
from training.engine.distributed import Dist, average_batch_norm
from training.engine.errors import UserError
from training.engine.journal import Journal
from training.engine.loop import Batch, Progress, Rate, Task
from training.engine.schedule import make_schedule, process_seed


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a student is trained.

    Attributes:
        setting: ``annotation-free`` (all classes are filled in) or ``zero-shot`` (the unseen ones are).
        readout: dense reading of the teacher; None for its own.
        steps: optimizer steps.
        guided: share of the steps in which CLIP fills in the labels; afterwards the student itself does. The published
            annotation-free training is guided to its end.
        lr, end_lr, momentum, weight_decay, power: of SGD, and of the polynomial that lowers its rate.
        denoise, smooth, key_form: MaskCLIP's refinements of the teacher's scores; None for none.
        confidence: probability under which a pixel is left out; None for none.
        distil: weight of the L1 loss between the student's and CLIP's features.
    """

    setting: str = "annotation-free"
    readout: str | None = None
    steps: int = 4000
    guided: float = 1.0
    lr: float = 0.01
    end_lr: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    power: float = 0.9
    denoise: float | None = None
    smooth: float | None = None
    key_form: str = "paper"
    confidence: float | None = None
    distil: float = 0.0

    def __post_init__(self) -> None:
        if self.setting not in ("annotation-free", "zero-shot"):
            raise UserError(f'setting is "{self.setting}": use annotation-free or zero-shot')
        if self.steps < 1 or not 0 <= self.guided <= 1:
            raise UserError(f"{self.steps} steps, guided for a share of {self.guided}: at least 1, and from 0 to 1")

    @property
    def guided_steps(self) -> int:
        """Steps in which CLIP fills in the labels."""
        return round(self.guided * self.steps)


class Teaching(nn.Module):
    """Student, teacher and losses of a step. Only the student is a part of the module: the teacher is frozen.

    Args:
        student: learns.
        teacher: CLIP, in eval mode; its preparation constants are the student's too. One that drops padding reads the
            photographs alone, without what fills their samples up to squares.
        recipe: how.
        classes: labels that are filled in.
        external: another model, for the reading ``proxyclip``.

    Attributes:
        guided: whether CLIP fills in the labels of this step, or the student does.
        share: micro-batches of the step.
    """

    def __init__(
        self,
        student: Student,
        teacher: nn.Module,
        recipe: Recipe,
        classes: Sequence[int],
        external: ExternalModel | None = None,
    ) -> None:
        super().__init__()
        self.student, self.recipe, self.classes = student, recipe, list(classes)
        self._teacher = (teacher,)  # in a tuple: neither trained, nor saved, nor wrapped
        self._reader = DenseReader(teacher, [recipe.readout], external=external, keys=recipe.smooth is not None)
        self.guided, self.share = True, 1

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of a batch (see :func:`ovseg.maskclip_plus.data.collate`).

        ``loss`` divides by all pixels, those of 255 too, as the published training does; their number is then the same
        for every process. ``segmentation_sum`` and ``labelled`` give the mean over labelled pixels.
        """
        visual, recipe = self._teacher[0].visual, self.recipe
        pixels = normalize(batch["images"], visual.image_mean, visual.image_std)
        unseen = None if recipe.setting == "annotation-free" else self.classes
        targets = mark_unlabelled(batch["labels"], unseen)
        dense = keys = None
        if self.guided or recipe.distil:
            maps, keys = self._reader(pixels, batch.get("sizes"))
            dense = maps[recipe.readout].float()
        features = self.student.features(pixels).float()
        # Autocast would cast the products with the class embeddings down again, and in bfloat16 (8 bits) the cosines of
        # classes that are alike are equal: labels would be those of whichever stands first.
        with torch.autocast(pixels.device.type, enabled=False):
            return self._losses(targets, features, dense, keys, batch.get("sizes"))

    def _losses(
        self, targets: Tensor, features: Tensor, dense: Tensor | None, keys: Tensor | None, sizes: Sizes | None
    ) -> dict[str, Tensor]:
        """Losses of float32 features, and of the teacher's dense map and keys where they are needed."""
        recipe = self.recipe
        logits = class_logits(features, self.student.classifier())
        if self.guided:
            scores, smoothed = self._teacher_scores(dense, keys, sizes)
        else:
            scores, smoothed = logits.detach()[:, self.classes], False
        scale = 100.0 if self.guided else 1.0
        labels = fill_labels(
            targets, scores, self.classes, confidence=recipe.confidence, probability=smoothed, scale=scale
        )
        total, labelled = segmentation_loss(logits, labels)
        loss = total / (labels.numel() * self.share)
        out = {"segmentation_sum": total.detach(), "labelled": labelled.double()}
        if recipe.distil:
            difference, numbers = distillation_loss(features, dense, labels)
            loss = loss + recipe.distil * difference / (labels.numel() * features.shape[1] * self.share)
            out |= {"distillation_sum": difference.detach(), "distilled": numbers.double()}
        return {"loss": loss, **out}

    @torch.no_grad()
    def _teacher_scores(self, dense: Tensor, keys: Tensor | None, sizes: Sizes | None) -> tuple[Tensor, bool]:
        """Scores ``[B, U, h, w]`` of the classes to be filled in, and whether they are sums of probabilities."""
        scores = class_logits(dense, self.student.embeddings[self.classes])
        if self.recipe.denoise is not None:
            scores = prompt_denoising(scores, self.recipe.denoise)
        if self.recipe.smooth is None:
            return scores, False
        options = self.recipe.smooth, self.recipe.key_form
        visual, grid = self._teacher[0].visual, tuple(scores.shape[-2:])
        canvas = Canvas.of(sizes if visual.drop_padding else None, len(scores), grid, visual.patch_size)
        if canvas.full:
            return key_smoothing(scores, keys.float(), *options), True
        smoothed = []
        for score, key, (rows, columns) in zip(scores, keys.float(), canvas.taken, strict=True):
            # The border that is repeated on the padding must not be counted as often.
            own = key.unflatten(0, grid)[None, :rows, :columns].flatten(1, 2)
            part = key_smoothing(score[None, :, :rows, :columns], own, *options)
            smoothed.append(F.pad(part, (0, grid[1] - columns, 0, grid[0] - rows), mode="replicate"))
        return torch.cat(smoothed), True


class MaskClipPlus(Task):
    """MaskCLIP+ for the engine's loop.

    Args:
        teaching: the module.
        data: training batches.
        dist: this process.
        source: where the data comes from, for messages.
        about: what the run is besides its recipe, as plain values: classes, data, teacher; a resume with another is
            refused.
        options: of the program; a resume with others says so.
        seed: of what a step draws (dropout).
        evaluation: called as ``evaluation(student, progress, journal)``; None for none.
    """

    name = "maskclip_plus"

    def __init__(
        self,
        teaching: Teaching,
        data: TrainingData,
        dist: Dist,
        *,
        source: str,
        about: dict[str, Any],
        options: dict[str, Any] | None = None,
        seed: int = 0,
        evaluation: Callable[[Student, Progress, Journal], None] | None = None,
    ) -> None:
        self.data, self.dist, self.source, self.about, self.evaluation = data, dist, source, about, evaluation
        self.recipe, self.seed, self._options = teaching.recipe, seed, options or {}
        if dist.distributed and dist.device.type == "cuda":
            teaching = nn.SyncBatchNorm.convert_sync_batchnorm(teaching)
        self.module = teaching

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of a whole epoch."""
        return self.data.batches_per_epoch

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """Batches of an epoch, from one on."""
        return self.data.batches(epoch, start)

    def optimizer(self) -> torch.optim.Optimizer:
        """SGD, with weight decay on everything."""
        recipe = self.recipe
        return torch.optim.SGD(
            self.module.student.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )

    def schedule(self, total_steps: int, steps_per_epoch: int) -> Rate:
        """(lr - end) (1 - step / total)^power + end."""
        recipe = self.recipe
        return make_schedule(
            "const-cooldown", base=recipe.lr, warmup=0, total=total_steps, cooldown=total_steps, power=recipe.power,
            end=recipe.end_lr,
        )  # fmt: skip

    def begin_step(self, micro: list[Batch], step: int) -> None:
        """Guided or not: by the number of the step, so that a resumed run knows. Each process draws for itself."""
        torch.manual_seed(process_seed(self.seed, step, self.dist.rank))
        self.module.guided, self.module.share = step < self.recipe.guided_steps, len(micro)

    def scalars(self, totals: dict[str, float]) -> dict[str, float]:
        """Losses per labelled pixel, and which phase it is."""
        own = {"segmentation": totals["segmentation_sum"] / max(totals["labelled"], 1)}
        if "distilled" in totals:
            own["distillation"] = totals["distillation_sum"] / max(totals["distilled"], 1)
        return {**own, "train/guided": float(self.module.guided)}

    def evaluate(self, progress: Progress, journal: Journal, *, start: bool = False) -> None:
        """Scores of the student; not before the first step."""
        if self.evaluation is not None and not start:
            average_batch_norm(self.module)
            self.evaluation(self.module.student, progress, journal)

    def state(self) -> dict[str, Any]:
        """The student."""
        return {"state_dict": self.module.student.state_dict()}

    def load_state(self, content: dict[str, Any]) -> None:
        """The student's weights."""
        self.module.student.load_state_dict(content["state_dict"])

    def identity(self) -> dict[str, Any]:
        """Recipe, teacher and data."""
        return {**asdict(self.recipe), **self.about}

    def options(self) -> dict[str, Any]:
        """All options of the program."""
        return self._options

    def before_saving(self) -> None:
        """Ordinary batch norms of several processes are averaged."""
        average_batch_norm(self.module)

    def releases(self, progress: Progress) -> dict[str, dict[str, Any]]:
        """``student.pt``: the network with its classes, see :func:`ovseg.maskclip_plus.network.load_student`."""
        visual = self.module._teacher[0].visual
        return {
            "checkpoints/student.pt": release_of(
                self.module.student, self.about["classes"], mean=visual.image_mean, std=visual.image_std
            )
        }
