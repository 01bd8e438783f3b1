"""Training methods: each is a module that owns student, teacher and loss."""

from __future__ import annotations

import argparse

from torch import Tensor

from open_clip import CLIP
from training.engine.errors import UserError

from .base import Method, RegionMethod
from .clipself import CLIPSelf
from .contrastive import Contrastive
from .regionclip import RegionCLIP

__all__ = ["CLIPSelf", "Contrastive", "Method", "RegionCLIP", "RegionMethod", "build_method"]


def build_method(
    args: argparse.Namespace,
    *,
    student: CLIP,
    teacher: CLIP | None = None,
    noun_embeddings: Tensor | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Method:
    """The method of ``args.dataset_type``; locks the image tower as ``args.lock_image`` says.

    Args:
        args: ``dataset_type``, ``lock_image``, ``lock_image_unlocked_groups``, ``extract_type``, ``multiscale``,
            ``cosine_weight``, ``contrast_weight``.
        student, teacher: on their device; a teacher is needed for distillation only.
        noun_embeddings: ``[C, D]``, needed for region_clip only, on the student's device.
        rank, world_size: this process among all.

    Raises:
        UserError: ``--multiscale`` for a method without regions.
        ValueError: unknown dataset type.
    """
    if args.lock_image:
        student.lock_image_tower(args.lock_image_unlocked_groups)
    if args.dataset_type in ("grid_distill", "proposals_distill"):
        return CLIPSelf(
            student=student,
            teacher=teacher,
            cosine_weight=args.cosine_weight,
            extract_type=args.extract_type,
            multiscale=args.multiscale,
            world_size=world_size,
        )
    if args.dataset_type == "region_clip":
        return RegionCLIP(
            student=student,
            noun_embeddings=noun_embeddings,
            contrast_weight=args.contrast_weight,
            extract_type=args.extract_type,
            multiscale=args.multiscale,
            world_size=world_size,
        )
    if args.dataset_type == "contrastive":
        if args.multiscale:
            raise UserError("--multiscale resizes images with regions: leave it out with --dataset-type contrastive")
        return Contrastive(student=student, rank=rank, world_size=world_size)
    raise ValueError(f'dataset type "{args.dataset_type}" has no method')
