"""Detector files: what was trained, and which ViT it was trained on; written whole or not at all."""

from __future__ import annotations

import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from ovdet.errors import UserError

log = logging.getLogger(__name__)

LATEST = "latest.pt"
FORMAT = "fvit"
VERSION = 1  # of the names and the config; files written before there were versions have none
_RENAMED = {"box_head.log_temperature": "classifier.log_temperature"}  # in files without a version


def save(content: dict[str, Any], path: Path) -> None:
    """``torch.save`` beside the place, flushed to disk, then renamed; a failure leaves the old file.

    Raises:
        UserError: the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"checkpoint {path} cannot be written ({reason}): free some space or choose another --work-dir"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path) -> dict[str, Any]:
    """A detector file as :func:`save` wrote it. Nothing in it is executed, and its checksums are verified.

    Raises:
        UserError: missing, damaged, or no detector file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: give a detector file that train.py wrote")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip and pickle raise a dozen kinds for damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
        raise UserError(f"checkpoint {path} is damaged or no detector file ({reason}): use another one") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"checkpoint {path} is no detector file: ViT weights belong into model.cache_dir of the config")
    return content


def detector_content(
    detector: torch.nn.Module, *, vit: dict[str, str], config: dict[str, Any], base: list[str], novel: list[str]
) -> dict[str, Any]:
    """A small detector file: the trained parts, the ViT by name and hash, the config, the class names."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "detector": detector.trainable_state_dict(),
        "vit": vit,
        "config": config,
        "base": base,
        "novel": novel,
    }


def version_of(content: dict[str, Any]) -> int:
    """Version of a detector file: 0 where it was written before there were versions."""
    return int(content.get("version", 0))


def detector_state(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """State of the trained parts of a detector file, under the names of today."""
    state = content["detector"]
    if version_of(content) == 0:
        state = {_RENAMED.get(name, name): value for name, value in state.items()}
    return state


def check_vit(content: dict[str, Any], vit: dict[str, str], path: str | Path) -> None:
    """See that a detector meets the ViT that it was trained on.

    Args:
        vit: ``name`` (of the model), ``weights`` (where they come from) and ``hash`` of the ViT at hand.

    Raises:
        UserError: another one.
    """
    trained = content["vit"]
    if trained["name"] != vit["name"]:
        raise UserError(
            f"checkpoint {path} was trained on {trained['name']}, but model.name is {vit['name']}: use its own config"
        )
    if trained["hash"] != vit["hash"]:
        raise UserError(
            f"checkpoint {path} was trained on other weights of {vit['name']} ({trained['weights']}) than those "
            f"at hand ({vit['weights']}): give the same ones (model.pretrained, model.cache_dir; for "
            "random weights train.seed)"
        )
