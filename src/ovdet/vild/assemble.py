"""From a config to a detector with its vocabulary, the same for training, testing and the tools."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ovdet import files
from ovdet.clip import Clip, load_clip
from ovdet.config import config_from_dict, differing_settings, load_config, warn_of
from ovdet.data.annotations import read_json
from ovdet.library import LoadedDetector
from ovdet.sections import INPUT
from ovdet.vild.backbone import load_trunk
from ovdet.vild.config import VildConfig
from ovdet.vild.detector import Detector
from ovdet.vild.texts import attribute_table, class_table, read_synonyms
from ovdet.vocabulary import Vocabulary, free_vocabulary, training_labels
from training.engine.data.records import Annotations
from training.engine.errors import UserError, as_user_error

log = logging.getLogger(__name__)

FORMAT = "vild"
OBJECT = Vocabulary(("object",), (1,), (False,))  # of the network that proposes regions
# What a detector's weights go with: the network, and how its input is made; not what training started from.
GOES_WITH = {"model": (), "data": INPUT}
WHEREABOUTS = ("trunk_weights", "start")
NOBODY = {"name": "", "weights": "", "hash": ""}  # the teacher of a detector that has none


def read_config(path: str, overrides: Sequence[str]) -> VildConfig:
    """The config of a file and ``section.key=value`` overrides. UserError when it is faulty."""
    with as_user_error():
        return load_config(VildConfig, path, overrides)


def load_teacher(config: VildConfig, *, needed: bool = False) -> Clip | None:
    """The teacher of a config on the CPU; None for "supervised", which has none, unless ``needed``.

    Raises:
        UserError: unknown model, or weights that are missing or of another architecture.
    """
    if config.model.variant == "supervised" and not needed:
        return None
    teacher = config.teacher
    return load_clip(config, teacher.name, teacher.pretrained, teacher.cache_dir, seed=config.train.seed)


def learned(config: VildConfig, vocabulary: Vocabulary) -> Vocabulary:
    """Classes as training takes them: those of ``data.train_novel`` count as base, and all may be one class."""
    if config.data.single_class:
        return OBJECT
    if config.data.train_novel:
        return replace(vocabulary, novel=(False,) * len(vocabulary.names))
    return vocabulary


def learned_labels(config: VildConfig, annotations: Annotations, vocabulary: Vocabulary) -> np.ndarray:
    """Label of each annotated object in :func:`learned`'s classes, int64 ``[A]``; -1: it is not trained on.

    Args:
        vocabulary: all classes, with the novel ones marked.
    """
    everything = replace(vocabulary, novel=(False,) * len(vocabulary.names))
    labels = training_labels(annotations, everything if config.data.train_novel else vocabulary)
    return np.where(labels >= 0, 0, -1) if config.data.single_class else labels


def vocabulary_table(
    config: VildConfig, teacher: Clip, names: Sequence[str], *, device: torch.device, progress: bool = False
) -> Tensor:
    """Embeddings of classes ``[C, D]``, as the config asks for. Every process must call it.

    Raises:
        UserError: a file that does not fit, or no synonyms where they are asked for.
    """
    data, synonyms = config.data, None
    if data.prompts == "synonyms" and not data.embeddings:
        path = config.locate(data.val_annotations or data.train_annotations)
        synonyms = read_synonyms(read_json(path, "data.val_annotations"), path)
    return class_table(
        teacher, names, prompts=data.prompts, synonyms=synonyms, file=config.locate(data.embeddings), device=device,
        progress=progress,
    )  # fmt: skip


def make_detector(
    config: VildConfig, teacher: Clip | None, vocabulary: Vocabulary, *, device: torch.device, trained: bool = False,
    progress: bool = False,
) -> Detector:  # fmt: skip
    """A detector for a vocabulary, on a device; what has no weights yet starts from ``train.seed``.

    Every process must call it.

    Args:
        vocabulary: of :func:`learned`.
        trained: whether its weights are about to be loaded from a file, so that no others are needed.

    Raises:
        UserError: a trunk, start, embeddings or sizes that do not fit.
    """
    table = None
    if teacher is not None:
        table = vocabulary_table(config, teacher, vocabulary.names, device=device, progress=progress)
    width = len(vocabulary.names) if teacher is None else teacher.model.embed_dim
    start = "" if trained else config.model.start
    detector = build_detector(config, width, trained=trained or bool(start))
    if start:
        number = start_from(detector, config.locate(start))
        log.info("%.1f million weights are those of %s", number / 1e6, start)
    with as_user_error():
        detector.set_vocabulary(table, vocabulary.base_mask)
    return detector.to(device)


def build_detector(config: VildConfig, width: int, *, trained: bool = False) -> Detector:
    """A detector without a vocabulary.

    Args:
        width: D of the teacher's joint space; for "supervised" the number of classes.
        trained: see :func:`make_detector`.
    """
    model = config.model
    weights = "random" if trained else model.trunk_weights
    if weights not in ("", "random"):
        weights = config.locate(weights)
    trunk = load_trunk(
        model.trunk, weights, norm=model.trunk_norm, frozen=model.trunk_frozen, eps=model.norm_eps,
        momentum=model.norm_momentum, seed=config.train.seed,
    )  # fmt: skip
    with as_user_error():
        torch.manual_seed(config.train.seed)
        # Convolutions are faster so, those of many small regions above all.
        return Detector(config, trunk, width).to(memory_format=torch.channels_last)


def start_from(detector: Detector, path: str) -> int:
    """Take over the weights of another detector where names and shapes fit, such as those of the network that
    proposes regions; the second head of an ensemble starts like its first.

    Returns:
        Numbers taken over.

    Raises:
        UserError: a file that is missing or damaged, or whose trunk is another.
    """
    given = dict(files.load(path, (FORMAT,))["detector"])
    first = {name: value for name, value in given.items() if name.startswith("box_head.")}
    given = {name.replace("box_head.", "image_head.", 1): value for name, value in first.items()} | given
    own = detector.state_dict()
    fitting = {name: given[name] for name in own if name in given and given[name].shape == own[name].shape}
    other = [name for name in own if name.startswith("backbone.") and name not in fitting]
    if other:
        raise UserError(f"model.start {path}: its trunk is another one (no {other[0]}); give one of model.trunk")
    detector.load_state_dict(fitting, strict=False)
    return sum(value.numel() for value in fitting.values())


# -- detector files ---------------------------------------------------------------------------------------------------


def config_of_checkpoint(content: dict[str, Any], path: str, overrides: Sequence[str] = ()) -> VildConfig:
    """The config that a detector was trained with. UserError when it, or an override, is faulty."""
    with as_user_error():
        return config_from_dict(
            VildConfig, content["config"], source=f"checkpoint {path}", near=path, overrides=overrides
        )


def check_teacher(content: dict[str, Any], teacher: Clip | None, path: str) -> None:
    """UserError where a detector was trained with another teacher than that at hand."""
    trained, mine = content["vit"], NOBODY if teacher is None else teacher.identity
    if any(trained.get(key) != mine.get(key) for key in ("name", "hash", "architecture")):
        raise UserError(
            f"checkpoint {path} was trained with the teacher {trained['name'] or '(none)'} ({trained['weights']}), "
            f"not with {mine['name'] or '(none)'} ({mine['weights']}): give the same one (teacher.name, "
            "teacher.pretrained, teacher.cache_dir; for random weights train.seed)"
        )


def load_into(path: str, detector: Detector, config: VildConfig, teacher: Clip | None) -> dict[str, Any]:
    """Load a detector file into a detector that a config describes; returns the file's content.

    Raises:
        UserError: missing, damaged, of another architecture, or trained with another teacher.
    """
    content = files.load(path, (FORMAT,))
    check_teacher(content, teacher, path)
    _put(content, detector, config, path)
    return content


def _put(content: dict[str, Any], detector: Detector, config: VildConfig, path: str) -> None:
    """Put a file's weights into a detector, and say in which settings the two differ."""
    differing = differing_settings(config_of_checkpoint(content, path), config, GOES_WITH, WHEREABOUTS)
    try:
        detector.load_trainable_state_dict(content["detector"])
    except ValueError as error:
        settings = f", that is with {' '.join(differing)}" if differing else ""
        raise UserError(f"checkpoint {path}: {error}{settings}") from error
    warn_of(differing, path)


