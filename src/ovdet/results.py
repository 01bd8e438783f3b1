"""Folders of results: what a test depends on is written beside them, and results of another test are never replaced."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ovdet.config import Config, config_to_dict
from training.engine.checkpoint import weights_hash
from training.engine.data.keyed import NAME, check_key, write_key, writing
from training.engine.distributed import on_master
from training.engine.errors import UserError
from training.engine.files import checksum, write_json

METRICS = "metrics.json"
# Where weights and what is learned from lie: the weights themselves are in the key.
_WHEREABOUTS = ("weights", "pretrained", "cache_dir", "start", "trunk_weights", "proposals", "store")
# What changes no result, or its last digits.
_IDLE = ("data.workers", "data.max_skipped", "test.batch_size", "teacher.batch_size", "train.log_every",
         "train.save_every")  # fmt: skip
# Of sections "train" and "data": what matters for a detector that is trained on the way, not for one that is tested.
_OF_TRAINING = ("train.", "data.train_")
_TESTED_WITH = "train.precision"
# Values that name files: the key holds what is in them. Elsewhere they are the same, and other content is another test.
_FILES = ("val_annotations", "train_annotations", "embeddings", "prompts", "knowledge")
_FOLDERS = ("val_images", "train_images", "sentences")
_LONG = 100  # characters of a value in a message


def default_folder(checkpoint: str | Path, *parts: str | None) -> Path:
    """Where results go by default: beside the checkpoint, named by it and by what it is tested with.

    ``epoch_3.pt`` with the parts ``"ov_coco"`` and ``"clip"``: ``epoch_3_ov_coco_clip_test``.
    """
    file = Path(checkpoint)
    return file.parent / "_".join([file.stem, *(part for part in parts if part), "test"])


def settings_of(config: Config, *, training: bool = False) -> dict[str, Any]:
    """Values of a config that results depend on, by ``section.key``, as json gives them back.

    Args:
        training: those of training as well, for results of a detector that is trained on the way.
    """
    found = {}
    for section, values in config_to_dict(config).items():
        for key, value in values.items():
            name = f"{section}.{key}"
            of_training = name.startswith(_OF_TRAINING) and name != _TESTED_WITH
            if key not in _WHEREABOUTS and name not in _IDLE and (training or not of_training):
                found[name] = _told(config, key, value)
    return found


def key_of(config: Config, state: Mapping[str, Tensor], **more: Any) -> dict[str, Any]:
    """Everything that a test's results depend on: the detector's weights, the config's settings, and more."""
    return {"weights": weights_hash(dict(state)), **more, **settings_of(config)}


def claim(folder: Path, config: Config, state: Mapping[str, Tensor], **more: Any) -> None:
    """See that a folder holds no results of another test, and say in it whose results it is for.

    Every process calls it, before anything is detected. The same test's results are replaced.

    Args:
        state, more: see :func:`key_of`.

    Raises:
        UserError: the folder holds another test's results, is a file, or cannot be written.
    """
    on_master(lambda: _claim(folder, key_of(config, state, **more)))


def write_metrics(folder: Path, metrics: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> None:
    """Write ``metrics.json``; what was tested stands in it as ``run``. UserError where that cannot be done."""
    write_json(folder / METRICS, dict(metrics) if about is None else {**metrics, "run": dict(about)})


def _claim(folder: Path, key: dict[str, Any]) -> None:
    where = f"--out {folder}"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{where} is a file: give a folder")
    results = (folder / METRICS).is_file() or any(folder.glob("results.*.json"))
    keyed = (folder / NAME).is_file()
    if results and not keyed:
        raise UserError(
            f"{where} holds results of another run (there is no {NAME} that says whose): give another folder, or "
            "delete this one"
        )
    # A key alone is of a test that was interrupted, and nothing is lost; among other files it may be a store's.
    if keyed and any(f.name != NAME and not f.name.startswith(".") for f in folder.iterdir()):
        check_key(folder, key, where)
    with writing(where):
        write_key(folder, key)


def _told(config: Config, key: str, value: Any) -> Any:
    """A value as it stands in a key."""
    if isinstance(value, str) and value:
        path = Path(config.locate(value))
        if key in _FILES and path.is_file():
            return f"{path.name} ({checksum(path)[:16]})"
        return str(path.resolve()) if key in _FOLDERS and path.is_dir() else value
    text = json.dumps(value)
    if len(text) <= _LONG:
        return value
    return f"{len(value)} values ({hashlib.blake2b(text.encode(), digest_size=8).hexdigest()})"
