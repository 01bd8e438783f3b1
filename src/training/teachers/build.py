"""Teachers from their descriptions: frozen modules, each with the view that it wants."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import open_clip
from open_clip import CLIP, ImageTower
from open_clip.identity import identity
from open_clip.readouts import build_readout
from open_clip.weight_files import load_state_dict_file
from training.data.prepare import View
from training.engine.attention import prefer_attention
from training.engine.checkpoint import weights_hash
from training.engine.errors import UserError
from training.engine.sharding import is_divided, most_of_processes
from training.teachers.describe import TeacherSpec

CHUNK = 256  # crops embedded at a time; bounds memory, changes nothing else


class Teacher(nn.Module):
    """A frozen model that answers for crops or for images; always in eval mode, never with a gradient.

    Args:
        spec: what it is.
        model: a CLIP, an :class:`ImageTower`, or another timm trunk.
        view: what it looks at.

    Attributes:
        width: D of its answers.
        texts: its text tower, until :meth:`forget_texts`.
        attention: kind of attention kernel that it takes, as in :func:`~training.engine.attention.prefer_attention`.
    """

    def __init__(self, spec: TeacherSpec, model: nn.Module, view: View) -> None:
        super().__init__()
        self.spec, self.view = spec, view
        self.model = model.eval().requires_grad_(False)
        self.chunk, self.attention = CHUNK, "auto"

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode."""
        return super().train(False)

    @property
    def width(self) -> int:
        """Numbers of an answer: D of an embedding, or channels of a map."""
        if isinstance(self.model, CLIP):
            return self.model.embed_dim
        return self.model.width if isinstance(self.model, ImageTower) else self.model.num_features

    def cells(self) -> tuple[int, int]:
        """(h, w) of the map that it emits for an image."""
        side = self.view.size // self.patch_size
        return side, side

    @property
    def patch_size(self) -> int:
        """Pixels of a cell's side."""
        tower = self.model.visual if isinstance(self.model, CLIP) else self.model
        size = tower.patch_size if isinstance(tower, ImageTower) else tower.patch_embed.patch_size[0]
        return int(size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embeddings ``[K, D]`` of unit length, or a map ``[B, D, h, w]``, of pictures prepared as ``view`` says.

        A CLIP's map is that of its reading; a foundation model's has the patch tokens after the final norm.
        """
        chunks = list(pixels.split(self.chunk)) if len(pixels) else []
        if is_divided(self.model):  # its blocks are gathered by all processes at once: as many passes for each of them
            missing = most_of_processes(len(chunks), pixels.device) - len(chunks)
            chunks += [pixels.new_zeros(1, *pixels.shape[1:])] * missing
        if not chunks:
            return pixels.new_zeros(0, self.width, *(() if self.spec.emits == "embedding" else self.cells()))
        with torch.inference_mode(), self._as_stored(pixels), prefer_attention(self.attention):
            parts = [self._answer(chunk) for chunk in chunks]
        return torch.cat(parts)[: len(pixels)]  # outside: the student's backward pass keeps it

    def _answer(self, pixels: Tensor) -> Tensor:
        if self.spec.emits == "embedding":
            # In bfloat16 lengths would be off by up to half a percent, and cosines with them.
            return F.normalize(self.model.encode_image(pixels).float(), dim=-1)
        return self._map(pixels)

    def _as_stored(self, pixels: Tensor) -> contextlib.AbstractContextManager:
        """Without autocast where weights and pixels are bfloat16 already: its casts to float32 and back between layers
        would be half of the kernels and of the traffic. Norms and softmax add up in float32 all the same."""
        known = isinstance(self.model, (CLIP, ImageTower))  # trunks of others may mix types
        if not known or pixels.dtype != torch.bfloat16 or self.view.dtype != torch.bfloat16:
            return contextlib.nullcontext()
        return torch.autocast(pixels.device.type, enabled=False)

    def _map(self, pixels: Tensor) -> Tensor:
        if isinstance(self.model, CLIP):
            return self.model.encode_dense(pixels, keep_shape=True, readout=self.spec.readout)
        return foundation_map(self.model, pixels)

    def identity(self) -> str:
        """Hash of everything that its answers to a picture depend on."""
        tower = self.model.visual if isinstance(self.model, CLIP) else self.model
        if isinstance(tower, ImageTower):
            model = identity(tower)
        else:
            model = f"{type(tower).__name__} {weights_hash(tower.state_dict())}"
        return f"{self.spec.emits} {self.spec.readout or ''} {model}"

    def forget_texts(self) -> None:
        """Drop the text tower."""
        if isinstance(self.model, CLIP):
            self.model.text = None


def foundation_map(model: nn.Module, pixels: Tensor) -> Tensor:
    """Patch tokens of a trunk without text, after all blocks and the final norm: ``[B, W, h, w]``; no other tokens."""
    if not isinstance(model, ImageTower):  # trunks with windows and a neck (SAM) give a map themselves
        return model.forward_features(pixels)
    return model.encode_dense(pixels, readout=build_readout("tokens", model, normalized=False))


def build_teacher(
    spec: TeacherSpec,
    start: CLIP,
    *,
    image_size: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Teacher:
    """The teacher that a description means, on its device. Only text towers that are still asked stay on the CPU.

    Args:
        start: the model that training starts from (copied, not kept).
        image_size: side of the student's image, pixels.
        dtype: in which it computes, and is stored: frozen, it need not be cast anew in each step.

    Raises:
        UserError: unknown model or weights, or a size that its patches do not divide.
    """
    if spec.kind == "timm":
        model, mean, std = foundation_model(spec)
        native = image_size
    else:
        model = copy.deepcopy(start) if not spec.model else _clip(spec)
        mean, std, native = model.visual.image_mean, model.visual.image_std, model.visual.image_size
    teacher = Teacher(spec, model, View(spec.source, native, tuple(mean), tuple(std), dtype))
    if not spec.texts:
        teacher.forget_texts()
    if spec.source == "images":
        patch = teacher.patch_size
        cells = image_size // (patch if spec.kind == "clip" else start.visual.patch_size)
        size = spec.size or cells * patch
        if size % patch:
            near = max(round(size / patch), 1) * patch
            raise UserError(f"input of {size} pixels for {spec.model}, whose patches have {patch}: use {near}")
        teacher.view = View(spec.source, size, tuple(mean), tuple(std), dtype)
    elif spec.size:
        teacher.view = View(spec.source, spec.size, tuple(mean), tuple(std), dtype)
    (teacher.model.visual if isinstance(model, CLIP) else teacher.model).to(device, dtype)
    return teacher


def _clip(spec: TeacherSpec) -> CLIP:
    weights = None if spec.weights == "random" else spec.weights
    if weights == "":
        raise UserError(f"the teacher {spec.model} has no weights: name them, for example --dense-teacher-weights FILE")
    try:
        return open_clip.create_model(spec.model, pretrained=weights)
    except (ValueError, RuntimeError, FileNotFoundError, ImportError) as error:
        raise UserError(str(error)) from error


def foundation_model(spec: TeacherSpec) -> tuple[nn.Module, Sequence[float], Sequence[float]]:
    """(trunk, mean, std) of a timm model without its head; UserError where it cannot be made."""
    from_file = spec.weights not in ("", "random")
    try:
        flexible = {"dynamic_img_size": True} if "sam" not in spec.model else {}
        trunk = timm.create_model(spec.model, pretrained=spec.weights == "", num_classes=0, **flexible)
        if from_file:
            trunk.load_state_dict(load_state_dict_file(spec.weights))
    except Exception as error:  # timm, its hub and torch raise many kinds
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"--vfm {spec.model}: cannot be made ({reason}); give the name of a timm trunk, and a file of its weights "
            "with --vfm-weights where there is no network"
        ) from error
    data = resolve_model_data_config(trunk)
    try:
        tower = ImageTower(trunk, image_size=data["input_size"][-1], image_mean=data["mean"], image_std=data["std"])
    except TypeError:
        tower = trunk
    return tower, data["mean"], data["std"]