def open_detector(
    content: dict[str, Any], path: str, device: torch.device, config_file: str | None, overrides: Sequence[str] = ()
) -> LoadedDetector:
    """A detector file's content as :func:`ovdet.load_detector` gives it.

    Raises:
        UserError: a faulty config, or a teacher whose weights are missing or others.
    """
    overrides = [*overrides, 'data.embeddings=""']
    config = read_config(config_file, overrides) if config_file else config_of_checkpoint(content, path, overrides)
    teacher = load_teacher(config)
    check_teacher(content, teacher, path)
    own = files.class_order(content)
    detector = build_detector(config, len(own) if teacher is None else teacher.model.embed_dim, trained=True)
    _put(content, detector, config, path)
    detector = detector.to(device).eval()
    if config.data.prompts == "synonyms":
        config.data.prompts = "ensemble"  # names of one's own have none

    def set_classes(names: Sequence[str]) -> None:
        vocabulary = free_vocabulary(names, content["base"])
        if teacher is None:
            if list(names) != own:
                raise UserError(f"checkpoint {path} is of a supervised detector: it detects {', '.join(own)} alone")
            detector.set_vocabulary(None, vocabulary.base_mask)
            return
        table = vocabulary_table(config, teacher, names, device=device, progress=True)
        detector.set_vocabulary(table, vocabulary.base_mask)

    def set_attributes(attributes: Sequence[str]) -> None:
        table = None
        if attributes:
            table = attribute_table(
                teacher, attributes, text=config.test.attribute_text, prompts=config.data.prompts, device=device
            )
        detector.set_attributes(table)

    return LoadedDetector(
        detector, config, set_classes, device=device, base=content["base"], novel=content["novel"],
        set_attributes=None if teacher is None else set_attributes,
    )  # fmt: skip
