"""The models of a run: loading, placing, what decays of them, and the weights that it starts from."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

import open_clip
from open_clip import CLIP
from open_clip.weights import export_state_dict, reference_layout
from training.engine.checkpoint import weights_hash
from training.engine.distributed import Dist
from training.engine.errors import UserError, as_user_error
from training.engine.optim import adamw, decay_groups
from training.engine.precision import Precision
from training.ensemble import ensemble_state


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


def is_undecayed(name: str, parameter: Tensor) -> bool:
    """No weight decay for tensors of fewer than 2 dimensions or whose name contains bn, ln, bias or logit_scale.

    To be asked with the name and shape of the published layout.
    """
    return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))


def undecayed_names(model: CLIP) -> set[str]:
    """Names (this package's) of the parameters without weight decay.

    The rule is about names and dimensions, and those differ between layouts: OpenAI's class token is a vector, this
    package's is ``[1, 1, W]``. So it is asked in the layout in which the published code keeps this model.
    """
    own = {n: p.detach() for n, p in model.named_parameters()}
    # Exporting renames in order; what it may add (rotary tables) comes last.
    published = export_state_dict(model, state=own).items()
    return {ours for ours, (name, value) in zip(own, published, strict=False) if is_undecayed(name, value)}


def parameter_groups(model: CLIP, weight_decay: float) -> list[dict]:
    """Optimizer groups of what trains: [undecayed, decayed]."""
    undecayed = undecayed_names(model)
    return decay_groups(model.named_parameters(), weight_decay, lambda name, _: name in undecayed)


def adam_defaults(model_name: str) -> tuple[float, float, float]:
    """(beta1, beta2, eps): those of CLIP when the model's name contains "vit", else AdamW's own."""
    return (0.9, 0.98, 1e-6) if "vit" in model_name.lower() else (0.9, 0.999, 1e-8)


def build_optimizer(args: argparse.Namespace, model: CLIP) -> torch.optim.AdamW:
    """AdamW over what trains in a model.

    ``args`` gives ``model``, ``lr``, ``wd`` and ``beta1``, ``beta2``, ``eps`` (None: :func:`adam_defaults`).

    Raises:
        UserError: nothing trains.
    """
    groups = parameter_groups(model, args.wd)
    if not any(group["params"] for group in groups):
        raise UserError("nothing trains: every parameter is locked; raise --lock-image-unlocked-groups")
    given = (args.beta1, args.beta2, args.eps)
    beta1, beta2, eps = (d if g is None else g for g, d in zip(given, adam_defaults(args.model), strict=True))
    return adamw(groups, lr=args.lr, betas=(beta1, beta2), eps=eps)


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
