"""Dense labels: from photographs and class names to the label of every pixel, for several readings in one pass."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from open_clip.transform import normalize, resize
from ovseg.classes import ClassList, embed_words, parse_classes
from ovseg.dense import DenseReader
from ovseg.external import ExternalModel
from ovseg.labels import LabelRule, Labels, ScoreMap, Smoothing, label_pixels
from ovseg.protocols import OWN, Protocol
from ovseg.refine import key_smoothing, prompt_denoising
from ovseg.windows import AxisMap, Windows, fit_within, plan_windows, spread
from training.engine.data.images import read_image
from training.engine.errors import UserError

#: Settings that all variants of one pass must share: they decide what the network sees and which words are scored.
SHARED = ("long_side", "short_side", "antialias", "window", "stride", "remainder", "words", "templates")
WINDOWS_PER_PASS = 16
_DEFAULT = "default"  # name of a single variant


def network_input(image: Tensor, protocol: Protocol) -> Tensor:
    """An image as the network is to see it, both uint8 ``[3, H, W]``; windows are cut from it."""
    size = fit_within(*image.shape[-2:], protocol.long_side, protocol.short_side)
    if protocol.antialias:
        return resize(image, *size, "bilinear")
    return TF.resize(image, list(size), interpolation=TF.InterpolationMode.BILINEAR, antialias=False)


class ImageSegmenter(ABC):
    """From images to labels by way of a network that scores words at cells.

    Args:
        classes: C classes.
        variants: name -> settings; readings and refinements may differ, what the network sees may not. A single
            protocol is the variant ``default``.
        patch_size: pixels of a cell.
        mean, std: pixel normalisation (RGB, of values in 0..1).
        device: of the network.
        dtype: autocast dtype; float32 for none. Scores are float32 in any case.
        pixel_dtype: of the network's input.
        windows_per_pass: windows (of one or several images) that go through the network together.
        multiple: what windows are padded to multiples of; 0 for the patch.

    Raises:
        UserError: variants that cannot share a pass.
    """

    def __init__(
        self,
        classes: ClassList,
        variants: Protocol | Mapping[str, Protocol],
        *,
        patch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        pixel_dtype: torch.dtype = torch.float32,
        windows_per_pass: int = WINDOWS_PER_PASS,
        multiple: int = 0,
    ) -> None:
        self.multiple = multiple
        self.classes, self.patch_size, self.mean, self.std = classes, patch_size, tuple(mean), tuple(std)
        self.device, self.dtype, self.pixel_dtype = device, dtype, pixel_dtype
        self.windows_per_pass = windows_per_pass
        self.variants = {_DEFAULT: variants} if isinstance(variants, Protocol) else dict(variants)
        self.shared = next(iter(self.variants.values()))
        for name, protocol in self.variants.items():
            for field in SHARED:
                if getattr(protocol, field) != getattr(self.shared, field):
                    raise UserError(f"variant {name} has another {field} than the first: run it by itself")

    @abstractmethod
    def read(self, windows: Tensor) -> tuple[dict[str | None, Tensor], Tensor | None]:
        """Scores ``[n, words, h, w]`` of normalised windows ``[n, 3, H, W]`` by reading, and keys ``[n, h * w, K]`` or
        None.
        """

    @property
    def prepare(self) -> Callable[[Tensor], Tensor]:
        """Function from an image to the network's input, both uint8 ``[3, H, W]``; it knows nothing of the network, so
        that worker processes can have it.
        """
        return partial(network_input, protocol=self.shared)

    @torch.inference_mode()
    def score(self, inputs: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[dict[str, ScoreMap]]:
        """Scores of all variants.

        Args:
            inputs: what :meth:`prepare` returned, one per image, uint8 ``[3, h_i, w_i]``.
            sizes: (height, width) of each label map.

        Returns:
            Per image a map of scores by name of the variant.
        """
        shared = self.shared
        plans = [
            plan_windows(
                *x.shape[-2:], self.patch_size, shared.window, shared.stride, shared.remainder, self.multiple
            )
            for x in inputs
        ]  # fmt: skip
        cosines, keys = self._read(inputs, plans)
        words = self.classes.word_classes
        results = []
        for i, (plan, (height, width)) in enumerate(zip(plans, sizes, strict=True)):
            maps = {}
            for name, protocol in self.variants.items():
                scores = refine(cosines[i][protocol.readout], None if keys is None else keys[i], protocol, words)
                maps[name] = ScoreMap.of(scores, plan, height, width, probability=protocol.smooth is not None)
            results.append(maps)
        return results

    def _read(
        self, inputs: Sequence[Tensor], plans: Sequence[Windows]
    ) -> tuple[list[dict[str | None, Tensor]], list[Tensor] | None]:
        """Per image the cosines ``[windows, words, h, w]`` by reading, and keys ``[windows, cells, K]`` if needed."""
        cosines: list[dict] = [{p.readout: [] for p in self.variants.values()} for _ in inputs]
        keys: list[list] = [[] for _ in inputs]
        # Windows of the same size go together, whichever image they are from; those of an image stay in order.
        groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for i, plan in enumerate(plans):
            groups.setdefault(plan.shape, []).extend((i, w) for w in range(plan.count))
        for places in groups.values():
            for start in range(0, len(places), self.windows_per_pass):
                part = places[start : start + self.windows_per_pass]
                windows = torch.stack([plans[i].crop(inputs[i], w) for i, w in part])
                maps, part_keys = self.read(plans[part[0][0]].pad(self._normalize(windows)))
                for name, values in maps.items():
                    for (i, _), value in zip(part, values, strict=True):
                        cosines[i][name].append(value)
                if part_keys is not None:
                    for (i, _), value in zip(part, part_keys.float(), strict=True):
                        keys[i].append(value)
        stacked = [{name: torch.stack(values) for name, values in image.items()} for image in cosines]
        return stacked, [torch.stack(k) for k in keys] if any(keys) else None

    def _normalize(self, windows: Tensor) -> Tensor:
        windows = windows.to(self.device, non_blocking=True)
        return normalize(windows, self.mean, self.std, dtype=self.pixel_dtype)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.inference_mode()
    def label(self, scores: ScoreMap, protocol: Protocol, image: Tensor, *, confidence: bool = False) -> Labels:
        """Labels from the scores of one variant; ``image`` is the network's input that they were made from."""
        background = self.classes.background
        rule = LabelRule(
            scale=protocol.scale,
            background=background,
            threshold=None if background is None else protocol.threshold,
            area=None if background is None else protocol.area,
        )
        smoothing = None
        if protocol.pamr_steps:
            smoothing = Smoothing(self._normalize(image[None])[0], protocol.pamr_steps, protocol.pamr_dilations)
        return label_pixels(
            scores, self.classes.word_classes, len(self.classes), rule, smoothing=smoothing, confidence=confidence
        )

    def __call__(self, image: Tensor, *, confidence: bool = False) -> dict[str, Labels]:
        """Labels of one image, uint8 ``[3, H, W]``, at its own size, by name of the variant."""
        prepared = self.prepare(image)
        maps = self.score([prepared], [tuple(image.shape[-2:])])[0]
        return {
            name: self.label(maps[name], protocol, prepared, confidence=confidence)
            for name, protocol in self.variants.items()
        }


