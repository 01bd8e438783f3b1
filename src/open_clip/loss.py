"""Contrastive losses of whole images and texts, with OpenCLIP's names and arguments."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class _Gather(torch.autograd.Function):
    """Rows of all processes in rank order; each process receives the gradients that all have for its rows."""

    @staticmethod
    def forward(ctx, features: Tensor) -> Tensor:
        parts = [torch.empty_like(features) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, features.contiguous())
        ctx.rows = len(features)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        start = ctx.rows * dist.get_rank()
        return gradient[start : start + ctx.rows]


def gather_features(features: Tensor, rank: int = 0, world_size: int = 1, with_grad: bool = True) -> Tensor:
    """Rows ``[n, D]`` of every process as ``[n * world_size, D]``, in rank order; all processes have the same n.

    Args:
        with_grad: gradients flow back to the processes that the rows come from. Without it only this process's own
            rows carry gradients.
    """
    if world_size == 1:
        return features
    if with_grad:
        return _Gather.apply(features)
    with torch.no_grad():
        parts = [torch.empty_like(features) for _ in range(world_size)]
        dist.all_gather(parts, features.contiguous())
    parts[rank] = features
    return torch.cat(parts)


def _no_horovod(use_horovod: bool) -> None:
    if use_horovod:
        raise ValueError("use_horovod=True: processes are joined by torch.distributed only")


class ClipLoss(nn.Module):
    """Symmetric cross-entropy of images against texts and texts against images (CLIP, 2021, figure 3).

    Args:
        local_loss: each process scores its own rows against all columns, and the mean over processes is the loss; else
            every process computes the whole matrix. Both have the same mean.
        gather_with_grad: gradients flow through gathered embeddings.
        cache_labels: accepted for OpenCLIP's callers: the labels cost nothing.
        rank, world_size: of this process, and how many.
        use_horovod: only False.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        _no_horovod(use_horovod)
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size = rank, world_size

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """Column of each row's partner, int64 ``[num_logits]``."""
        start = num_logits * self.rank if self.local_loss and self.world_size > 1 else 0
        return torch.arange(start, start + num_logits, device=device)

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scaled similarities of images and texts, and of texts and images, over all processes."""
        gather = lambda f: gather_features(f, self.rank, self.world_size, self.gather_with_grad)  # noqa: E731
        images, texts = gather(image_features), gather(text_features)
        if self.local_loss:
            per_image, per_text = image_features @ texts.T, text_features @ images.T
        else:
            per_image = images @ texts.T
            per_text = per_image.T
        per_image, per_text = logit_scale * per_image, logit_scale * per_text
        return (per_image, per_text) if logit_bias is None else (per_image + logit_bias, per_text + logit_bias)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or ``{"contrastive_loss": loss}``.

        Args:
            image_features, text_features: unit-length ``[n, D]``; row i of one belongs to row i of the other.
            logit_scale: factor of the cosines (exponentiated).
        """
        per_image, per_text = self.get_logits(image_features, text_features, logit_scale, logit_bias)
        labels = self.get_ground_truth(image_features.device, len(per_image))
        loss = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
        return {"contrastive_loss": loss} if output_dict else loss


class DistillClipLoss(ClipLoss):
    """:class:`ClipLoss` and the cross-entropy of a student's similarities to a teacher's (CLIP-KD's inter-batch term).

    Arguments are those of :class:`ClipLoss`.
    """

    def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        """Mean cross-entropy of the student's distribution over columns to the teacher's."""
        return -(teacher_logits.softmax(dim=1) * student_logits.log_softmax(dim=1)).sum(dim=1).mean()

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """(contrastive loss, distillation loss), or a dict ``contrastive_loss``, ``distill_loss``.

        Args:
            dist_image_features, dist_text_features, dist_logit_scale: the teacher's.
        """
        student = self.get_logits(image_features, text_features, logit_scale)
        with torch.no_grad():
            teacher = self.get_logits(dist_image_features, dist_text_features, dist_logit_scale)
        labels = self.get_ground_truth(image_features.device, len(student[0]))
        contrastive = sum(F.cross_entropy(logits, labels) for logits in student) / 2
        distilled = sum(self.dist_loss(t, s) for t, s in zip(teacher, student, strict=True)) / 2
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distilled}
        return contrastive, distilled


class SigLipLoss(nn.Module):
    """Sigmoid loss of every image-text pair on its own (SigLIP, 2023, equation 1), summed, over the images.

    Args:
        cache_labels: accepted for OpenCLIP's callers.
        rank, world_size: of this process, and how many.
        dist_impl: how OpenCLIP passes texts round: ``"bidir"``, ``"shift"``, ``"reduce"`` or ``"gather"``. The loss is
            the same by each; here they are gathered.
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
    ) -> None:
        super().__init__()
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(f'dist_impl is "{dist_impl}": use bidir, shift, reduce or gather')
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size
        self.dist_impl = dist_impl or "gather"

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """-1 for each pair ``[num_logits, num_logits]``, and 1 for those that belong together."""
        labels = -torch.ones(num_logits, num_logits, device=device, dtype=dtype)
        return labels if negative_only else labels + 2 * torch.eye(num_logits, device=device, dtype=dtype)

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> Tensor:
        """Scaled similarities ``[n, m]`` of images and texts, with the bias."""
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of this process's images against the texts of all, or ``{"contrastive_loss": loss}``.

        Arguments as in :meth:`ClipLoss.forward`.
        """
        texts = gather_features(text_features, self.rank, self.world_size)
        logits = self.get_logits(image_features, texts, logit_scale, logit_bias)
        rows = torch.arange(len(logits), device=logits.device)
        # Every pair as one that does not belong together; those on the diagonal differ from that by their logit.
        loss = (F.softplus(logits).sum() - logits[rows, rows + self.rank * len(rows)].sum()) / len(rows)
        return {"contrastive_loss": loss} if output_dict else loss


def create_loss(args: Any) -> nn.Module:
    """The loss that OpenCLIP's training arguments ask for: ``distill``, ``siglip``, or else :class:`ClipLoss`.

    Args:
        args: has ``rank``, ``world_size``, ``local_loss``, ``gather_with_grad``, ``model``; optionally ``distill``,
            ``siglip``, ``loss_dist_impl``, ``horovod``.

    Raises:
        ValueError: a CoCa model, or horovod.
    """
    read = lambda name, default=False: getattr(args, name, default)  # noqa: E731
    if "coca" in str(read("model", "")).lower():
        raise ValueError(f"{args.model} needs CoCa's captioning loss, and CoCa is not part of this package")
    if read("siglip") and not read("distill"):
        return SigLipLoss(rank=args.rank, world_size=args.world_size, dist_impl=read("loss_dist_impl", None))
    kind = DistillClipLoss if read("distill") else ClipLoss
    return kind(
        local_loss=args.local_loss, gather_with_grad=args.gather_with_grad, cache_labels=True, rank=args.rank,
        world_size=args.world_size, use_horovod=read("horovod"),
    )  # fmt: skip
