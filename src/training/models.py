"""The models of a run: loading, placing, wrapping, and the weights that it starts from."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

import open_clip
from open_clip import CLIP
from open_clip.weights import reference_layout
from training.engine.checkpoint import weights_hash
from training.engine.distributed import Dist
from training.engine.errors import UserError
from training.engine.precision import Precision
from training.ensemble import ensemble_state
from training.methods import Method


def load_model(args: argparse.Namespace) -> CLIP:
    """The start model on the CPU in float32; random weights follow ``--seed``."""
    if args.model.endswith(".json"):
        path = Path(args.model)
        args.model = path.parent.name if path.stem == "config" else path.stem
        as_user_error(open_clip.add_model_config, path, args.model)
    torch.manual_seed(args.seed)
    model = as_user_error(
        open_clip.create_model, args.model, pretrained=args.pretrained or None, cache_dir=args.cache_dir
    )
    patch = model.visual.patch_size
    if args.downsample_factor not in (None, patch):
        raise UserError(
            f"--downsample-factor {args.downsample_factor}: {args.model} has patches of {patch}; leave it out"
        )
    if args.dataset_type != "contrastive" and args.det_image_size % patch:
        near = max(round(args.det_image_size / patch), 1) * patch
        raise UserError(f"--det-image-size {args.det_image_size} is no multiple of the patch size {patch}: use {near}")
    if args.extract_type == "v1" and reference_layout(model) != "openai":
        raise UserError(f"--extract-type v1 needs a CLIP ViT with a class token; {args.model} is none: use v2")
    return model


def as_user_error(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call into the model package; what it says of names, files and shapes is for the user."""
    try:
        return function(*args, **kwargs)
    except (ValueError, RuntimeError, FileNotFoundError, ImportError) as error:
        raise UserError(str(error)) from error


def prepare_models(args: argparse.Namespace, model: CLIP, dist: Dist, precision: Precision) -> tuple[CLIP, CLIP | None]:
    """(student, teacher or None) on the device. Parts that training does not need stay on the CPU."""
    distils = args.dataset_type in ("grid_distill", "proposals_distill")
    teacher = None
    if distils:
        teacher = copy.deepcopy(model)
        del teacher.text  # embeds crops only
        # Frozen: stored in the dtype it computes in, so that no step casts it anew.
        teacher.visual.to(dist.device, precision.input_dtype)
    student = model.to(dtype=precision.param_dtype)
    student.visual.to(dist.device)
    student.logit_scale.data = student.logit_scale.data.to(dist.device)
    if args.dataset_type == "contrastive":
        student.to(dist.device)
    if args.grad_checkpointing:
        student.set_grad_checkpointing(True)
    if args.compile:
        for trunk in [m.visual.trunk for m in (student, teacher) if m is not None]:
            for block in trunk.blocks:
                block.compile()
    return student, teacher


def wrap(method: Method, dist: Dist) -> torch.nn.Module:
    """The method under data parallelism; frozen parts are left alone: not broadcast, not waited for."""
    if not dist.distributed:
        return method
    trainable = {n for n, p in method.named_parameters() if p.requires_grad}
    names = [n for n, _ in method.named_parameters()] + [n for n, _ in method.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        method, [n for n in names if n not in trainable]
    )
    ids = [dist.device.index] if dist.device.type == "cuda" else None
    return DistributedDataParallel(method, device_ids=ids, gradient_as_bucket_view=True)


class StartWeights:
    """Weights that a run began with: the other part of its ensemble, and what a resumed run must share.

    Frozen weights are never copied: the student still has them.
    """

    def __init__(self, student: CLIP) -> None:
        self.changed = {n: p.detach().clone().cpu() for n, p in student.named_parameters() if p.requires_grad}
        self.hash = weights_hash(student.state_dict())

    def ensemble(self, student: CLIP, alpha: float) -> dict[str, torch.Tensor]:
        """State dict ``alpha * student + (1 - alpha) * start``."""
        state = student.state_dict()
        return ensemble_state(state, {**state, **self.changed}, alpha)

    @contextmanager
    def ensembled(self, student: CLIP, alpha: float) -> Iterator[None]:
        """The student holds the ensemble's weights for the time being."""
        if alpha == 1:
            yield
            return
        parameters = {n: p for n, p in student.named_parameters() if n in self.changed}
        mixed = self.ensemble(student, alpha)
        before = {n: p.detach().clone() for n, p in parameters.items()}
        with torch.no_grad():
            for n, p in parameters.items():
                p.copy_(mixed[n])
        try:
            yield
        finally:
            with torch.no_grad():
                for n, p in parameters.items():
                    p.copy_(before[n])
