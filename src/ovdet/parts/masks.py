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
        edges = edges.cpu().numpy()
        bounds = np.searchsorted(edges[:, 0], np.arange(len(rows) + 1))
        for row, i, j in zip(rows, bounds[:-1], bounds[1:], strict=True):
            found[row] = _run_lengths(edges[i:j, 1], size)
    return found


def _chunks(boxes: Tensor, size: tuple[int, int], cells: int) -> Iterator[tuple[list[int], int]]:
    """(masks worked on at once, columns of pixels that the widest of them covers), wide ones first."""
    margin = (boxes[:, 2] - boxes[:, 0]) / cells
    # What lies within a cell beyond the box may be true as well, where the threshold is low.
    widths = (boxes[:, 2] - boxes[:, 0] + 2 * margin + 3).nan_to_num(size[1]).clamp(3, size[1]).ceil().int().cpu()
    order = widths.argsort(descending=True, stable=True).tolist()
    while order:
        columns = int(widths[order[0]])
        count = max(_ENTRIES // (columns * (cells + 3)), 1)
        yield order[:count], columns
        order = order[count:]


def _edges(
    masks: Tensor, boxes: Tensor, size: tuple[int, int], number: int, threshold: float, repeat_edges: bool
) -> Tensor:
    """Where runs begin and end, alternately: int64 ``[E, 2]``, the mask and the place counted down the columns."""
    height, cells = size[0], masks.shape[-1]
    first, last = boxes[:, :2].T, boxes[:, 2:].T  # [2, n]: x, y
    left = (first[0] - (last[0] - first[0]) / cells - 1).nan_to_num().floor().clamp(0, size[1]).long()
    values = _weights(first[0], last[0], left, number, size[1], cells, repeat_edges) @ masks.transpose(1, 2)
    # Nodes of the lines down a column [n, columns, nodes], and their places in cells, 0 at the first cell's centre.
    places = torch.arange(-1.0, cells + 1, device=masks.device)
    if repeat_edges:
        values = torch.cat([values[..., :1], values, values[..., -1:]], dim=-1)
        places = places.clamp(-0.5, cells - 0.5)
        places = torch.cat([places[:1], places, places[-1:]])
    values = torch.nn.functional.pad(values, (1, 1))
    over = values >= threshold
    mask, column, node = (over[..., 1:] != over[..., :-1]).nonzero().unbind(1)
    before, after = values[mask, column, node].double(), values[mask, column, node + 1].double()
    share = (threshold - before) / (after - before)
    place = places[node] + share * (places[node + 1] - places[node])
    side = (last[1] - first[1]).double()[mask]
    line = (place + 0.5) / cells * side + first[1].double()[mask] - 0.5  # in pixels, 0 at the first pixel's centre
    line = torch.where(after >= threshold, line.ceil(), line.floor() + 1).nan_to_num().clamp(0, height)
    return torch.stack([mask, (left[mask] + column) * height + line.long()], dim=1)


def _weights(
    first: Tensor, last: Tensor, start: Tensor, number: int, limit: int, cells: int, repeat_edges: bool
) -> Tensor:
    """What each cell of a mask gives to each pixel across: ``[n, number, cells]``.

    Args:
        first, last: sides of the boxes, ``[n]``; start: the first pixel, ``[n]``; limit: pixels from here on get 0.
    """
    pixel = start[:, None] + torch.arange(number, device=first.device)  # [n, number]
    place = (pixel + 0.5 - first[:, None]) / (last - first)[:, None] * cells - 0.5  # in cells, 0 at a cell's centre
    outside = (pixel >= limit) | ~place.isfinite()
    if repeat_edges:
        outside |= (place < -0.5) | (place > cells - 0.5)
        place = place.clamp(0, cells - 1)
    weight = (1 - (place[..., None] - torch.arange(cells, device=first.device)).abs()).clamp(min=0)
    return weight.masked_fill(outside[..., None], 0)


def _run_lengths(edges: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """Run lengths of pixels, counted down the columns, that change at ``edges`` (begin, end, begin, ...)."""
    # Two at one place cancel: an empty run, or one that ends at the foot of a column where the next begins at its head.
    inner = np.flatnonzero(edges[1:] == edges[:-1])
    if len(inner):
        counts = np.unique(edges, return_counts=True)
        edges = counts[0][counts[1] % 2 == 1]
    counts = np.diff(np.concatenate([[0], edges, [size[0] * size[1]]]))
    rle = coco_mask.frPyObjects({"size": list(size), "counts": counts.tolist()}, *size)
    return {"size": [int(v) for v in size], "counts": rle["counts"].decode("ascii")}
