"""Masks in the frame of a box: cut out of true masks for training, put into images and encoded at test.

Pasting works in chunks on the masks' device and hands over only where runs of pixels begin and end: with 300 masks an
image, whole pictures of masks would be a hundred megabytes to paint, to copy and to read through.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.ops import roi_align

_ENTRIES = 2**22  # of a chunk: 16 MB of float32
_ENTRIES_HOST = 2**17  # on a CPU, where chunks of equal widths count for more than few chunks


def mask_targets(masks: Tensor, which: Tensor, boxes: Tensor, side: int, chunk: int = 32) -> Tensor:
    """Masks cut out by boxes and brought to ``side`` x ``side`` cells: bool ``[P, side, side]``.

    A cell is true where at least half of it (sampled by RoIAlign) is.

    Args:
        masks: bool ``[N, S, S]``; which: the mask of each box, int64 ``[P]``; boxes: ``[P, 4]`` in its pixels.
        chunk: boxes cut at once; each takes a float32 copy of its mask, 4 MB at S = 1024.
    """
    cut = [torch.zeros(0, side, side, dtype=torch.bool, device=boxes.device)]
    with torch.autocast(boxes.device.type, enabled=False):
        for index, box in zip(which.split(chunk), boxes.float().split(chunk), strict=True):
            number = torch.arange(len(box), dtype=torch.float32, device=box.device)[:, None]
            share = roi_align(masks[index][:, None].float(), torch.cat([number, box], 1), side, 1.0, -1, True)
            cut.append(share[:, 0] >= 0.5)
    return torch.cat(cut)


def paste_masks(
    masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5, *, repeat_edges: bool = False
) -> Tensor:
    """Masks in the frame of their boxes put into an image: bool ``[N, height, width]``, on the host.

    Bilinear at pixel centres, true where >= ``threshold``. Works at any scale: scale the boxes to the original image
    and paste there.

    Args:
        masks: probabilities ``[N, m, m]``.
        boxes: ``[N, 4]`` xyxy in pixels of the image.
        size: (height, width) of the image.
        threshold: above 0.
        repeat_edges: whether a mask goes on beyond its outer cells' centres as it is there, up to the box; otherwise
            it falls to 0 there, within a cell.
    """
    runs = encode_pasted(masks, boxes, size, threshold, repeat_edges=repeat_edges)
    if not runs:
        return torch.zeros(0, *size, dtype=torch.bool)
    return torch.from_numpy(coco_mask.decode(runs).astype(bool).transpose(2, 0, 1))


def encode_pasted(
    masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5, *, repeat_edges: bool = False
) -> list[dict[str, Any]]:
    """Compressed run lengths, as COCO results hold them, of what :func:`paste_masks` gives; same arguments.

    No pixel is ever painted. Down a column of pixels a bilinear mask is linear between the centres of its cells, so
    that where it crosses the threshold follows from its values there: 29 places instead of hundreds of pixels.
    """
    found: list[dict[str, Any]] = [{}] * len(masks)
    for rows, columns in _chunks(boxes, size, masks.shape[-1]):
        index = torch.tensor(rows).to(masks.device)
        with torch.autocast(masks.device.type, enabled=False):
            edges = _edges(masks[index].float(), boxes[index].float(), size, columns, threshold, repeat_edges)
        for row, text in zip(rows, compress_runs(*edges.cpu().numpy(), len(rows), size[0] * size[1]), strict=True):
            found[row] = {"size": [int(v) for v in size], "counts": text}
    return found


def _chunks(boxes: Tensor, size: tuple[int, int], cells: int) -> Iterator[tuple[list[int], int]]:
    """(masks worked on at once, columns of pixels that the widest of them covers), wide ones first."""
    most = _ENTRIES_HOST if boxes.device.type == "cpu" else _ENTRIES
    margin = (boxes[:, 2] - boxes[:, 0]) / cells
    # What lies within a cell beyond the box may be true as well, where the threshold is low.
    widths = (boxes[:, 2] - boxes[:, 0] + 2 * margin + 3).nan_to_num(size[1]).clamp(3, size[1]).ceil().int().cpu()
    order = widths.argsort(descending=True, stable=True).tolist()
    while order:
        columns = int(widths[order[0]])
        count = max(most // (columns * (cells + 3)), 1)
        yield order[:count], columns
        order = order[count:]


def _edges(
    masks: Tensor, boxes: Tensor, size: tuple[int, int], number: int, threshold: float, repeat_edges: bool
) -> Tensor:
    """Where runs begin and end, in order: int64 ``[2, E]``, the mask and the place counted down the columns.

    Args:
        number: columns of pixels that are looked at, from the left end of each box on.
    """
    height, cells = size[0], masks.shape[-1]
    (left, top), (right, bottom) = boxes[:, :2].T, boxes[:, 2:].T
    start = (left - (right - left) / cells - 1).nan_to_num().floor().clamp(0, size[1]).long()
    values = _across(masks, left, right, start, number, size[1], repeat_edges)  # [n, cells, columns]
    # Nodes of the lines down a column, and their places in cells, 0 at the first cell's centre.
    places = torch.arange(-1.0, cells + 1, device=masks.device)
    if repeat_edges:
        values = torch.cat([values[:, :1], values, values[:, -1:]], dim=1)
        places = places.clamp(-0.5, cells - 0.5)
        places = torch.cat([places[:1], places, places[-1:]])
    over = torch.nn.functional.pad(values >= threshold, (0, 0, 1, 1))
    mask, column, node = (over[:, 1:] != over[:, :-1]).transpose(1, 2).nonzero().unbind(1)
    last = values.shape[1] - 1
    before = values[mask, (node - 1).clamp(min=0), column].double() * (node > 0)
    after = values[mask, node.clamp(max=last), column].double() * (node <= last)
    share = (threshold - before) / (after - before)
    place = places[node] + share * (places[node + 1] - places[node])
    side = (bottom - top).double()[mask]
    line = (place + 0.5) / cells * side + top.double()[mask] - 0.5  # in pixels, 0 at the first pixel's centre
    line = torch.where(after >= threshold, line.ceil(), line.floor() + 1).nan_to_num().clamp(0, height)
    return torch.stack([mask, (start[mask] + column) * height + line.long()])


def _across(
    masks: Tensor, left: Tensor, right: Tensor, start: Tensor, number: int, limit: int, repeat_edges: bool
) -> Tensor:
    """Masks ``[n, cells, cells]`` read at the centres of columns of pixels: ``[n, cells, number]``.

    Args:
        left, right: sides of the boxes, ``[n]``; start: the first column, ``[n]``; limit: from here on all is 0.
    """
    cells = masks.shape[-1]
    pixel = start[:, None] + torch.arange(number, device=masks.device)  # [n, number]
    place = (pixel + 0.5 - left[:, None]) / (right - left)[:, None] * cells - 0.5  # in cells, 0 at a cell's centre
    outside = (pixel >= limit) | ~place.isfinite()
    if repeat_edges:
        outside |= (place < -0.5) | (place > cells - 0.5)
        place = place.clamp(0, cells - 1)
    place = place.masked_fill(outside, -1).clamp(-1, cells)  # there is nothing at -1 and at cells
    cell = place.floor()
    share = (place - cell)[:, None]
    index = (cell.long() + 1)[:, None].expand(-1, cells, -1)
    padded = torch.nn.functional.pad(masks, (1, 2))
    return torch.lerp(padded.gather(2, index), padded.gather(2, index + 1), share)


def compress_runs(mask: np.ndarray, edges: np.ndarray, number: int, pixels: int) -> list[str]:
    """COCO's compressed run lengths of several masks, from where their runs begin and end.

    Args:
        mask: int64 ``[E]``, ascending, the mask of each edge; edges: int64 ``[E]``, ascending for each mask.
        number: of masks; pixels: of each.
    """
    # Two at one place cancel: an empty run, or one that ends at the foot of a column where the next begins at its head.
    key = mask * (pixels + 1) + edges
    first = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])) if len(key) else np.zeros(0, np.int64)
    kept = first[np.diff(np.append(first, len(key))) % 2 == 1]
    kept = kept[edges[kept] < pixels]  # a run that ends with the mask has nothing behind it
    mask, edges = mask[kept], edges[kept]
    # Each mask's edges between 0 and the end; their differences are the runs, of nothing and of the mask by turns.
    per_mask = np.bincount(mask, minlength=number)
    begin = np.concatenate([[0], np.cumsum(per_mask + 2)])
    bounds = np.zeros(begin[-1], np.int64)
    bounds[np.arange(len(edges)) + 2 * mask + 1] = edges
    bounds[begin[1:] - 1] = pixels
    runs = np.delete(np.diff(bounds), begin[1:-1] - 1) if number else np.zeros(0, np.int64)
    counts = per_mask + 1
    start = np.concatenate([[0], np.cumsum(counts)])
    # From the fourth run on what is written is the difference from the run before the last.
    values = runs.copy()
    late = np.flatnonzero(np.arange(len(runs)) - np.repeat(start[:-1], counts) > 2)
    values[late] -= runs[late - 2]
    digits = np.arange(7)  # of 5 bits, the lowest first; a digit's 6th bit says that more follow
    low = (values[:, None] >> (5 * digits)) & 31
    rest = values[:, None] >> (5 * (digits + 1))
    more = np.where(low & 16, rest != -1, rest != 0)
    length = (~more).argmax(1) + 1
    text = (low + 32 * more + 48).astype(np.uint8)[digits < length[:, None]].tobytes().decode("ascii")
    ends = np.concatenate([[0], np.cumsum(length)])[start]
    return [text[i:j] for i, j in zip(ends[:-1], ends[1:], strict=True)]
