"""Config of GLIP. Defaults are GLIP-T's; the variants are the files in ``GLIP/configs``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ovdet.config import Config
from ovdet.glip.decode import AGGREGATIONS, MERGES
from ovdet.glip.dyconv import OFFSETS
from ovdet.sections import Rule, not_negative, positive, shares

#: What a knowledge file holds of a class.
KNOWLEDGE = ("def_wiki", "def_wn", "path_wn", "gpt3", "gpt3_and_wiki")
TUNING = ("full", "linear_prob", "language_prompt_v1", "language_prompt_v2", "language_prompt_v3", "language_prompt_v4")


@dataclass
class ImageConfig:
    """The image encoder."""

    kind: str = "swin"  # "swin", or "clip": an image tower of this project, see [clip]
    drop_block: float = 0.3  # of the pyramid while training
    # Swin.
    width: int = 96
    depths: list[int] = field(default_factory=lambda: [2, 2, 6, 2])
    heads: list[int] = field(default_factory=lambda: [3, 6, 12, 24])
    window: int = 7
    drop_path: float = 0.2
    freeze_at: int = 0  # 1: patch embedding, 2: the first stage as well, ...
    weights: str = ""  # that training starts from: a file, a name of the hub, or "random"; unused with model.weights
    # CLIP.
    blocks: list[int] = field(default_factory=lambda: [3, 7])  # of the two finer levels; the last is read densely
    frozen: bool = True  # the tower stays as it is

    def rules(self) -> Iterator[Rule]:
        """What the types do not say."""
        yield "image.kind", self.kind, self.kind in ("swin", "clip"), '"swin" or "clip"'
        yield "image.depths", self.depths, len(self.depths) == 4 and min(self.depths) > 0, "four positive numbers"
        fits = len(self.heads) == 4 and all(h > 0 and self.width * 2**i % h == 0 for i, h in enumerate(self.heads))
        yield "image.heads", self.heads, fits, "four numbers that divide the widths of the stages"
        yield "image.freeze_at", self.freeze_at, 0 <= self.freeze_at <= 5, "between 0 and 5"
        yield from positive("image", self, ("width", "window"))
        yield from shares("image", self, ("drop_block", "drop_path"))


@dataclass
class TextConfig:
    """The text encoder."""

    kind: str = "bert"  # or "clip": the text tower of the model in [clip]
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    tokens: int = 30522  # of the vocabulary
    limit: int = 256  # most tokens of a text
    vocabulary: str = "bert-base-uncased"  # vocab.txt, or the folder that holds it
    # That training starts from: a folder, a name of the hub, or "random"; unused with model.weights. A CLIP tower has
    # its weights from [clip], unless they are to be random.
    weights: str = ""
    dropout: float = 0.1
    frozen: bool = False

    def rules(self) -> Iterator[Rule]:
        """What the types do not say."""
        yield "text.kind", self.kind, self.kind in ("bert", "clip"), '"bert" or "clip"'
        yield "text.limit", self.limit, 3 <= self.limit <= 512, "between 3 and 512"
        yield "text.heads", self.heads, self.heads > 0 and self.width % self.heads == 0, "a divisor of text.width"
        yield from positive("text", self, ("width", "layers", "hidden", "tokens"))
        yield from shares("text", self, ("dropout",))


@dataclass
class ClipConfig:
    """The CLIP model whose towers are used, where ``image.kind`` or ``text.kind`` is "clip"."""

    name: str = ""  # one of open_clip.list_models(), or a model config file (.json)
    pretrained: str = ""  # a tag, a checkpoint file, "eva" with cache_dir, or "random"
    cache_dir: str = ""

    def rules(self) -> Iterator[Rule]:
        """Nothing that the types do not say."""
        return iter(())


@dataclass
class HeadConfig:
    """The grounding head, see :class:`ovdet.glip.head.HeadOptions`."""

    channels: int = 256
    blocks: int = 6
    fusion: bool = True  # False: late fusion, GLIP-T (A)
    fusion_width: int = 2048
    fusion_heads: int = 8
    fusion_dropout: float = 0.1
    text_heads: int = 12
    text_hidden: int = 3072
    text_dropout: float = 0.1
    groups: int = 16
    offsets: str = "released"  # or "aligned": not for released weights
    deform: bool = True
    classifier: int = 80  # of the unused classifier in released files; 0: none

    def rules(self) -> Iterator[Rule]:
        """What the types do not say."""
        yield "head.offsets", self.offsets, self.offsets in OFFSETS, " or ".join(f'"{o}"' for o in OFFSETS)
        good = self.groups > 0 and self.channels % self.groups == 0
        yield "head.groups", self.groups, good, "a divisor of head.channels"
        yield from positive("head", self, ("channels", "blocks", "fusion_width", "fusion_heads", "text_heads"))
        yield from not_negative("head", self, ("classifier",))
        yield from shares("head", self, ("fusion_dropout", "text_dropout"))


@dataclass
class ModelConfig:
    """The whole model."""

    weights: str = ""  # a GLIP to start from: released, of MMDetection, or of this program
    checkpoint: bool = True  # recompute activations in the backward pass

    def rules(self) -> Iterator[Rule]:
        """Nothing that the types do not say."""
        return iter(())


@dataclass
class DataConfig:
    """Images and annotations. Relative paths: see :meth:`ovdet.config.Config.locate`."""

    train_sets: list[str] = field(default_factory=list)  # data set files, see ovdet.glip.data.sets
    train_annotations: str = ""  # or one COCO-style json, and its images
    train_images: str = ""
    val_annotations: str = ""  # COCO or LVIS json; its categories, sorted by id, are the classes evaluated
    val_images: str = ""
    protocol: str = "coco"  # how results are judged: "coco", "lvis" (fixed AP) or "flickr" (recall)
    sentences: str = ""  # folder of Flickr30k Entities' Sentences and Annotations, with protocol "flickr"
    novel: list[str] = field(default_factory=list)  # classes whose AP is given apart, as they are in the file
    names: list[str] = field(default_factory=list)  # other words for the classes, in the order of their ids
    prompts: str = ""  # json of prefix, name and suffix of each class
    shots: int = 0  # examples of each class that training uses; 0: all
    shot_seed: int = 3
    copies: int = 1  # how often train_annotations counts in an epoch
    sizes: list[int] = field(default_factory=lambda: [480, 560, 640, 720, 800])  # shorter side, drawn for each image
    longest: int = 1333
    test_size: int = 800
    flip: float = 0.5
    exif: bool = False  # turn images as their EXIF orientation says; annotations mostly mean them as they are stored
    max_skipped: float = 0.1  # share of unusable images that ends a run
    shuffle: bool = False  # the order of class names in a training prompt
    negatives: int = 0  # class names in a training prompt besides those present; 0: all classes, always
    workers: int = 4  # per process

    def rules(self) -> Iterator[Rule]:
        """What the types do not say."""
        kinds = ("coco", "lvis", "flickr")
        yield "data.protocol", self.protocol, self.protocol in kinds, " or ".join(f'"{k}"' for k in kinds)
        yield "data.sizes", self.sizes, bool(self.sizes) and min(self.sizes) > 0, "positive sides"
        clash = not (self.shuffle and self.prompts)
        yield "data.shuffle", self.shuffle, clash, "false together with data.prompts, whose order is fixed"
        yield from positive("data", self, ("longest", "test_size", "copies"))
        yield from not_negative("data", self, ("shots", "shot_seed", "negatives", "workers"))
        yield from shares("data", self, ("flip", "max_skipped"))


@dataclass
class TrainConfig:
    """Optimisation."""

    mode: str = "full"  # what is trained, one of TUNING
    behaviour: str = (
        "fixed"  # of v3 and v4: "fixed" trains the probe too, "reference" forgets it, as published code does
    )
    epochs: int = 24
    lr: float = 1e-4
    text_lr: float = 1e-5  # of the text encoder
    weight_decay: float = 1e-4
    clip: float = 1.0  # largest gradient norm; 0 = no limit
    decay_at: list[float] = field(default_factory=lambda: [0.67, 0.89])  # shares of the run after which the rate falls
    decay_factor: float = 0.1
    weight_decay_at: list[float] = field(default_factory=list)  # one share: the decay falls as well, at it times each
    warmup_steps: int = 2000
    warmup_factor: float = 0.001
    patience: int = 0  # evaluations without gain after which the rate falls; 0: by decay_at
    stop_patience: int = 0  # evaluations without gain after which the run ends; 0: never
    ema: float = 0.0  # decay of the averaged weights; 0: none
    batch_size: int = 2  # images per process
    precision: str = "amp_bf16"  # "fp32", "amp_bf16" or "amp_fp16"
    loss_scale: float = 0.0  # of amp_fp16, fixed; 0: found and adapted
    seed: int = 0
    log_every: int = 20
    save_every: int = 1  # epochs
    eval_every: int = 1  # epochs; 0 = never while training
    metric: str = "AP"  # that patience and the best checkpoint go by

    def rules(self) -> Iterator[Rule]:
        """What the types do not say."""
        kinds = ("fp32", "amp_bf16", "amp_fp16")
        yield "train.mode", self.mode, self.mode in TUNING, f"one of {', '.join(TUNING)}"
        yield "train.behaviour", self.behaviour, self.behaviour in ("fixed", "reference"), '"fixed" or "reference"'
        yield "train.precision", self.precision, self.precision in kinds, '"fp32", "amp_bf16" or "amp_fp16"'
        yield "train.ema", self.ema, 0 <= self.ema < 1, "0 or more and below 1"
        yield "train.decay_at", self.decay_at, all(0 < share < math.inf for share in self.decay_at), "positive shares"
        yield (
            "train.weight_decay_at",
            self.weight_decay_at,
            len(self.weight_decay_at) < 2,
            "one share of decay_at, or none",
        )
        needs = self.eval_every > 0 or not (self.patience or self.stop_patience)
        yield "train.eval_every", self.eval_every, needs, "positive where train.patience or train.stop_patience is set"
        yield from positive("train", self, ("epochs", "batch_size", "lr", "log_every", "save_every"))
        yield from not_negative(
            "train", self, ("text_lr", "weight_decay", "clip", "decay_factor", "warmup_steps", "warmup_factor",
                            "patience", "stop_patience", "loss_scale", "seed", "eval_every")
        )  # fmt: skip


@dataclass
class TestConfig:
    """Detection."""

    __test__ = False  # not a test class

    batch_size: int = 1  # images per process
    aggregation: str = "mean"  # class score from token scores: "mean", "max", "onehot" or "power"
    score: float = 0.05
    nms: float = 0.6
    per_level: int = 1000
    per_image: int = 100  # for each prompt
    scales: list[int] = field(default_factory=list)  # shorter sides of a test at several sizes; empty: data.test_size
    scales_longest: int = 2500  # largest longer side of these
    mirror: bool = False  # each size mirrored as well
    ranges: list[float] = field(default_factory=list)  # per size: least and largest root of a box's area, file's pixels
    merge: str = "nms"  # of several sizes: "nms" or "vote"
    chunk: int = 0  # class names in a prompt; 0: as many as there is room for
    separator: str = ". "
    knowledge: str = ""  # YAML of what is known of each class: a text of its own for each, in place of prompts
    knowledge_kind: str = "def_wiki"
    knowledge_pooling: str = "first"  # of a class's states: "first" or "mean"

    def rules(self) -> Iterator[Rule]:
        """What the types do not say."""
        yield "test.aggregation", self.aggregation, self.aggregation in AGGREGATIONS, " or ".join(AGGREGATIONS)
        yield "test.knowledge_kind", self.knowledge_kind, self.knowledge_kind in KNOWLEDGE, " or ".join(KNOWLEDGE)
        poolings = ("first", "mean")
        yield "test.knowledge_pooling", self.knowledge_pooling, self.knowledge_pooling in poolings, '"first" or "mean"'
        yield "test.scales", self.scales, all(side > 0 for side in self.scales), "positive sides"
        pairs = not self.ranges or len(self.ranges) == 2 * max(len(self.scales), 1)
        yield "test.ranges", self.ranges, pairs, "a least and a largest side for each of test.scales, or nothing"
        yield "test.merge", self.merge, self.merge in MERGES, " or ".join(f'"{m}"' for m in MERGES)
        yield from positive("test", self, ("batch_size", "per_level", "per_image", "scales_longest"))
        yield from not_negative("test", self, ("chunk",))
        yield from shares("test", self, ("score", "nms"))


@dataclass
class GlipConfig(Config):
    """A whole config."""

    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    test: TestConfig = field(default_factory=TestConfig)

    def check(self) -> Iterator[tuple[str, Any, bool, str]]:
        """Rules of all sections."""
        for section in self.sections():
            yield from getattr(self, section).rules()
