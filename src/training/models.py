"""The models of a run: loading, placing, what decays of them, and the weights that it starts from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config as inductor
from torch import Tensor, nn

import open_clip
from open_clip import CLIP, ImageTower
from open_clip.packed_blocks import PIECES
from open_clip.readouts import build_readout
from open_clip.timm_blocks import prefix_block, value_block
from open_clip.weights import export_state_dict, reference_layout
from training.engine.attention import attention_for_crops
from training.engine.checkpoint import mapped_checkpoint, weights_hash
from training.engine.distributed import Dist
from training.engine.errors import UserError, as_user_error
from training.engine.optim import adamw, decay_groups
from training.engine.precision import Precision
from training.engine.sharding import is_sharded
from training.ensemble import ensemble_state
from training.options import ModelOptions, OptimOptions, Options
from training.teachers.build import Teacher, build_teacher

log = logging.getLogger(__name__)

COMPILED_GRAPHS = 64  # of one function, before PyTorch stops compiling it; a run needs a dozen in all


def model_name(name: str) -> str:
    """The name of ``--model``; a config file is made known under its own."""
    if not name.endswith(".json"):
        return name
    path = Path(name)
    name = path.parent.name if path.stem == "config" else path.stem
    as_user_error(open_clip.add_model_config, path, name)
    return name


def load_model(options: Options) -> CLIP:
    """The start model on the CPU in float32; random weights follow ``--seed``.

    Raises:
        UserError: unknown model or weights, or flags that do not go with it.
    """
    model_options: ModelOptions = options.model
    torch.manual_seed(options.run.seed)
    model = as_user_error(
        open_clip.create_model, model_options.model, pretrained=model_options.pretrained or None,
        cache_dir=model_options.cache_dir, force_quick_gelu=model_options.force_quick_gelu,
    )  # fmt: skip
    if options.machine.attention != "auto":  # asked for, for all of the model's attention
        model.visual.changing_kernels = ()
    if options.readout is not None:
        as_user_error(build_readout, options.readout, model.visual)
    name, size, patch = model_options.model, options.data.det_image_size, model.visual.patch_size
    if model_options.downsample_factor not in (None, patch):
        raise UserError(
            f"--downsample-factor {model_options.downsample_factor}: {name} has patches of {patch}; give {patch}, or "
            "leave it out"
        )
    used = options.trains or not options.eval.eval_image_sizes  # an evaluation at sizes of its own asks for no other
    if used and options.data.dataset_type != "contrastive" and size % patch:
        near = max(round(size / patch), 1) * patch
        raise UserError(f"--det-image-size {size} is no multiple of the patch size {patch}: use {near}")
    if getattr(options.own, "extract_type", "v2") == "v1" and reference_layout(model) != "openai":
        raise UserError(f"--extract-type v1 needs a CLIP ViT with a class token; {name} is none: use v2")
    drops = model_options.drop_padding or model.visual.drop_padding
    if drops and getattr(options.own, "extract_type", "v2") == "v1":
        raise UserError("--extract-type v1 has no form without padding (--drop-padding): use v2")
    if drops and options.machine.fsdp and options.trains:
        raise UserError("--drop-padding does not go with --fsdp: it reads blocks from inside")
    return model


def ensemble_loaded(options: Options, model: CLIP) -> float:
    """Make a model that was loaded from a training checkpoint what the run would have released at that point.

    Such a file (``epoch_N.pt``) holds the student alone. Where its run had an ``--alpha`` below 1, the model becomes
    ``alpha * student + (1 - alpha) * start model``. For an evaluation, ``--alpha`` may ask for another one.

    Returns:
        alpha; 1 where the weights are as they are in the file.

    Raises:
        UserError: the start model is not where the run found it, or is another one.
    """
    given = options.model
    path = Path((given.cache_dir if given.pretrained == "eva" else given.pretrained) or "")
    content = mapped_checkpoint(path) if path.is_file() else None
    before = (content or {}).get("args", {})
    asked = options.optim.alpha if "alpha" in options.given and not options.trains else None
    alpha = before.get("alpha", 1.0) if asked is None or not before else asked
    if alpha == 1:
        return 1.0
    source = before["cache_dir"] if before["pretrained"] == "eva" else before["pretrained"]
    source = source or f"random weights of --seed {before['seed']}"
    otherwise = "evaluate clipself.pt, use tools/ensemble_weights.py, or give --alpha 1 for the student alone"
    try:
        torch.manual_seed(before["seed"])
        start = open_clip.create_model(
            given.model, pretrained=before["pretrained"] or None, cache_dir=before["cache_dir"],
            force_quick_gelu=given.force_quick_gelu,
        )  # fmt: skip
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise UserError(
            f"{path} holds the student of a run with --alpha {alpha:g}, whose start model {source} cannot be loaded "
            f"({' '.join(str(error).split())}): {otherwise}"
        ) from error
    start.visual.adopt_readout(model.state_dict())  # of which the run's own start model was read, too
    if weights_hash(start.state_dict()) != content["start_hash"]:
        raise UserError(f"{path} began from other weights than those of {source} now: {otherwise}")
    model.load_state_dict(ensemble_state(model.state_dict(), start.state_dict(), alpha))
    log.warning(
        "%s holds the student alone: used is %g x student + %g x %s, as its run releases it (for an evaluation, "
        "--alpha changes this)", path, alpha, 1 - alpha, source,
    )  # fmt: skip
    return alpha


def prepare_teachers(options: Options, model: CLIP, dist: Dist, precision: Precision) -> dict[str, Teacher]:
    """The method's teachers by name, on the device.

    Raises:
        UserError: a teacher cannot be had, or its embeddings of crops are not of the student's width.
    """
    teachers = {}
    for spec in options.entry.teachers(options.own):
        teacher = teachers[spec.name] = build_teacher(
            spec, model, image_size=options.data.det_image_size, device=dist.device, dtype=precision.input_dtype
        )
        if spec.emits == "embedding" and teacher.width != model.embed_dim:
            raise UserError(
                f"--crop-teacher {spec.model}: its embeddings have {teacher.width} numbers, those of "
                f"{options.model.model} {model.embed_dim}: give a model of the same joint space"
            )
        if spec.source == "crops":
            teachers[spec.name].attention = attention_for_crops(options.machine.attention)
        if options.machine.compile:
            compile_blocks(teachers[spec.name].model, sides_change=_multiscale(options))
    return teachers


def prepare_student(options: Options, model: CLIP, dist: Dist, precision: Precision) -> CLIP:
    """The start model as student, on the device and locked. Parts that training does not need stay on the CPU."""
    if options.model.drop_padding:
        as_user_error(model.visual.set_drop_padding, True)
    student = model.to(dtype=precision.param_dtype)
    student.visual.to(dist.device)
    student.logit_scale.data = student.logit_scale.data.to(dist.device)
    if options.entry.texts:
        student.to(dist.device)
    if options.optim.grad_checkpointing:
        student.set_grad_checkpointing(True)
    if options.machine.compile:
        report_compiling()
        compile_blocks(student, sides_change=_multiscale(options))
    if options.model.lock_image:
        student.lock_image_tower(options.model.lock_image_unlocked_groups)
    return student


def _multiscale(options: Options) -> bool:
    return bool(getattr(options.own, "multiscale", False))


def compile_blocks(model: nn.Module, *, sides_change: bool = False, **options: Any) -> None:
    """Compile the transformer blocks of an image tower, or of a bare trunk, and what a tower runs of their insides.

    All blocks of all models share a few graphs: one for each kind of input (training or evaluation, and a number of
    tokens), whose number of images or crops may change. PyTorch's limit of 8 a function is reached by a run with two
    input sizes, and beyond it code runs uncompiled; the limit is raised here, and reaching it all the same is said
    (:func:`report_compiling`).

    Args:
        sides_change: whether the side of the input changes from step to step: then one graph serves all numbers of
            tokens.
        options: of ``torch.compile``.
    """
    if torch.__version__ < (2, 12) and hasattr(inductor.triton, "coalesce_tiling_analysis"):
        # It asserts that sizes are equal which are so only for numbers, not as symbols (mended in 2.12), and fails for
        # changing shapes, which it does not yet serve by its own words.
        inductor.triton.coalesce_tiling_analysis = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_GRAPHS)
    tower = model.visual if isinstance(model, CLIP) else model
    for block in getattr(tower, "trunk", tower).blocks:
        block.compile(**options)
        if not sides_change:
            block._compiled_call_impl = _fixed_tokens(block._compiled_call_impl)
    if isinstance(tower, ImageTower):
        changing = (value_block, *PIECES) if torch.__version__ >= (2, 12) else ()  # their tokens: see _fixed_tokens
        tower.compiled = {f: torch.compile(f, **options) for f in (prefix_block, *changing)}


def _fixed_tokens(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A block's compiled call with a graph for each number of tokens.

    Blocks of student and teacher are one function to the compiler, and from their different numbers of tokens it would
    conclude that tokens change. PyTorch 2.11 failed to compile EVA's blocks so, in bfloat16 on a GPU.
    """

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        torch._dynamo.mark_static(x, tuple(range(1, x.ndim)))
        for given in (*args, *kwargs.values()):  # a rotary table, a mask
            if isinstance(given, Tensor):
                torch._dynamo.mark_static(given)
        return call(x, *args, **kwargs)

    return run


