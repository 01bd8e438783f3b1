"""From a config to a detector with its vocabulary, the same for training, testing and the tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ovdet import files as checkpoint
from ovdet.clip import Clip, load_clip
from ovdet.config import config_from_dict, differing_settings, load_config, warn_of
from ovdet.fvit.config import UNVERSIONED, FViTConfig
from ovdet.fvit.detector import Detector, build_detector
from ovdet.library import LoadedDetector
from ovdet.sections import INPUT
from ovdet.vocabulary import Vocabulary, free_vocabulary, vocabulary_embeddings
from training.engine.errors import UserError, as_user_error

# What a detector's weights go with: the network, and how its input is made. Which ViT it is its hash says.
GOES_WITH = {"model": (), "data": INPUT}
WHEREABOUTS = ("name", "pretrained", "cache_dir")


def read_config(path: str, overrides: Sequence[str]) -> FViTConfig:
    """The config of a file and ``section.key=value`` overrides. UserError when it is faulty."""
    with as_user_error():
        return load_config(FViTConfig, path, overrides)


def load_vit(config: FViTConfig) -> Clip:
    """The CLIP model of a config; see :func:`ovdet.clip.load_clip`."""
    model = config.model
    return load_clip(config, model.name, model.pretrained, model.cache_dir, seed=config.train.seed)


def make_detector(
    config: FViTConfig, vit: Clip, vocabulary: Vocabulary, *, device: torch.device, progress: bool = False
) -> Detector:
    """A detector for a vocabulary, on a device; its trainable parts start from ``train.seed``.

    Every process must call it. Raises UserError for embeddings or sizes that do not fit.
    """
    embeddings = vocabulary_embeddings(
        config, vit.model, vit.tokenizer, vocabulary.names, device=device, progress=progress
    )
    with as_user_error():
        torch.manual_seed(config.train.seed)
        return build_detector(config, vit.model, embeddings, vocabulary.base_mask).to(device)


def config_of_checkpoint(content: dict[str, Any], path: str, overrides: Sequence[str] = ()) -> FViTConfig:
    """The config that a detector was trained with. UserError when it, or an override, is faulty."""
    values = content["config"]
    if checkpoint.version_of(content) == 0:
        values = {name: {**UNVERSIONED.get(name, {}), **section} for name, section in values.items()}
    with as_user_error():
        return config_from_dict(FViTConfig, values, source=f"checkpoint {path}", near=path, overrides=overrides)


def _differing(content: dict[str, Any], path: str, config: FViTConfig) -> list[str]:
    return differing_settings(config_of_checkpoint(content, path), config, GOES_WITH, WHEREABOUTS)


def load_into(path: str, detector: Detector, config: FViTConfig, vit: Clip) -> dict[str, Any]:
    """Load a detector file into a detector that a config describes; returns the file's content.

    Raises:
        UserError: missing, damaged, of another architecture, or trained on another ViT.
    """
    content = checkpoint.load(path)
    checkpoint.check_vit(content, vit.identity, vit.model, path)
    differing = _differing(content, path, config)
    try:
        detector.load_trainable_state_dict(checkpoint.detector_state(content))
    except ValueError as error:
        settings = f", that is with {' '.join(differing)}" if differing else ""
        raise UserError(f"checkpoint {path}: {error}{settings}") from error
    warn_of(differing, path)
    return content


def open_detector(
    content: dict[str, Any], path: str, device: torch.device, config_file: str | None, overrides: Sequence[str] = ()
) -> LoadedDetector:
    """A detector file's content as :func:`ovdet.load_detector` gives it.

    Raises:
        UserError: a faulty config, or a ViT whose weights are missing or others.
    """
    overrides = [*overrides, 'data.embeddings=""']
    config = read_config(config_file, overrides) if config_file else config_of_checkpoint(content, path, overrides)
    vit = load_vit(config)
    checkpoint.check_vit(content, vit.identity, vit.model, path)
    warn_of(_differing(content, path, config), path)
    with as_user_error():
        # Until classes are chosen there are none.
        nothing = torch.ones(2, vit.model.visual.embed_dim)
        detector = build_detector(config, vit.model, nothing, torch.ones(1, dtype=torch.bool))
        detector.load_trainable_state_dict(checkpoint.detector_state(content))
    detector = detector.to(device).eval()

    def set_classes(names: Sequence[str]) -> None:
        vocabulary = free_vocabulary(names, content["base"])
        embeddings = vocabulary_embeddings(config, vit.model, vit.tokenizer, names, device=device, progress=True)
        detector.set_vocabulary(embeddings, vocabulary.base_mask)

    return LoadedDetector(
        detector, config, set_classes, device=device, base=content["base"], novel=content["novel"]
    )  # fmt: skip
