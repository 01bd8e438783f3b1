"""Dense readings of an image tower, by name.

======================  ====================================================================================
``value``               value path of the last block: MaskCLIP's release, CLIPSelf, RegionCLIP, CLIM, FG-CLIP
``value_bare``          the same without residual and MLP
``vanilla`` (``_bare``) ordinary last block
``tokens``              ordinary blocks and final norm, not projected: foundation models, UniRefiner
``sclip`` (``_bare``)   SCLIP
``clearclip``           ClearCLIP (``clearclip_full``: with residual and MLP)
``kk_bare``             keys for queries (``kk_full``: with residual and MLP)
``naclip`` (``_full``)  NACLIP; ``naclip:STD`` with another width of the Gaussian than 5 cells
``proxyclip``           ProxyCLIP, by another model's map
``qq kk vv csa all``    DeCLIP's content maps; of EVA unscaled, unrotated and not of unit length per cell
``multi-v:N``           sum of the values of the last N layers
``gated:N``             DenseRC: the same with a learned gate per head, which belongs to the weights
``window``              CLIPSelf's second branch; ``window:SIZE`` with other than 16 x 16 cells
======================  ====================================================================================

A model has one reading of its own, ``model.visual.readout``, which the released weights name; every dense and region
call takes another one. Formulas: the classes' docstrings.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .base import BlockInputs, Readout, Unread
from .last_block import MIXINGS, LastBlock, ProxyCLIP, Tokens
from .layers import GatedValue, MultiValue
from .unread import freeze_unread, hold_unread, unread_by_all
from .windows import Windows

if TYPE_CHECKING:
    from ..image_tower import ImageTower

__all__ = [
    "DEFAULT", "SPEC_KEY", "BlockInputs", "Readout", "Unread", "build_readout", "freeze_unread", "hold_unread",
    "list_readouts", "read_spec", "unread_by_all", "write_spec",
]  # fmt: skip

#: The reading of a model whose weights name none.
DEFAULT = "value"


class _Entry(NamedTuple):
    make: Callable[..., Readout]
    number: str | None = None  # the option that NAME:NUMBER gives


_READOUTS: dict[str, _Entry] = {
    **{n: _Entry(partial(LastBlock, form=n), "std" if m.gaussian else None) for n, m in MIXINGS.items()},
    "tokens": _Entry(Tokens),
    "proxyclip": _Entry(ProxyCLIP),
    "multi-v": _Entry(MultiValue, "layers"),
    "gated": _Entry(GatedValue, "layers"),
    "window": _Entry(Windows, "size"),
}


def list_readouts() -> list[str]:
    """Names of all readings, without the number that some take after a colon."""
    return sorted(_READOUTS)


def build_readout(name: str, tower: ImageTower, **options: Any) -> Readout:
    """A dense reading of a tower.

    Args:
        name: one of :func:`list_readouts`; ``multi-v:3``, ``gated:3``, ``naclip:1.5`` and ``window:8`` carry a number.
        tower: image tower that it will be used with. One that owns parameters gets them on the tower's device.
        options: ``normalized`` (unit length per cell) for all; ``scaled`` and ``rotated`` for readings that compare
            tokens of the last block; ``beta``, ``gamma`` and ``external`` for ``proxyclip``; ``global_blocks`` for
            ``window``. None stands for the default.

    Raises:
        ValueError: an unknown name, number or option.
    """
    base, colon, number = str(name).partition(":")
    entry = _READOUTS.get(base)
    if entry is None:
        near = difflib.get_close_matches(base, _READOUTS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(list_readouts())}"
        raise ValueError(f'dense reading "{name}" is unknown: {hint}')
    if colon:
        if entry.number is None:
            raise ValueError(f'dense reading "{name}" is unknown: {base} takes no number')
        try:
            options[entry.number] = float(number)
        except ValueError:
            what = f"a number, its {entry.number}, belongs after the colon"
            raise ValueError(f'dense reading "{name}" is unknown: {what}') from None
    known = set(inspect.signature(entry.make).parameters) - {"tower", "form"}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"the reading {base} has no option {', '.join(unknown)}: it has {', '.join(sorted(known))}")
    return entry.make(tower, **options)


# -- in the file of the weights ---------------------------------------------------------------------------------------

#: Name of a reading's spec in a state dict; what the reading owns stands under ``visual.readout.``.
SPEC_KEY = "visual.readout_spec"


def write_spec(spec: dict[str, Any]) -> Tensor:
    """A reading's spec as a tensor (uint8, the bytes of its json), to stand among weights in any kind of file."""
    return torch.tensor(list(json.dumps(spec, sort_keys=True).encode()), dtype=torch.uint8)


def read_spec(tensor: Tensor, source: str = "state dict") -> dict[str, Any]:
    """What :func:`write_spec` wrote. ValueError when it is something else."""
    try:
        spec = json.loads(bytes(tensor.flatten().tolist()))
        if isinstance(spec, dict) and isinstance(spec.get("name"), str):
            return spec
    except (ValueError, TypeError):
        pass
    raise ValueError(f"{source}: its {SPEC_KEY} names no dense reading; save the weights anew")
