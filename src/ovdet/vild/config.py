"""Config of ViLD. Defaults are those of its first and last published experiments where these are known."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ovdet import sections
from ovdet.config import Config
from ovdet.sections import Rule, anchor_rules, mask_rules, not_negative, positive, shares
from ovdet.vild.crops import RULES

# What trains the embedding of regions, by name: (learns from labels and texts, learns from the teacher).
VARIANTS = {
    "text": (True, False),
    "image": (False, True),
    "vild": (True, True),
    "ensemble": (True, True),
    "supervised": (True, False),
}
NORMS = ("batch", "fixed", "frozen")
PROMPTS = ("ensemble", "synonyms", "single")


@dataclass
class ModelConfig:
    """Mask R-CNN, or Faster R-CNN without ``masks``."""

    variant: str = "ensemble"  # "text", "image", "vild", "ensemble"; "supervised": a plain classifier, for comparison
    trunk: str = "resnet50.tv_in1k"  # a model of timm that gives maps of strides 4 to 32
    trunk_weights: str = ""  # a file; "": those of the trunk's tag, from the hub; "random": none
    # Its norms train by each batch's statistics ("batch"), by the stored ones ("fixed"), or are constants ("frozen").
    trunk_norm: str = "batch"
    trunk_frozen: int = 0  # so many of its four stages do not train, nor does the stem then
    start: str = ""  # a detector file whose weights are the start, as far as their names and shapes fit
    channels: int = 256  # of the feature pyramid
    norm: bool = True  # batch norm in pyramid, RPN and heads; train.sync_batch_norm synchronises it
    norm_eps: float = 1e-5
    norm_momentum: float = 0.1  # share of a new batch in the running statistics
    # Region proposals.
    rpn_convs: int = 2
    anchor_scale: float = 8.0  # anchor side in strides
    anchor_ratios: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])  # height / width
    anchor_offset: float = 0.0  # of the centres, in cells
    rpn_samples: int = 256  # anchors per image in the loss
    rpn_positive_share: float = 0.5
    rpn_positive_iou: float = 0.7
    rpn_negative_iou: float = 0.3
    rpn_padding: bool = True  # anchors in the padding are trained (as background) and proposed
    rpn_pre_nms: int = 2000  # per level, in training
    rpn_pre_nms_test: int = 1000  # per level, otherwise; 0: the same
    rpn_post_nms: int = 1000  # per image
    rpn_nms: float = 0.7
    # Boxes and classes.
    box_convs: int = 4
    box_fcs: int = 2
    box_width: int = 1024  # of the fully connected layers
    box_size: int = 7  # RoIAlign side
    roi_samples: int = 512  # RoIs per image in the loss
    roi_positive_share: float = 0.25
    roi_iou: float = 0.5
    roi_sampling: int = 0  # RoIAlign points per cell and axis; 0 = as many as the RoI's size asks for
    roi_finest: float = 56.0  # pixels; level 1 begins at twice this side
    temperature: float = 0.01  # tau, fixed: logits are cosines divided by it
    background_std: float = 0.01  # of the learned background vector at the start; only its direction matters
    background_weight: float = 1.0  # in the classification loss
    image_weight: float = 0.5  # w: L = L_text + w L_image
    # Masks.
    masks: bool = True
    mask_convs: int = 4
    mask_size: int = 14  # RoIAlign side; masks have twice that

    @property
    def learns_text(self) -> bool:
        """Whether labels train the embedding."""
        return VARIANTS[self.variant][0]

    @property
    def distils(self) -> bool:
        """Whether the teacher trains an embedding."""
        return VARIANTS[self.variant][1]

    def rules(self) -> Iterator[Rule]:
        """What the types do not say."""
        yield "model.variant", self.variant, self.variant in VARIANTS, f"one of {', '.join(VARIANTS)}"
        yield "model.trunk_norm", self.trunk_norm, self.trunk_norm in NORMS, f"one of {', '.join(NORMS)}"
        yield "model.trunk_frozen", self.trunk_frozen, 0 <= self.trunk_frozen <= 4, "0 to 4"
        yield from anchor_rules(self)
        yield from positive(
            "model", self, ("channels", "norm_eps", "anchor_scale", "rpn_samples", "rpn_pre_nms", "rpn_post_nms",
                            "box_width", "box_size", "roi_samples", "roi_finest", "temperature", "background_std",
                            "mask_size")
        )  # fmt: skip
        yield from not_negative(
            "model", self, ("rpn_convs", "rpn_pre_nms_test", "box_convs", "box_fcs", "roi_sampling",
                            "background_weight", "image_weight", "mask_convs")
        )  # fmt: skip
        yield from shares(
            "model", self, ("norm_momentum", "rpn_positive_share", "rpn_positive_iou", "rpn_negative_iou", "rpn_nms",
                            "roi_positive_share", "roi_iou")
        )  # fmt: skip


@dataclass
class TeacherConfig:
    """The CLIP model that embeds texts and crops, and how crops are made."""

    name: str = "ViT-B-32-quickgelu"  # one of open_clip.list_models(), or a model config file
    pretrained: str = "openai"  # a tag, a checkpoint file, "eva" with cache_dir, or "" for random weights
    cache_dir: str = ""  # checkpoint file when pretrained is "eva", else the download cache
    crop_scales: list[float] = field(default_factory=lambda: [1.0, 1.5])  # raw embeddings of these are added
    crop_rule: str = "squash"  # how a crop becomes a square; "resize_centre", "pad": see ovdet.vild.crops.crop
    precision: str = ""  # of the crops' embeddings; see train.precision
    batch_size: int = 256  # crops embedded at a time

    def rules(self) -> Iterator[Rule]:
        """What the types do not say."""
        scales = self.crop_scales
        good = bool(scales) and all(0 < scale < math.inf for scale in scales)
        kinds = ("", "fp32", "amp_bf16", "amp_fp16")
        yield "teacher.crop_scales", scales, good, "positive numbers"
        yield "teacher.crop_rule", self.crop_rule, self.crop_rule in RULES, f"one of {', '.join(RULES)}"
        yield "teacher.precision", self.precision, self.precision in kinds, '"", "fp32", "amp_bf16" or "amp_fp16"'
        yield from positive("teacher", self, ("batch_size",))


@dataclass
class DataConfig(sections.DataConfig):
    """Images, annotations, and what is distilled."""

    image_size: int = 1024
    by_orientation: bool = False
    replace_thin: bool = False
    min_box_side: float = 1.0
    keep_empty: bool = True  # images without base objects still distil
    train_novel: bool = False  # train on the novel classes' objects as well (supervised rows)
    single_class: bool = False  # every object is an "object": the network that proposes regions
    prompts: str = "ensemble"  # of class names; "synonyms": of LVIS's synonyms as well; "single": "a photo of a {}"
    proposals: str = ""  # folder that make_proposals.py wrote for the training images
    store: str = ""  # folder that embed.py wrote for these proposals
    distil_most: int = 300  # proposals an image, the first
    distil_min_side: float = 1.0  # thinner ones, after jitter and crop, are dropped, in pixels of the input
    distil_min_share: float = 0.5  # and those of whose area less is left
    sampling: str = "uniform"  # "repeat": images of rare classes come more often
    repeat_threshold: float = 1e-3  # share of images below which a class is rare

    def rules(self) -> Iterator[Rule]:
        """What the types do not say."""
        yield from super().rules()
        good = self.image_size % 32 == 0
        yield "data.image_size", self.image_size, good, "a multiple of 32, the largest stride"
        yield "data.prompts", self.prompts, self.prompts in PROMPTS, f"one of {', '.join(PROMPTS)}"
        yield "data.sampling", self.sampling, self.sampling in ("uniform", "repeat"), '"uniform" or "repeat"'
        alone = not (self.sampling == "repeat" and self.by_orientation)
        yield "data.sampling", self.sampling, alone, '"uniform" where data.by_orientation is set'
        yield from positive("data", self, ("distil_most", "repeat_threshold"))
        yield from not_negative("data", self, ("distil_min_side",))
        yield from shares("data", self, ("distil_min_share",))


@dataclass
class TrainConfig(sections.TrainConfig):
    """Optimisation."""

    epochs: int = 20
    steps: int = 0  # end after so many; 0: after the epochs
    optimizer: str = "sgd"  # or "adamw"
    momentum: float = 0.9  # of SGD
    lr: float = 0.02
    weight_decay: float = 2.5e-5
    clip: float = 0.0
    batch_size: int = 2
    base_batch: int = 16
    decay_steps: list[int] = field(default_factory=list)  # rate * decay_factor from each of these steps on
    decay_at: list[float] = field(default_factory=list)  # and from these shares of all steps on
    image_warmup: int = 0  # steps over which the weight of the distillation loss rises from 0

    def rules(self) -> Iterator[Rule]:
        """What the types do not say."""
        yield from super().rules()
        yield "train.optimizer", self.optimizer, self.optimizer in ("sgd", "adamw"), '"sgd" or "adamw"'
        yield "train.decay_at", self.decay_at, all(0 < share < 1 for share in self.decay_at), "shares between 0 and 1"
        yield from not_negative("train", self, ("steps", "image_warmup"))
        yield from shares("train", self, ("momentum",))


@dataclass
class TestConfig:
    """Detection and scores."""

    __test__ = False  # not a test class

    batch_size: int = 1  # images per process
    score: float = 1e-4  # smallest score kept
    nms: float = 0.5
    per_image: int = 300  # most detections
    temperature: float = 0.0  # tau; 0: model.temperature
    image_weight_base: float = 1 / 3  # ensemble: p = p_text^(1-w) p_image^w, w of base classes
    image_weight_novel: float = 2 / 3  # w of novel classes
    attribute_temperature: float = 0.0  # tau of attributes; 0: that of classes
    attribute_text: str = "{}"  # what an attribute is called in prompts: "{} object", "something {}"
    rank: str = "rpn"  # what orders proposals: objectness of "rpn", of the box head ("box"), or the mean of "both"
    crops: int = 300  # proposals an image that the teacher judges, in the rows named CLIP
    mask_threshold: float = 0.5
    mask_edges: str = "zero"  # beyond its outer cells' centres a mask falls to 0; "repeated": it goes on

    def rules(self) -> Iterator[Rule]:
        """What the types do not say."""
        yield "test.rank", self.rank, self.rank in ("rpn", "box", "both"), '"rpn", "box" or "both"'
        yield from mask_rules(self)
        yield "test.attribute_text", self.attribute_text, "{}" in self.attribute_text, "a text with {}"
        yield from positive("test", self, ("batch_size", "per_image", "crops"))
        yield from not_negative("test", self, ("temperature", "attribute_temperature"))
        yield from shares("test", self, ("score", "nms", "image_weight_base", "image_weight_novel"))


@dataclass
class VildConfig(Config):
    """A whole config."""

    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    test: TestConfig = field(default_factory=TestConfig)

    def check(self) -> Iterator[tuple[str, Any, bool, str]]:
        """Rules of all sections."""
        for section in (self.model, self.teacher, self.data, self.train, self.test):
            yield from section.rules()
        alone = not self.data.single_class or self.model.variant == "supervised"
        yield "data.single_class", self.data.single_class, alone, 'false where model.variant is not "supervised"'
