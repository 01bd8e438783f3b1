"""Detector files: what was trained, and which ViT it was trained on; written whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from open_clip import CLIP
from open_clip.weights import export_state_dict
from training.engine.checkpoint import read_file, save_atomically, weights_hash
from training.engine.errors import UserError

FORMAT = "fvit"
_ENTRIES = ("detector", "vit", "config", "base", "novel")
NEEDED = {"fvit": _ENTRIES, "vild": _ENTRIES}  # entries of a file, by format
VERSION = 1  # of the names and the config; files written before there were versions have none
_RENAMED = {"box_head.log_temperature": "classifier.log_temperature"}  # in files without a version


def save(content: dict[str, Any], path: Path) -> None:
    """Write a detector file. UserError where the disk is full or not writable; an older file is left as it was."""
    save_atomically(content, path, "--work-dir")


def load(path: str | Path, kinds: tuple[str, ...] = (FORMAT,)) -> dict[str, Any]:
    """A detector file. Nothing in it is executed, and its checksums are verified.

    Args:
        kinds: formats that are taken.

    Raises:
        UserError: missing, damaged, or no detector file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: give a detector file that train.py wrote")
    content = read_file(path)
    if not isinstance(content, dict) or content.get("format") not in kinds:
        hint = "give the ViT's weights as model.cache_dir of the config"
        if isinstance(content, dict) and "state_dict" in content:
            hint = f"a published .pth is converted by tools/convert_detector.py CONFIG {path} OUT.pt, and {hint}"
        raise UserError(f"checkpoint {path} is no detector file: {hint}")
    missing = [key for key in NEEDED.get(content["format"], ()) if key not in content]
    if missing:
        raise UserError(f"checkpoint {path} has no {', '.join(missing)}: it is damaged, use another one")
    if version_of(content) > VERSION:
        raise UserError(f"checkpoint {path} was written by a newer version of this program: update it")
    return content


def version_of(content: dict[str, Any]) -> int:
    """Version of a detector file: 0 where it was written before there were versions."""
    version = content.get("version", 0)
    return version if isinstance(version, int) else 0


def detector_state(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """State of the trained parts of a detector file, under the names of today."""
    state = content["detector"]
    if version_of(content) == 0:
        state = {_RENAMED.get(name, name): value for name, value in state.items()}
    return state


def detector_content(
    detector: torch.nn.Module,
    *,
    vit: dict[str, str],
    config: dict[str, Any],
    names: Sequence[str],
    novel: Sequence[bool],
    kind: str = FORMAT,
) -> dict[str, Any]:
    """A small detector file: the trained parts, the ViT by name and hash, the config, the class names in label order.

    Args:
        vit: of the frozen ViT, or of the teacher.
        names: of the classes, in label order; novel: which of them had no labels in training.
    """
    sides = {side: [n for n, own in zip(names, novel, strict=True) if bool(own) == side] for side in (False, True)}
    return {
        "format": kind,
        "version": VERSION,
        "detector": detector.trainable_state_dict(),
        "vit": vit,
        "config": config,
        "classes": list(names),
        "base": sides[False],
        "novel": sides[True],
    }


def check_state(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    """ValueError where a detector's state lacks entries, has unknown ones, or some of another shape."""
    problems = {
        "lacks": sorted(own.keys() - state.keys()),
        "has unknown": sorted(state.keys() - own.keys()),
        "has other shapes of": sorted(
            name for name in own.keys() & state.keys() if own[name].shape != state[name].shape
        ),
    }
    for what, names in problems.items():
        if names:
            raise ValueError(
                f"the detector's state {what} {', '.join(names[:3])} ({len(names)} in all): "
                "use the config that it was trained with"
            )


def class_order(content: dict[str, Any]) -> list[str]:
    """Classes of a detector file in label order; former files tell base classes and novel ones, each in order."""
    return list(content.get("classes") or [*content["base"], *content["novel"]])


# -- the ViT ----------------------------------------------------------------------------------------------------------


def vit_hash(clip: CLIP) -> str:
    """SHA-256 of an image tower's weights in the layout in which the published code keeps them.

    Not under the names of our modules: a detector must find its ViT again after a module has been renamed.
    """
    state = {f"visual.{name}": value for name, value in clip.visual.state_dict().items()}
    return weights_hash(export_state_dict(clip, state=state))


def former_vit_hash(clip: CLIP) -> str:
    """The same as files without a version have it: over names, types and shapes of the tower's own modules."""
    digest = hashlib.sha256()
    for name, value in sorted(clip.visual.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_vit(content: dict[str, Any], vit: dict[str, str], clip: CLIP, path: str | Path) -> None:
    """See that a detector meets the ViT that it was trained on.

    Args:
        vit: ``name`` (of the model), ``weights`` (where they come from) and ``hash`` of the ViT at hand.
        clip: the model at hand, for files whose hash is of the former kind.

    Raises:
        UserError: another one.
    """
    trained = content["vit"]
    if trained["name"] != vit["name"]:
        raise UserError(
            f"checkpoint {path} was trained on {trained['name']}, but model.name is {vit['name']}: use its own config"
        )
    if trained.get("architecture", vit.get("architecture")) != vit.get("architecture"):
        raise UserError(
            f"checkpoint {path} was trained on {trained['name']} of another architecture (activation, heads, norms, "
            "positions): use the model config that it was trained with"
        )
    at_hand = vit["hash"] if version_of(content) else former_vit_hash(clip)
    if trained["hash"] != at_hand:
        raise UserError(
            f"checkpoint {path} was trained on other weights of {vit['name']} ({trained['weights']}) than those "
            f"at hand ({vit['weights']}): give the same ones (model.pretrained, model.cache_dir; for "
            "random weights train.seed)"
        )
