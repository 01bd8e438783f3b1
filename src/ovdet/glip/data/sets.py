"""Data set files: what a training set is and where it lies, one TOML file each.

[set]
kind = "grounding"            # "detection", "grounding" or "captions"
annotations = "mdetr_annotations/final_flickr_separateGT_train.json"
images = "flickr30k/flickr30k_images/train"
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ovdet.config import Config, load_config
from ovdet.data.annotations import check_image_root
from ovdet.glip.config import GlipConfig
from ovdet.glip.data.captions import load_captions
from ovdet.glip.data.classes import ClassTexts, class_prompts
from ovdet.glip.data.grounding import load_grounding
from ovdet.glip.data.sources import DetectionSource, GroundingSource, Source
from ovdet.glip.data.tsv import load_tsv
from ovdet.glip.prompts import ClassPrompt, read_class_prompts
from ovdet.glip.tokens import Tokenizer
from ovdet.sections import Rule, not_negative, positive, shares
from training.engine.data.annotations import load_annotations
from training.engine.errors import UserError, as_user_error

log = logging.getLogger(__name__)

KINDS = ("detection", "grounding", "captions")


@dataclass
class SetSection:
    """One training set."""

    kind: str = "detection"
    annotations: str = ""  # COCO-style json; captions: .json, .jsonl, a folder of shards, or the .yaml of a TSV set
    images: str = ""  # image root; empty for TSV sets
    folders: list[str] = field(default_factory=list)  # "source=folder below images" of a mixed grounding set
    copies: int = 1  # how often the set counts in an epoch
    # Detection.
    negatives: int = 0  # class names besides those present (85 in pre-training); 0: all classes, always
    full: float = 0.5  # share of images that ask for all negatives
    shuffle: bool = False  # the order of all classes
    names: list[str] = field(default_factory=list)  # other words for the classes, in the order of their ids
    prompts: str = ""  # json of prefix, name and suffix of each class
    shots: int = 0  # images for each class; 0: all
    shot_seed: int = 3  # -1 offers images by ascending id
    keep_empty: bool = False  # images without objects as well
    # Captions.
    score: float = 0.0  # boxes must exceed it
    overlap: float = -1.0  # IoU of NMS within a phrase; negative: none
    packing: bool = False  # other captions around an image's own

    def rules(self) -> Iterator[Rule]:
        """What the types do not say."""
        yield "set.kind", self.kind, self.kind in KINDS, " or ".join(f'"{k}"' for k in KINDS)
        yield "set.annotations", self.annotations, bool(self.annotations), "the path of a file"
        clash = not (self.prompts and (self.shuffle or self.names))
        yield "set.prompts", self.prompts, clash, "given without set.shuffle and set.names"
        pairs = all("=" in pair for pair in self.folders)
        yield "set.folders", self.folders, pairs, 'pairs of the form "source=folder"'
        yield "set.overlap", self.overlap, self.overlap < 1 and not math.isnan(self.overlap), "below 1"
        yield "set.shot_seed", self.shot_seed, self.shot_seed >= -1, "-1 or more"
        yield from positive("set", self, ("copies",))
        yield from not_negative("set", self, ("negatives", "shots", "score"))
        yield from shares("set", self, ("full",))


@dataclass
class SetConfig(Config):
    """A data set file."""

    set: SetSection = field(default_factory=SetSection)

    def check(self) -> Iterator[tuple[str, Any, bool, str]]:
        yield from self.set.rules()


def training_sets(config: GlipConfig) -> list[SetConfig]:
    """The training sets of a config: its data set files, or the one set that it names itself.

    Raises:
        UserError: none, both, or a faulty file.
    """
    data = config.data
    if bool(data.train_sets) == bool(data.train_annotations):
        what = "both data.train_sets and" if data.train_sets else "neither data.train_sets nor"
        raise UserError(f"{config.path or 'config'}: {what} data.train_annotations is set: give one of them")
    if data.train_sets:
        with as_user_error():
            return [load_config(SetConfig, config.locate(path)) for path in data.train_sets]
    section = SetSection(
        annotations=data.train_annotations, images=data.train_images, negatives=data.negatives, shuffle=data.shuffle,
        names=data.names, prompts=data.prompts, shots=data.shots, shot_seed=data.shot_seed, copies=data.copies,
    )  # fmt: skip
    return [SetConfig(path=config.path, set=section)]


def written_classes(names: list[str], prompts: str, classes: list[str], key: str) -> list[ClassPrompt] | None:
    """Prompts of classes where a config gives some; None for their own names.

    Raises:
        UserError: another number of names, or a faulty file.
    """
    if prompts:
        return read_class_prompts(prompts, classes)
    if not names:
        return None
    if len(names) != len(classes):
        raise UserError(f"{key}: {len(names)} names for {len(classes)} classes: give one for each, in their order")
    return [ClassPrompt(name) for name in names]


def open_set(config: SetConfig, tokenizer: Tokenizer) -> Source:
    """Read a set's annotations, and look whether its images are there.

    Raises:
        UserError: missing or faulty files.
    """
    section, key = config.set, f"{config.path or 'config'}: set.annotations"
    path, root = config.locate(section.annotations), config.locate(section.images)
    if section.kind == "detection":
        data = load_annotations(path, flag=key, labelled=True)
        check_image_root(data, root, key=f"{config.path or 'config'}: set.images")
        prompts = config.locate(section.prompts)
        written = written_classes(section.names, prompts, data.names, f"{config.path or 'config'}: set.names")
        texts = ClassTexts(
            class_prompts(data.category_ids.tolist(), data.names, written), tokenizer, negatives=section.negatives,
            full=section.full, shuffle=section.shuffle, key=key,
        )  # fmt: skip
        seed = section.shot_seed if section.shot_seed >= 0 else None
        source = DetectionSource(
            data, root=root, texts=texts, shots=section.shots, shot_seed=seed, keep_empty=section.keep_empty, key=key
        )
        if section.shots:
            log.info("%s: %d images for %d shots, seed %s", path, len(source), section.shots, seed)
        return source
    pictures = None
    if section.kind == "grounding":
        folders = dict(pair.split("=", 1) for pair in section.folders)
        records = load_grounding(path, key=key, folders=folders)
    elif Path(path).suffix in (".yaml", ".yml"):
        records, pictures = load_tsv(path, key=key, score=section.score, overlap=section.overlap)
    else:
        records = load_captions(path, key=key, score=section.score, overlap=section.overlap)
    return GroundingSource(records, root=root, tokenizer=tokenizer, packing=section.packing, pictures=pictures, key=key)
