"""From a config and a checkpoint to a model that is ready, the same for training, testing and the tools."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ovdet.config import config_from_dict, differing_settings, load_config, warn_of
from ovdet.glip import files
from ovdet.glip.build import build_glip, load_clip, load_start_weights, make_tokenizer
from ovdet.glip.config import GlipConfig
from ovdet.glip.library import Grounder
from ovdet.glip.model import GLIP
from training.engine.errors import UserError, as_user_error

log = logging.getLogger(__name__)

# What a model's weights go with; not what training started from, nor what it left out at random.
GOES_WITH = {"image": (), "text": (), "head": (), "data": ("exif",)}
TRAINING = ("weights", "frozen", "freeze_at", "drop_block", "drop_path", "dropout", "fusion_dropout", "text_dropout")


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> GlipConfig:
    """The config of a file and ``section.key=value`` overrides. UserError where it is faulty."""
    with as_user_error():
        return load_config(GlipConfig, path, overrides)


def config_of_checkpoint(path: str | Path, overrides: Sequence[str] = ()) -> GlipConfig:
    """The config that a file of this program was trained with.

    Raises:
        UserError: the file holds none (released files do not), or an override is faulty.
    """
    content = files.read_file(path, "checkpoint")
    if content.get("format") != files.FORMAT:
        raise UserError(
            f"checkpoint {path} holds no config: name it (--config; GLIP/configs has the published variants)"
        )
    return _config_in(content, path, overrides)


def _config_in(content: dict[str, Any], path: str | Path, overrides: Sequence[str] = ()) -> GlipConfig:
    with as_user_error():
        return config_from_dict(GlipConfig, content["config"], source=str(path), near=str(path), overrides=overrides)


def config_for(checkpoint: str | Path, file: str | Path | None, overrides: Sequence[str] = ()) -> GlipConfig:
    """The config to use a checkpoint with: that of a file where one is named, else :func:`config_of_checkpoint`."""
    return read_config(file, overrides) if file else config_of_checkpoint(checkpoint, overrides)


def start_model(config: GlipConfig) -> GLIP:
    """The model that a training starts from, on the CPU: ``model.weights``, or encoders with weights of their own.

    Raises:
        UserError: no weights are named, or they are missing or do not fit.
    """
    model = _build(config)
    if config.model.weights:
        files.load_whole(model, config.locate(config.model.weights))
    else:
        load_start_weights(model, config)
    return model


def load_model(config: GlipConfig, checkpoint: str | Path, *, ema: bool = False) -> GLIP:
    """A trained model in eval mode, on the CPU.

    Args:
        config: the variant; for a file that holds only what was trained, also the weights that it was trained on.
        checkpoint: a file in any layout.
        ema: the averaged weights that training kept beside the others.

    Raises:
        UserError: missing, damaged, or of another variant or other weights.
    """
    content = files.read_file(checkpoint, "checkpoint")
    if content.get("format") == files.FORMAT:
        warn_of(differing_settings(_config_in(content, checkpoint), config, GOES_WITH, TRAINING), checkpoint)
    if content.get("format") == files.FORMAT and content.get("base"):
        model = start_model(config)
        if ema:
            content = {**content, "model": files.state_of(content, checkpoint, ema=True)}
        files.load_part(model, content, checkpoint)
    else:
        model = _build(config)
        files.load_whole(model, checkpoint, ema=ema, key="checkpoint")
    return model.eval()


def _build(config: GlipConfig) -> GLIP:
    torch.manual_seed(config.train.seed)
    clip = load_clip(config)
    tokenizer = make_tokenizer(config, clip)
    torch.manual_seed(config.train.seed)
    return build_glip(config, tokenizer, clip=clip)


def open_detector(
    content: dict[str, Any], path: str, device: torch.device, config_file: str | None, overrides: Sequence[str] = ()
) -> Grounder:
    """A file of this program as :func:`ovdet.load_detector` gives it.

    Raises:
        UserError: a faulty config, or weights that are missing or others.
    """
    config = config_for(path, config_file, overrides)
    return Grounder(load_model(config, path).to(device), config, device)


def load_published(
    path: str | Path, config: str | Path, overrides: Sequence[str] = (), *, device: str | None = None
) -> Grounder:
    """A released GLIP, or one of MMDetection, ready to use.

    Args:
        path: the ``.pth`` file; config: of its variant, see ``GLIP/configs``.

    Raises:
        UserError: see :func:`load_model`.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    made = read_config(config, overrides)
    return Grounder(load_model(made, path).to(place), made, place)
