"""What every training method has in common: it is the module that data parallelism wraps."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip import CLIP
from open_clip.readouts import Unread, build_readout, freeze_unread
from open_clip.regions import roi_features
from training.engine.distributed import send_numbers
from training.engine.flags import flag
from training.engine.sharding import is_divided
from training.teachers.build import Teacher

# Input sizes that --multiscale draws from, by the size of the loader. The published ones; other sizes use the ratios
# of the first row.
MULTISCALE = {1024: (320, 640, 896, 1024), 896: (336, 448, 672, 896)}


def multiscale_sizes(size: int, patch_size: int) -> tuple[int, ...]:
    """Sizes that a batch of ``size`` pixels may be resized to; each a multiple of the patch."""
    sizes = MULTISCALE.get(size)
    if sizes is None or any(s % patch_size for s in sizes):
        ratios = (0.3125, 0.625, 0.875, 1.0)
        sizes = tuple(sorted({max(round(size * r / patch_size), 1) * patch_size for r in ratios}))
    return sizes


class Method(nn.Module):
    """Student, frozen teachers and losses in one module, so that gradients are exchanged by construction.

    The training loop knows three calls: :meth:`begin_step` once per optimizer step, ``forward(batch)`` per micro-batch,
    :meth:`end_step` after the optimizer. A method gives :meth:`counts` (items of each group in a batch) and
    :meth:`losses` (sums over them). :meth:`begin_step` adds up the counts of the step over all processes and
    micro-batches; ``forward`` divides each sum by its group's count and multiplies by ``world_size``, as data
    parallelism averages over processes. So the result is the mean over all items of the step, however unevenly they
    are spread. Every parameter that requires a gradient gets one in every backward pass (a zero one from a micro-batch
    without items), so no process waits for another.

    A method says by ``groups`` what a loss is averaged over (``"regions"`` where it does not), and by ``logs`` what is
    logged instead of the losses.

    Args:
        student: the model that trains.
        teachers: by name; frozen.
        weights: of the losses, by name.
        world_size: number of processes that average their gradients.
    """

    groups: Mapping[str, str] = {}
    logs: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        student: CLIP,
        teachers: Mapping[str, Teacher] | None = None,
        weights: Mapping[str, float] | None = None,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self.student = student
        self.teachers = nn.ModuleDict(dict(teachers or {}))
        for teacher in self.teachers.values():
            teacher.eval().requires_grad_(False)
        self.weights = dict(weights or {})
        self.world_size = world_size
        self.scale: dict[str, float | Tensor] = {}  # group -> world_size / its items of the step, everywhere

    def train(self, mode: bool = True) -> Method:
        """Training mode for the student only: teachers stay in eval mode."""
        super().train(mode)
        for teacher in self.teachers.values():
            teacher.eval()
        return self

    # -- what a method defines ----------------------------------------------------------------------------------------

    def counts(self, batch: dict) -> dict[str, float]:
        """Items of a prepared batch by group; the same groups for every batch."""
        raise NotImplementedError

    def losses(self, batch: dict) -> dict[str, Tensor]:
        """The losses of a prepared batch, summed over its items, by the names of ``weights``, and all of ``logs``."""
        raise NotImplementedError

    def unread(self) -> list[Unread]:
        """Parameters of the student's image tower, or parts of them, that no loss reaches; they do not decay either."""
        return []

    @property
    def reaches_all(self) -> bool:
        """Whether the losses that count reach every parameter that trains: data parallelism waits for all of them."""
        return True

    def prepare(self, batches: list[dict], *, seed: int) -> None:
        """Ahead of the counts of a step: what all its micro-batches have in common, or teachers' answers that the
        counts hinge on (kept as entries of the batches)."""

    # -- what the loop calls ------------------------------------------------------------------------------------------

    def begin_step(self, batches: list[dict], *, seed: int) -> None:
        """Collective preparation of one optimizer step.

        Args:
            batches: this process's prepared micro-batches.
            seed: the same on every process, another one each step; source of the step's random choices.
        """
        self.prepare(batches, seed=seed)
        counts = [self.counts(b) for b in batches]
        totals = {group: sum(c[group] for c in counts) for group in counts[0]}
        if self.world_size == 1:
            self.scale = {group: 1 / (total or 1) for group, total in totals.items()}
            return
        # They stay on the device: to look at them here would be to wait for the whole of the last step.
        packed = self.sum_over_processes(send_numbers(list(totals.values()), batches[0]["images"].device))
        scales = self.world_size / torch.where(packed == 0, 1, packed)
        self.scale = dict(zip(totals, scales.unbind(), strict=True))

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """``loss`` (what the backward pass starts from) and, detached, this process's sums to log.

        ``NAME_sum`` for each loss and logged quantity, and ``GROUP`` for each group's items.
        """
        counts = self.counts(batch)
        counted = self.has_items(counts)
        # Where blocks are gathered by all processes at once, those with items would wait for this one's passes.
        losses = self.losses(batch) if counted or is_divided(self) else {}
        terms = [self.weights[n] * v * self.scale[self.group(n)] for n, v in losses.items() if n in self.weights]
        loss = sum(terms[1:], terms[0]) if terms else self.zero_loss()
        if losses and not counted:
            loss, losses = 0 * loss, {}
        zero = loss.detach().new_zeros(())
        logged = {name: losses[name].detach() if name in losses else zero for name in self.logged()}
        return {
            "loss": loss,
            **{f"{name}_sum": value for name, value in logged.items()},
            **{group: zero + float(number) for group, number in counts.items()},
        }

    def has_items(self, counts: dict[str, float]) -> bool:
        """Whether a batch with these counts counts for anything; otherwise its loss is 0, with zero gradients, and is
        not computed unless the model is divided over the processes.

        A method whose losses gather over processes always says yes: the others wait for this one.
        """
        return any(counts.values())

    def group(self, name: str) -> str:
        """What a loss or logged sum is averaged over."""
        return self.groups.get(name, "regions")

    def logged(self) -> dict[str, str]:
        """The sums that every forward pass gives, and what each is averaged over."""
        return {name: self.group(name) for name in self.logs or self.weights}

    def end_step(self) -> None:
        """Keep a temperature that trains in CLIP's range: ``logit_scale`` in [0, ln 100]."""
        if self.student.logit_scale.requires_grad:
            with torch.no_grad():
                self.student.logit_scale.clamp_(0, math.log(100))

    # -- what methods share -------------------------------------------------------------------------------------------

    def ask(self, name: str, batch: dict) -> Tensor:
        """A teacher's answer for a batch, without gradient: embeddings ``[K, D]`` or a map ``[B, D, h, w]``.

        From ``batch["answers"]`` where it is kept there, else from the teacher, which looks at ``batch[name]``.
        """
        kept = batch.get("answers", {}).get(name)
        if kept is None:
            return self.teachers[name](batch[name])
        if kept.ndim == 3:  # a map's cells, [B, N, D]
            side = math.isqrt(kept.shape[1])
            kept = kept.transpose(1, 2).unflatten(2, (side, -1))
        return kept

    def embed_rows(self, encode: Callable[..., Tensor], rows: Tensor) -> Tensor:
        """The student's embeddings ``[n, D]``, of unit length, by its ``encode_image`` or ``encode_text``.

        Of no rows a dummy is embedded and cut off again: every process makes the same passes, and all that trains gets
        its gradient, a zero one.
        """
        return encode(rows if len(rows) else rows.new_zeros(1, *rows.shape[1:]), normalize=True)[: len(rows)]

    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def zero_loss(self) -> Tensor:
        """0, with a zero gradient for everything that trains: the loss of a micro-batch without items."""
        return sum(p.sum().float() * 0 for p in self.student.parameters() if p.requires_grad)

    def freeze_scale(self) -> None:
        """Freeze the temperature and bias of the logits, for a loss without gradient to them."""
        self.student.logit_scale.requires_grad_(False)
        if self.student.logit_bias is not None:
            self.student.logit_bias.requires_grad_(False)


