"""What a reading leaves unread, and how training leaves it as it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .base import Readout, Unread

if TYPE_CHECKING:
    from ..image_tower import ImageTower


def unread_by_all(readouts: Iterable[Readout], tower: ImageTower) -> list[Unread]:
    """What none of several readings of a tower uses. A part counts where all of them leave out that same part.

    A loss on the global embedding reads everything; then there is nothing to leave out.
    """
    lists = [r.unread(tower) for r in readouts]
    if not lists:
        raise ValueError("no readings are given")
    whole = [{u.name for u in unread if not u.index} for unread in lists]
    keys = [{(u.name, str(u.index)) for u in unread} for unread in lists]
    common = []
    for u in {(u.name, str(u.index)): u for unread in lists for u in unread}.values():
        if all(u.name in w or (u.name, str(u.index)) in k for w, k in zip(whole, keys, strict=True)):
            common.append(u)
    names = {u.name for u in common if not u.index}
    return [u for u in common if not u.index or u.name not in names]


def freeze_unread(unread: Iterable[Unread]) -> None:
    """Freeze the parameters that are not read at all; those read in part stay as they are."""
    for u in unread:
        if not u.index:
            u.parameter.requires_grad_(False)


def hold_unread(optimizer: torch.optim.Optimizer, unread: Iterable[Unread]) -> list[RemovableHandle]:
    """Let no step of an optimizer change the parts of its parameters that are not read.

    A fused projection is one parameter: its unread rows get a zero gradient, but weight decay would shrink them all the
    same, to 0.978 in the published schedule. Each step sets them aside before and puts them back after, so that
    nothing has to be known of the optimizer, and of weights loaded meanwhile. Parameters may be sharded (FSDP2).

    Returns:
        Two handles; ``handle.remove()`` of both undoes it. None when there is nothing to hold.
    """
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parts = [u for u in unread if u.index and id(u.parameter) in trained]
    if not parts:
        return []
    kept: list[Tensor] = []

    @torch.no_grad()
    def set_aside(*_: object) -> None:
        kept[:] = [part.clone() for part in _local_parts(parts)]

    @torch.no_grad()
    def put_back(*_: object) -> None:
        for part, before in zip(_local_parts(parts), kept, strict=True):
            part.copy_(before)
        kept.clear()

    return [optimizer.register_step_pre_hook(set_aside), optimizer.register_step_post_hook(put_back)]


def _local_parts(parts: Sequence[Unread]) -> list[Tensor]:
    """Views of the parts, of those rows that this process has."""
    views = []
    for u in parts:
        tensor, index = u.parameter.detach(), u.index
        if hasattr(tensor, "to_local"):
            tensor, index = tensor.to_local(), _local_index(tensor, index)
        views.append(tensor[index])
    return views


def _local_index(tensor: Tensor, index: tuple[slice, ...]) -> tuple[slice, ...]:
    """The part ``index`` of a sharded tensor (a DTensor), in coordinates of this process's shard.

    A shard along a dimension of n entries over k processes is the chunk of ``ceil(n / k)`` entries at the process's
    rank, which is how FSDP2 and ``torch.chunk`` divide; the last ones may be smaller or empty.
    """
    offsets = [0] * tensor.dim()
    lengths = list(tensor.shape)
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_shard():
            size = -(-lengths[placement.dim] // tensor.device_mesh.size(dimension))
            start = min(size * tensor.device_mesh.get_local_rank(dimension), lengths[placement.dim])
            offsets[placement.dim] += start
            lengths[placement.dim] = min(size, lengths[placement.dim] - start)
        elif not placement.is_replicate():
            raise ValueError(f"a parameter is placed as {placement}: only sharded and replicated ones can be held")
    local = []
    for d in range(tensor.dim()):
        first, last, _ = (index[d] if d < len(index) else slice(None)).indices(tensor.shape[d])
        local.append(slice(*(min(max(edge - offsets[d], 0), lengths[d]) for edge in (first, last))))
    return tuple(local)