class _Limits(logging.Handler):
    """Repeats in this program's log what PyTorch's compiler says about a limit: the rest runs uncompiled."""

    said = False

    def emit(self, record: logging.LogRecord) -> None:
        """A record of the compiler's log."""
        text = record.getMessage()
        if "recompile_limit" in text and not self.said:
            self.said = True
            log.warning(
                "--compile: PyTorch reached its limit of compilations and runs a part of the blocks uncompiled from "
                "now on, slower: use fewer input sizes, or leave --compile out (%s)", " ".join(text.split())[:160],
            )  # fmt: skip


def report_compiling() -> None:
    """Have the log say when the compiler gives up."""
    compiler = logging.getLogger("torch._dynamo")
    if not any(isinstance(h, _Limits) for h in compiler.handlers):
        compiler.addHandler(_Limits())


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


def parameter_groups(model: CLIP, weight_decay: float, undecayed: set[str] | None = None) -> list[dict]:
    """Optimizer groups of what trains: [undecayed, decayed]; by default as :func:`undecayed_names` says."""
    undecayed = undecayed_names(model) if undecayed is None else undecayed
    return decay_groups(model.named_parameters(), weight_decay, lambda name, _: name in undecayed)


def adam_defaults(model_name: str) -> tuple[float, float, float]:
    """(beta1, beta2, eps): those of CLIP when the model's name contains "vit", else AdamW's own."""
    return (0.9, 0.98, 1e-6) if "vit" in model_name.lower() else (0.9, 0.999, 1e-8)