class Segmenter(ImageSegmenter):
    """Labels of images for fixed classes.

    Args:
        model: a :class:`open_clip.CLIP`; only its image tower is used.
        classes: C classes.
        embeddings: unit-length ``[words, D]``, see :func:`ovseg.classes.embed_words`.
        variants: name -> settings; readings and refinements may differ, what the network sees may not. A single
            protocol is the variant ``default``.
        external: another model, for readings that follow its similarities.
        dtype: autocast dtype of the network; float32 for none. Scores are float32 in any case.
        windows_per_pass: windows (of one or several images) that go through the network together.

    Raises:
        UserError: variants that cannot share a pass, or a reading that lacks what it needs.
        ValueError: embeddings of another number of words.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: ClassList,
        embeddings: Tensor,
        variants: Protocol | Mapping[str, Protocol] = OWN,
        *,
        external: ExternalModel | None = None,
        dtype: torch.dtype = torch.float32,
        windows_per_pass: int = WINDOWS_PER_PASS,
    ) -> None:
        weight = next(model.visual.parameters())
        super().__init__(
            classes,
            variants,
            patch_size=model.visual.patch_size,
            mean=model.visual.image_mean,
            std=model.visual.image_std,
            device=weight.device,
            dtype=dtype,
            pixel_dtype=weight.dtype,
            windows_per_pass=windows_per_pass,
            # Another model reads the same windows, with patches of its own.
            multiple=0 if external is None else math.lcm(model.visual.patch_size, external.patch_size),
        )
        if len(embeddings) != len(classes.all_words):
            raise ValueError(f"{len(embeddings)} embeddings for {len(classes.all_words)} words")
        if model.visual.drop_padding and self.multiple > self.patch_size:
            raise UserError(
                "--external pads images to its own patches, but this model is read without padding: use an external "
                f"model whose patches of {external.patch_size} pixels divide {self.patch_size}, or other weights"
            )
        self.model = model
        self.embeddings = embeddings.to(self.device, torch.float32)
        self.reader = DenseReader(
            model,
            [p.readout for p in self.variants.values()],
            external=external,
            keys=any(p.smooth is not None for p in self.variants.values()),
        )

    def read(self, windows: Tensor) -> tuple[dict[str | None, Tensor], Tensor | None]:
        """Cosines of cells and words by reading."""
        with self._autocast():
            maps, keys = self.reader(windows)
        cosines = {n: torch.einsum("ndhw,cd->nchw", dense.float(), self.embeddings) for n, dense in maps.items()}
        return cosines, keys

    @torch.inference_mode()
    def dense(self, image: Tensor) -> tuple[dict[str | None, Tensor], Windows]:
        """Dense maps ``[D, h, w]`` of a whole image by reading, and how their cells lie on it.

        Args:
            image: what :meth:`prepare` returned, uint8 ``[3, h, w]``.
        """
        plan = plan_windows(*image.shape[-2:], self.patch_size, remainder="pad", multiple=self.multiple)
        with self._autocast():
            maps, _ = self.reader(plan.pad(self._normalize(image[None])))
        return {name: dense[0].float() for name, dense in maps.items()}, plan


def refine(cosine: Tensor, keys: Tensor | None, protocol: Protocol, word_classes: Tensor | None = None) -> Tensor:
    """MaskCLIP's refinements of one image: cosines ``[windows, words, h, w]``, keys ``[windows, h * w, K]``.

    ``word_classes``: the class of each word, int64 ``[words]``; None where each is a class.

    Denoising asks for the best cell of the whole image; smoothing stays within a window.

    Raises:
        UserError: smoothing of a map that lies on another grid than the keys.
    """
    if protocol.denoise is not None:
        cosine = prompt_denoising(cosine.transpose(0, 1)[None], protocol.denoise, word_classes)[0].transpose(0, 1)
    if protocol.smooth is None:
        return cosine
    if keys.shape[1] != cosine.shape[2] * cosine.shape[3]:
        raise UserError(f"key smoothing of the reading {protocol.readout}: it lies on another grid than the keys")
    return key_smoothing(cosine, keys, protocol.smooth, protocol.key_form)


Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in 0..1


def at_pixels(maps: Tensor, plan: Windows, size: tuple[int, int]) -> np.ndarray:
    """Cells ``[C, h, w]`` of a whole image (:meth:`Segmenter.dense`) at the pixels of the photograph ``[C, H, W]``."""
    rows, columns = plan.rows.matrix(size[0], maps.shape[1]), plan.columns.matrix(size[1], maps.shape[2])
    return spread(maps, AxisMap.of(rows, maps.device), AxisMap.of(columns, maps.device)).cpu().numpy()


def on_input(box: Box, plan: Windows) -> Box:
    """A box of the photograph as one of the padded input, on which the cells of :meth:`Segmenter.dense` lie."""
    x, y = (axis.length / (axis.length + sum(axis.padding)) for axis in (plan.columns, plan.rows))
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def as_image(image: Tensor | Image.Image | str | Path) -> Tensor:
    """A photograph as uint8 ``[3, H, W]``: a file, a PIL image, or such a tensor.

    Raises:
        ValueError: a tensor of another type or shape.
        ImageError: a file that cannot be read.
    """
    if isinstance(image, (str, Path)):
        return read_image(str(image))
    if isinstance(image, Image.Image):
        return TF.pil_to_tensor(image.convert("RGB"))
    if image.dtype != torch.uint8 or image.dim() != 3 or len(image) != 3:
        raise ValueError(f"an image of {image.dtype} {tuple(image.shape)}: give uint8 [3, H, W], a PIL image or a file")
    return image


def segment(
    image: Tensor | Image.Image | str | Path,
    model: nn.Module,
    classes: ClassList | Sequence[str],
    *,
    tokenizer: Callable[[list[str]], Tensor] | None = None,
    embeddings: Tensor | None = None,
    protocol: Protocol = OWN,
    readout: str | None = None,
    external: ExternalModel | None = None,
    confidence: bool = False,
) -> Labels:
    """Label every pixel of a photograph with the nearest of some classes.

    Args:
        image: of any size: a file, a PIL image, or uint8 ``[3, H, W]``.
        model: a :class:`open_clip.CLIP` in eval mode.
        classes: names (``"person|man|woman"`` for synonyms), or a class list.
        tokenizer: of the model (``open_clip.get_tokenizer``); needed without ``embeddings``.
        embeddings: unit-length ``[words, D]`` in the order of the classes' words.
        protocol: settings; ``short_side`` decides how finely the image is seen.
        readout: dense reading, in place of the protocol's.
        external: another model, for the reading ``proxyclip``.
        confidence: return the probability of each pixel's label as well.

    Returns:
        Labels uint8 ``[H, W]`` on the model's device, and the confidence or None.

    Raises:
        UserError: no class names, or some twice.
        ValueError: neither a tokenizer nor embeddings.
        ImageError: a file that cannot be read.
    """
    if not isinstance(classes, ClassList):
        classes = parse_classes([classes] if isinstance(classes, str) else classes)
    if embeddings is None:
        if tokenizer is None:
            raise ValueError("give the model's tokenizer, or embeddings of the class names")
        embeddings = embed_words(model, tokenizer, classes, templates=protocol.templates)
    if readout is not None:
        protocol = replace(protocol, readout=readout)
    return Segmenter(model, classes, embeddings, protocol, external=external)(as_image(image), confidence=confidence)[
        _DEFAULT
    ]
