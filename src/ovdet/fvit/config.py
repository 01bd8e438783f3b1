"""Config of F-ViT. Defaults are the published detector's; keys marked (*) choose between it and other ways."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ovdet.config import Config
from ovdet.parts.classifier import TEMPERATURES
from ovdet.sections import DataConfig, Rule, TrainConfig, anchor_rules, mask_rules, not_negative, positive, shares


@dataclass
class ModelConfig:
    """The ViT and the parts trained on it."""

    name: str = "EVA02-CLIP-B-16"  # one of open_clip.list_models()
    pretrained: str = "eva"  # a tag, a checkpoint file, "eva" with cache_dir, or "" for random weights
    cache_dir: str = ""  # checkpoint file when pretrained is "eva", else the download cache
    blocks: list[int] = field(default_factory=lambda: [3, 5, 7])  # outputs of levels 1-3
    readout: str = ""  # dense reading of level 4 and of the VLM's map (open_clip.readouts); "" = the model's own
    drop_padding: bool = False  # (*) the ViT leaves padding out; weights trained so are read so in any case
    channels: int = 256  # of the feature pyramid
    # Region proposals.
    rpn_convs: int = 2
    rpn_norm: bool = False  # (*) batch norm in the convolutions: OV-LVIS has it, OV-COCO not
    anchor_scale: float = 8.0  # anchor side in strides
    anchor_ratios: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])  # height / width
    anchor_offset: float = 0.0  # (*) of the centres, in cells; 0.5 is the cell's own centre
    rpn_samples: int = 256  # anchors per image in the loss
    rpn_positive_share: float = 0.5
    rpn_positive_iou: float = 0.7
    rpn_negative_iou: float = 0.3
    rpn_padding: bool = True  # (*) anchors in the padding are trained (as background) and proposed
    rpn_empty_counts_one: bool = True  # (*) an image without objects counts one anchor more in the divisor
    rpn_pre_nms: int = 2000  # per level
    rpn_post_nms: int = 1000  # per image
    rpn_nms: float = 0.7
    # Boxes and classes.
    box_convs: int = 4
    box_fcs: int = 2  # shared by classes and offsets
    box_own_fcs: int = 1  # (*) further ones of the offsets
    box_width: int = 0  # (*) of the fully connected layers; 0 = that of the joint space
    box_size: int = 7  # RoIAlign side
    box_limit_below: bool = True  # (*) a box shrinks at most 62.5 times, as it grows at most 62.5 times
    embedding_relu: bool = True  # (*) the class embedding ends with a ReLU
    roi_samples: int = 512  # RoIs per image in the loss
    roi_positive_share: float = 0.25
    roi_iou: float = 0.5
    roi_low_quality: bool = False  # (*) the best proposal of a true box goes to it: OV-LVIS has it, OV-COCO not
    roi_truth_keeps_label: bool = True  # (*) a true box among the RoIs stands for itself, whatever it overlaps
    roi_finest: float = 56.0  # (*) pixels; level 1 begins at twice this side; 0 = 14 cells of level 0
    roi_sampling: int = 0  # RoIAlign points per cell and axis; 0 = as many as the RoI's size asks for
    temperature: float = 50.0  # start value of the learned one
    temperature_kind: str = "linear"  # (*) what is learned: the temperature, or its logarithm ("log"); or "fixed"
    background_weight: float = 0.6  # in the classification loss
    # Masks.
    masks: bool = False
    mask_convs: int = 4
    mask_size: int = 14  # RoIAlign side; masks have twice that

    def rules(self) -> Iterator[Rule]:
        """What the types do not say."""
        kinds = ", ".join(f'"{kind}"' for kind in TEMPERATURES)
        blocks = "three block indices, one for each of levels 1 to 3"
        yield "model.blocks", self.blocks, len(self.blocks) == 3, blocks
        yield from anchor_rules(self)
        yield "model.temperature_kind", self.temperature_kind, self.temperature_kind in TEMPERATURES, f"one of {kinds}"
        yield from positive(
            "model", self, ("channels", "anchor_scale", "rpn_samples", "rpn_pre_nms", "rpn_post_nms", "box_size",
                            "roi_samples", "temperature", "mask_size")
        )  # fmt: skip
        yield from not_negative(
            "model", self, ("rpn_convs", "box_convs", "box_fcs", "box_own_fcs", "box_width", "roi_finest",
                            "roi_sampling", "background_weight", "mask_convs")
        )  # fmt: skip
        yield from shares(
            "model", self, ("rpn_positive_share", "rpn_positive_iou", "rpn_negative_iou", "rpn_nms",
                            "roi_positive_share", "roi_iou")
        )  # fmt: skip


@dataclass
class TestConfig:
    """Detection and score fusion: p = p_det^(1-w) * p_vlm^w."""

    __test__ = False  # not a test class

    batch_size: int = 1  # images per process
    score: float = 0.01  # smallest score kept
    nms: float = 0.4
    per_image: int = 100  # most detections
    vlm_weight_base: float = 0.1  # w of base classes (a)
    vlm_weight_novel: float = 0.8  # w of novel classes (b)
    vlm_temperature: float = 75.0
    vlm_boxes: str = "proposals"  # (*) what the VLM judges: "proposals", or the "refined" boxes
    temperature: float = 0.0  # of the detector's classifier; 0 = the learned one
    mask_threshold: float = 0.5
    mask_edges: str = "zero"  # (*) beyond its outer cells' centres a mask falls to 0; "repeated": it goes on

    def rules(self) -> Iterator[Rule]:
        """What the types do not say."""
        good = self.vlm_boxes in ("proposals", "refined")
        yield "test.vlm_boxes", self.vlm_boxes, good, '"proposals" or "refined"'
        yield from positive("test", self, ("batch_size", "per_image", "vlm_temperature"))
        yield from mask_rules(self)
        yield from not_negative("test", self, ("temperature",))
        yield from shares("test", self, ("score", "nms", "vlm_weight_base", "vlm_weight_novel"))


@dataclass
class FViTConfig(Config):
    """A whole config."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    test: TestConfig = field(default_factory=TestConfig)

    def check(self) -> Iterator[tuple[str, Any, bool, str]]:
        """Rules of all sections."""
        for section in (self.model, self.data, self.train, self.test):
            yield from section.rules()


# What the keys marked (*) were before there was a choice: files without a version were trained so.
UNVERSIONED: dict[str, dict[str, Any]] = {
    "model": {
        "rpn_norm": False,
        "anchor_offset": 0.5,
        "rpn_padding": False,
        "rpn_empty_counts_one": False,
        "box_own_fcs": 0,
        "box_limit_below": False,
        "embedding_relu": False,
        "roi_low_quality": False,
        "roi_truth_keeps_label": False,
        "roi_finest": 0.0,
        "temperature_kind": "log",
    },
    "data": {
        "resize": "bicubic",
        "pixels": "model",
        "padding": "black",
        "exif": False,
        "whole_target": False,
        "mask_centres": True,
        "by_orientation": False,
        "min_image_side": 0,
        "min_object_side": 0.0,
        "replace_thin": False,
    },
    "train": {"decay_all": False},
    "test": {"vlm_boxes": "refined", "mask_edges": "repeated"},
}