@dataclass(frozen=True)
class DenseFlags:
    """Flags of methods that read a dense map."""

    multiscale: bool = flag(False, "resize each step's images to a random size")


@dataclass(frozen=True)
class RegionFlags(DenseFlags):
    """Flags of methods that read nothing but regions."""

    extract_type: str = flag("v2", "RoIAlign (v2) or masked tokens (v1, CLIP ViT only)", choices=("v1", "v2"))


class RegionMethod(Method):
    """A method whose loss is on the student's region embeddings.

    What such a loss never reaches is frozen: the text tower, the temperature, and what the dense reading leaves out (a
    data-parallel wrapper would wait for it forever).

    Args:
        extract_type: ``"v2"`` (RoIAlign) or ``"v1"`` (masked tokens, CLIP ViT only).
        multiscale: resize each step's images to a random size of :func:`multiscale_sizes`, bilinearly.
        readout: dense reading, which becomes the student's own and is released with its weights; None for the one
            that it has.
    """

    def __init__(
        self,
        *,
        student: CLIP,
        teachers: Mapping[str, Teacher] | None = None,
        weights: Mapping[str, float] | None = None,
        extract_type: str = "v2",
        multiscale: bool = False,
        readout: str | None = None,
        world_size: int = 1,
    ) -> None:
        super().__init__(student=student, teachers=teachers, weights=weights, world_size=world_size)
        self.extract_type, self.multiscale = extract_type, multiscale
        self.size: int | None = None
        visual = student.visual
        if readout is not None and build_readout(readout, visual).name != visual.readout.name:
            visual.set_readout(readout)
        self.freeze_unreached()

    def freeze_unreached(self) -> None:
        """Freeze what a loss on region embeddings never reaches."""
        self.student.lock_text_tower()
        self.freeze_scale()
        freeze_unread(self.unread())

    def unread(self) -> list[Unread]:
        """What the dense reading leaves out; of extraction "v1" every parameter takes part."""
        visual = self.student.visual
        return visual.readout.unread(visual) if self.extract_type == "v2" else []

    def counts(self, batch: dict) -> dict[str, float]:
        """Regions of a batch."""
        return {"regions": sum(len(b) for b in batch["boxes"])}

    def images_in(self, batch: dict) -> float:
        """Images of a batch; a batch with nothing usable left has none, but a black one."""
        return float(batch.get("samples", len(batch["boxes"])))

    def prepare(self, batches: list[dict], *, seed: int) -> None:
        """Draw the step's input size, the same everywhere."""
        if self.multiscale:
            side = batches[0]["images"].shape[-1]
            self.size = random.Random(seed).choice(multiscale_sizes(side, self.student.visual.patch_size))

    def images(self, batch: dict) -> Tensor:
        """The student's images ``[B, 3, S, S]``, at the step's size."""
        images = batch["images"]
        if self.multiscale and images.shape[-1] != self.size:
            images = F.interpolate(images, size=(self.size, self.size), mode="bilinear", align_corners=False)
        return images

    def sizes(self, batch: dict) -> list[tuple[int, int]] | None:
        """Per image the pixels (height, width) of :meth:`images` that are read: those of the picture, and of its boxes
        unless padding is dropped. None where the batch tells nothing."""
        name = "sizes" if self.student.visual.drop_padding else "reach"
        sizes, side = batch.get(name), batch["images"].shape[-1]
        if sizes is None or not self.multiscale or side == self.size:
            return sizes
        return [(-(-height * self.size // side), -(-width * self.size // side)) for height, width in sizes]

    def embed_regions(self, batch: dict) -> Tensor:
        """The student's embeddings ``[K, D]`` of a batch's boxes, float32, unit length."""
        boxes, number = batch["boxes"], sum(map(len, batch["boxes"]))
        if self.extract_type == "v1" and not number:  # it would make no pass; see embed_rows
            boxes = [boxes[0].new_tensor([[0, 0, 1, 1]]), *boxes[1:]]
        regions = self.student.encode_pseudo_boxes(
            self.images(batch), boxes, normalize=True, extract_type=self.extract_type, sizes=self.sizes(batch)
        )
        return regions[:number].float()

    def read(
        self, images: Tensor, projections: Sequence[str] = (), sizes: Sequence[tuple[int, int]] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(dense map ``[B, D, h, w]``, by name the asked ``q``, ``k``, ``v`` ``[B, N, W]`` of the last block).

        Args:
            sizes: those of :meth:`sizes`; None where images fill their squares.
        """
        visual = self.student.visual
        inputs = visual.block_inputs(images, {*visual.readout.blocks(visual), *([-1] if projections else [])}, sizes)
        return visual.readout.map(inputs), {which: inputs.projection(which) for which in projections}

    def pool_regions(self, dense: Tensor, batch: dict) -> Tensor:
        """Embeddings ``[K, D]`` of a batch's boxes from a map ``[B, D, h, w]``, float32, unit length."""
        return F.normalize(roi_features(dense, batch["boxes"]), dim=-1).float()

    def distance(self, dense: Tensor, batch: dict) -> Tensor:
        """Cosine distance of the boxes' embeddings from a map to the teacher's of their crops, summed over regions."""
        cosine = (self.pool_regions(dense, batch) * self.ask("crops", batch).float()).sum(-1)
        return (1 - cosine).sum()