def build_optimizer(
    options: OptimOptions, name: str, model: CLIP, undecayed: set[str] | None = None
) -> torch.optim.AdamW:
    """AdamW over what trains in a model.

    Args:
        options: the flags; betas and eps that are None are those of :func:`adam_defaults`.
        name: of the model.
        undecayed: names of parameters without weight decay; must be given where parameters are sharded.

    Raises:
        UserError: nothing trains.
    """
    groups = parameter_groups(model, options.wd, undecayed)
    if not any(group["params"] for group in groups):
        raise UserError("nothing trains: every parameter is locked; raise --lock-image-unlocked-groups")
    given = (options.beta1, options.beta2, options.eps)
    beta1, beta2, eps = (d if g is None else g for g, d in zip(given, adam_defaults(name), strict=True))
    return adamw(groups, lr=options.lr, betas=(beta1, beta2), eps=eps)


class StartWeights:
    """Weights that a run began with: the other part of its ensemble, and what a resumed run must share.

    Frozen weights are never copied: the student still has them.

    Args:
        student: whole.
    """

    def __init__(self, student: CLIP) -> None:
        self.hash = weights_hash(student.state_dict())
        self.changed: dict[str, Tensor] = {}

    def keep(self, student: CLIP) -> None:
        """Remember what will change, when the student has been placed: on the CPU, or divided as the student is."""
        trained = {n: p.detach().clone() for n, p in student.named_parameters() if p.requires_grad}
        self.changed = {n: p if is_sharded(p) else p.cpu() for n, p in trained.items()}

    def ensemble(self, student: CLIP, alpha: float) -> dict[str, Tensor]:
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


def separable_blocks(model: nn.Module, readout: str | None = None) -> list[nn.Module]:
    """Blocks of a CLIP, an image tower or a trunk that are only ever called as modules.

    The last one, and those that the dense reading (``readout``; None for the model's own) enters, are read from inside.
    """
    tower = model.visual if isinstance(model, CLIP) else model
    blocks = list(getattr(tower, "trunk", tower).blocks)
    inside = tower.resolve_readout(readout).blocks(tower) if isinstance(tower, ImageTower) else ()
    entered = {len(blocks) - 1, *(i % len(blocks) for i in inside)}
    return [block for i, block in enumerate(blocks) if i not in entered]
