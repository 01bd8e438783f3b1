"""GLIP files: whole models in any layout, and small ones that hold only what was trained.

A file of this program is a dict with ``format`` ("glip"), ``config``, ``model`` (a state), and, where the state is a
part of the network, ``base``: which weights the rest has, by hash.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ovdet.config import config_to_dict
from ovdet.glip import names
from ovdet.glip.config import GlipConfig
from training.engine.checkpoint import weights_hash
from training.engine.errors import UserError

log = logging.getLogger(__name__)

FORMAT = "glip"
# What a whole file may lack: MMDetection's drop the classifier, and prompt tuning begins without a table.
_OPTIONAL = ("head.cls_logits.weight", "head.cls_logits.bias", "prompt")


def read_file(path: str | Path, key: str = "model.weights") -> dict[str, Any]:
    """Content of a torch or safetensors file: a dict, nothing in it executed. Large files are mapped, not read.

    Args:
        key: where the path comes from, for messages.

    Raises:
        UserError: missing, damaged, or nothing that can be read without running code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{key} {path}: no such file; give a GLIP checkpoint")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(str(path))
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)  # the format before zip
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{key} {path}: holds more than tensors and numbers, or is no checkpoint; save its state_dict alone"
        ) from error
    except Exception as error:  # zip, pickle and safetensors raise a dozen kinds for damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{key} {path}: cannot be read ({reason}); fetch it anew") from error
    if not isinstance(content, dict):
        raise UserError(f"{key} {path}: holds no weights by name; give a GLIP checkpoint")
    return content


def state_of(content: Mapping[str, Any], path: str | Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The weights in a file's content.

    Args:
        ema: the averaged weights that training kept beside the others (``model_ema``).

    Raises:
        UserError: there are none.
    """
    if ema:
        state = content.get("model_ema")
        if not isinstance(state, Mapping):
            raise UserError(f"{path}: holds no averaged weights (model_ema); leave the average out")
    else:
        state = next((content[k] for k in ("model", "state_dict") if isinstance(content.get(k), Mapping)), content)
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{path}: holds no weights; give a GLIP checkpoint")
    return state


def load_whole(model: nn.Module, path: str | Path, *, ema: bool = False, key: str = "model.weights") -> str:
    """Load a complete file of any layout, strictly. Returns the layout.

    Raises:
        UserError: see :func:`read_file`; or another variant.
    """
    content = read_file(path, key)
    if content.get("format") == FORMAT and content.get("base"):
        raise UserError(
            f"{key} {path}: holds only what was trained; give it as the checkpoint, and its base as weights"
        )
    state = state_of(content, path, ema=ema)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    try:
        fitting, layout = names.read_state(state, shapes, fusion=model.head.options.fusion, optional=_OPTIONAL)
    except ValueError as error:
        raise UserError(f"{key} {path}: {error}") from error
    model.load_state_dict(fitting, strict=False)
    log.info("%s: %d tensors (%s layout)", path, len(fitting), layout)
    return layout


def rest_hash(model: nn.Module, part: Iterable[str]) -> str:
    """Hash of a model's state without the entries of ``part``."""
    part = set(part)
    return weights_hash({name: value for name, value in model.state_dict().items() if name not in part})


def content_of(
    model: nn.Module, config: GlipConfig, *, part: Iterable[str] | None = None, base_hash: str | None = None
) -> dict[str, Any]:
    """What a file of this program holds.

    Args:
        part: names of the parameters to keep, where the others are those of ``model.weights`` (or of the towers);
            None keeps everything.
        base_hash: of these others, see :func:`rest_hash`; computed if None.
    """
    state = model.state_dict()
    if part is not None:
        part = set(part)
        base = {"weights": config.model.weights or config.clip.pretrained, "hash": base_hash or rest_hash(model, part)}
        state = {name: value for name, value in state.items() if name in part}
    else:
        base = None
    return {"format": FORMAT, "config": config_to_dict(config), "model": state, "base": base}


def load_part(model: nn.Module, content: Mapping[str, Any], path: str | Path) -> None:
    """Load a file that holds what was trained into a model that has the rest already.

    Raises:
        UserError: the rest is another one, or parameters are unknown here.
    """
    state, base = content["model"], content["base"]
    own = model.state_dict()
    wrong = [name for name, value in state.items() if name not in own or own[name].shape != value.shape]
    if wrong:
        raise UserError(
            f"{path}: {wrong[0]} ({len(wrong)} in all) does not fit: use the config that it was trained with"
        )
    if rest_hash(model, state) != base["hash"]:
        raise UserError(
            f'{path}: was trained on other weights ("{base["weights"]}") than those at hand: give the same ones '
            "(model.weights, clip.pretrained)"
        )
    model.load_state_dict(dict(state), strict=False)
