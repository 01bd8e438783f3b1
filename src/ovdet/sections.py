"""Config sections that detectors share: data and optimisation. A detector may derive its own from them.

Defaults are those of the published F-ViT; keys marked (*) choose between it and other ways.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ovdet.data.transforms import RESIZES

Rule = tuple[str, Any, bool, str]  # name of a value, the value, whether it is right, what it must be
INPUT = ("resize", "pixels", "padding", "exif")  # of data: what weights were trained with, besides their network


@dataclass
class DataConfig:
    """Images and annotations. Relative paths: see :meth:`ovdet.config.Config.locate`."""

    protocol: str = "coco"  # how AP is computed: "coco", "lvis" or "voc"
    train_annotations: str = ""  # COCO or LVIS json with base classes only
    train_images: str = ""
    val_annotations: str = ""  # COCO or LVIS json; its categories, sorted by id, are the classes evaluated
    val_images: str = ""
    novel: list[str] = field(default_factory=list)  # names of novel classes
    novel_frequency: list[str] = field(default_factory=list)  # LVIS frequencies (r, c, f) that are novel
    embeddings: str = ""  # .npy [C+1, D], background last; "" = computed with the text tower and cached
    image_size: int = 640  # side of the padded square input, a multiple of the patch size
    resize: str = "bilinear"  # (*) without antialias, as OpenCV does; "bicubic": with it, as in CLIP's training
    pixels: str = "imagenet"  # (*) mean and std of pixels; "model": those that the ViT was trained with
    padding: str = "zero"  # (*) after normalisation; "black": black pixels, normalised like the image
    exif: bool = True  # (*) turn images as their EXIF orientation says
    jitter: list[float] = field(default_factory=lambda: [0.1, 2.0])  # range of the large-scale jitter
    whole_target: bool = True  # (*) the scaled longest side is cut down to whole pixels before the other follows
    flip: float = 0.5  # probability
    mask_centres: bool = False  # (*) masks are scaled by the pixel under each centre, not by that at each beginning
    by_orientation: bool = True  # (*) a step's images are all wide or all high
    min_image_side: int = 32  # (*) images thinner than that are not trained on, in pixels of the file
    min_object_side: float = 1.0  # (*) nor objects thinner than that, or of no area, in pixels of the file
    min_box_side: float = 0.01  # (*) boxes below it after jitter and crop are dropped, in pixels of the input
    replace_thin: bool = True  # (*) an image all of whose boxes are below it is replaced by another
    keep_empty: bool = False  # train on images without boxes as well
    max_skipped: float = 0.1  # share of unusable images that ends a run
    workers: int = 4  # per process

    def rules(self) -> Iterator[Rule]:
        """What the types do not say."""
        low_high = len(self.jitter) == 2 and 0 < self.jitter[0] <= self.jitter[1] < math.inf
        yield "data.protocol", self.protocol, self.protocol in ("coco", "lvis", "voc"), '"coco", "lvis" or "voc"'
        yield "data.jitter", self.jitter, low_high, "[low, high]"
        yield "data.image_size", self.image_size, self.image_size > 0, "positive"
        yield "data.resize", self.resize, self.resize in RESIZES, '"bilinear" or "bicubic"'
        yield "data.pixels", self.pixels, self.pixels in ("imagenet", "model"), '"imagenet" or "model"'
        yield "data.padding", self.padding, self.padding in ("zero", "black"), '"zero" or "black"'
        yield from shares("data", self, ("flip", "max_skipped"))
        yield from not_negative("data", self, ("workers", "min_image_side", "min_object_side", "min_box_side"))


@dataclass
class TrainConfig:
    """Optimisation."""

    epochs: int = 3
    decay_epochs: list[int] = field(default_factory=list)  # rate * decay_factor after each of these
    decay_factor: float = 0.1
    lr: float = 1e-4  # at base_batch images per step
    weight_decay: float = 0.1
    decay_all: bool = True  # (*) norms, biases and the temperature decay like the rest
    clip: float = 1.0  # largest gradient norm; 0 = no limit
    warmup_steps: int = 250
    warmup_factor: float = 0.001  # first rate / base rate
    batch_size: int = 8  # images per process
    base_batch: int = 64
    scale_lr: bool = True  # lr * (batch_size * processes) / base_batch
    precision: str = ""  # "fp32", "amp_bf16" or "amp_fp16"; "": bfloat16 on a GPU that has it, else fp32
    loss_scale: float = 512.0  # (*) of amp_fp16; 0: as large as goes
    sync_batch_norm: bool = True  # when several processes train on GPUs
    seed: int = 0
    log_every: int = 50  # steps
    save_every: int = 1  # epochs
    eval_every: int = 1  # epochs; 0 = never while training

    def rules(self) -> Iterator[Rule]:
        """What the types do not say."""
        kinds = ("", "fp32", "amp_bf16", "amp_fp16")
        yield "train.decay_epochs", self.decay_epochs, all(epoch > 0 for epoch in self.decay_epochs), "epochs above 0"
        yield "train.seed", self.seed, 0 <= self.seed < 2**32, "0 or more and below 2^32"
        yield "train.precision", self.precision, self.precision in kinds, '"", "fp32", "amp_bf16" or "amp_fp16"'
        yield from positive("train", self, ("epochs", "batch_size", "base_batch", "log_every", "save_every"))
        yield from not_negative(
            "train", self, ("lr", "weight_decay", "clip", "warmup_steps", "warmup_factor", "eval_every",
                            "decay_factor", "loss_scale")
        )  # fmt: skip


def positive(section: str, values: Any, names: tuple[str, ...]) -> Iterator[Rule]:
    """Rules that values are finite and above 0."""
    for name in names:
        value = getattr(values, name)
        yield f"{section}.{name}", value, 0 < value < math.inf, "positive"


def not_negative(section: str, values: Any, names: tuple[str, ...]) -> Iterator[Rule]:
    """Rules that values are finite and 0 or more."""
    for name in names:
        value = getattr(values, name)
        yield f"{section}.{name}", value, 0 <= value < math.inf, "0 or more"


def shares(section: str, values: Any, names: tuple[str, ...]) -> Iterator[Rule]:
    """Rules that values are between 0 and 1."""
    for name in names:
        value = getattr(values, name)
        yield f"{section}.{name}", value, 0 <= value <= 1, "between 0 and 1"


def anchor_rules(model: Any) -> Iterator[Rule]:
    """Rules of a section ``model`` with the anchors' ratios, offset and overlaps."""
    low, high = model.rpn_negative_iou, model.rpn_positive_iou
    yield "model.rpn_negative_iou", low, low <= high, f"at most model.rpn_positive_iou ({high})"
    ratios = model.anchor_ratios
    good = bool(ratios) and all(0 < ratio < math.inf for ratio in ratios)
    yield "model.anchor_ratios", ratios, good, "positive numbers"
    yield "model.anchor_offset", model.anchor_offset, 0 <= model.anchor_offset < 1, "0 or more and below 1"


def mask_rules(test: Any) -> Iterator[Rule]:
    """Rules of a section ``test`` with ``mask_edges`` and ``mask_threshold``."""
    good = test.mask_edges in ("zero", "repeated")
    yield "test.mask_edges", test.mask_edges, good, '"zero" or "repeated"'
    yield "test.mask_threshold", test.mask_threshold, 0 < test.mask_threshold <= 1, "above 0 and at most 1"
