"""Sliding windows: sizes, places, and the linear maps that bring their cells to the pixels of a photograph.

The published evaluations upsample the scores of every window to its pixels, add them up on the network's input, divide
by how many windows cover a pixel, and resize the sum to the photograph. Each of these is linear and acts on rows and
columns apart, and windows stand on a grid. So all of it is ``rows @ cells @ columns.T`` with one small matrix per axis
and the cells of all windows side by side: nothing of the input's size, let alone of C classes, is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

#: What is done with a window that is no multiple of the patch. ``pad``: zeros right and bottom, cut off again (exact);
#: ``centre``: zeros on both sides, cut off again (ClearCLIP, exact); ``drop``: the rest is left out and the map
#: stretched over it (SCLIP, NACLIP); ``stretch``: zeros right and bottom, and the map pressed together (MaskCLIP).
REMAINDERS = ("pad", "centre", "drop", "stretch")


def fit_within(height: int, width: int, long: int, short: int) -> tuple[int, int]:
    """(height, width) of an image made as large as ``long`` x ``short`` allows; the ratio of sides is kept.

    ``long`` bounds the longer side, ``short`` the shorter one. Sides are rounded, at least one pixel.
    """
    factor = min(long / max(height, width), short / min(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one axis; the last is pushed back inside. A short axis has one, from 0.

    Raises:
        ValueError: a window or stride below 1, or windows so far apart that pixels between them would be in none.
    """
    if window < 1 or stride < 1:
        raise ValueError(f"windows of {window} pixels every {stride}: both must be at least 1")
    if stride > window < length:
        raise ValueError(
            f"windows of {window} pixels every {stride} leave pixels out: the stride may be {window} at most"
        )
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, length - window), 0) for i in range(count)]


def window_boxes(height: int, width: int, window: int, stride: int) -> list[tuple[int, int, int, int]]:
    """Windows (y0, x0, y1, x1) of an image, row by row."""
    return [
        (y, x, min(y + window, height), min(x + window, width))
        for y in starts(height, window, stride)
        for x in starts(width, window, stride)
    ]


@dataclass(frozen=True)
class Axis:
    """Windows along one axis of the network's input, and how their cells lie on it.

    Attributes:
        length: pixels of the input.
        window: pixels of a window.
        starts: first pixel of each.
        patch: pixels of a cell; the patch of the model.
        remainder: one of :data:`REMAINDERS`.
        multiple: what windows are padded to multiples of; 0 for the patch.
    """

    length: int
    window: int
    starts: tuple[int, ...]
    patch: int
    remainder: str = "pad"
    multiple: int = 0

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros before and after a window; negative for pixels that are left out."""
        multiple = self.multiple or self.patch
        if self.remainder == "drop" and self.window >= multiple:
            return 0, -(self.window % multiple)
        missing = -self.window % multiple
        return (missing // 2, missing - missing // 2) if self.remainder == "centre" else (0, missing)

    @property
    def cells(self) -> int:
        """Cells of a window."""
        return (self.window + sum(self.padding)) // self.patch

    def matrix(self, size: int, cells: int | None = None) -> Tensor:
        """float32 ``[size, windows * cells]``: from the cells of all windows, side by side, to ``size`` pixels.

        Args:
            size: pixels that the axis is resized to at the end, those of the photograph.
            cells: cells of a window, where the map is finer than the model's own (another model's grid).
        """
        cells = cells or self.cells
        merged = torch.zeros(self.length, len(self.starts), cells, dtype=torch.float64)
        cover = torch.zeros(self.length, 1, 1, dtype=torch.float64)
        before, after = self.padding
        if self.remainder in ("pad", "centre"):
            inside = interpolation(cells, self.window + before + after)[before : before + self.window]
        else:
            inside = interpolation(cells, self.window)
        for i, start in enumerate(self.starts):
            merged[start : start + self.window, i] += inside
            cover[start : start + self.window] += 1
        merged = (merged / cover).flatten(1)
        return (merged if size == self.length else interpolation(self.length, size) @ merged).float()


def interpolation(source: int, target: int) -> Tensor:
    """Linear interpolation (corners not aligned, no antialias) as a matrix, float64 ``[target, source]``."""
    eye = torch.eye(source, dtype=torch.float64)[None]  # a row per sample of the source
    return F.interpolate(eye, size=target, mode="linear", align_corners=False)[0].T


@dataclass(frozen=True)
class Windows:
    """Windows of one image on the network's input."""

    rows: Axis
    columns: Axis

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.rows.starts) * len(self.columns.starts)

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of every window before padding."""
        return self.rows.window, self.columns.window

    def crop(self, image: Tensor, index: int) -> Tensor:
        """Window ``index`` (row by row) of an image ``[C, H, W]``, a view ``[C, h, w]``."""
        y, x = (
            self.rows.starts[index // len(self.columns.starts)],
            self.columns.starts[index % len(self.columns.starts)],
        )
        return image[:, y : y + self.rows.window, x : x + self.columns.window]

    def pad(self, windows: Tensor) -> Tensor:
        """Windows ``[n, C, h, w]`` padded with zeros, or trimmed, to multiples of the patch."""
        return F.pad(windows, (*self.columns.padding, *self.rows.padding))

    def join(self, maps: Tensor) -> Tensor:
        """Cells of all windows side by side: ``[count, C, h, w] -> [C, rows * h, columns * w]``."""
        count, channels, h, w = maps.shape
        grid = maps.view(len(self.rows.starts), len(self.columns.starts), channels, h, w)
        return grid.permute(2, 0, 3, 1, 4).reshape(channels, len(self.rows.starts) * h, len(self.columns.starts) * w)


def plan_windows(
    height: int,
    width: int,
    patch: int,
    window: int = 0,
    stride: int = 0,
    remainder: str = "pad",
    multiple: int = 0,
) -> Windows:
    """Windows of an input of ``height`` x ``width`` pixels.

    Args:
        patch: pixels of a cell.
        window: side of a window; 0 for one window over the whole image.
        stride: distance of windows; 0 for half a window.
        remainder: one of :data:`REMAINDERS`.
        multiple: what windows are padded to multiples of; itself a multiple of the patch, 0 for the patch.

    Raises:
        ValueError: an unknown remainder, a window below 1, a stride above the window, or a multiple that the patch does
            not divide.
    """
    if multiple % patch:
        raise ValueError(f"windows padded to multiples of {multiple}: not a multiple of the patch size {patch}")
    if remainder not in REMAINDERS:
        raise ValueError(f'remainder is "{remainder}": use one of {", ".join(REMAINDERS)}')

    def axis(length: int) -> Axis:
        side = min(window or length, length)
        places = starts(length, window or length, stride or max((window or length) // 2, 1))
        return Axis(length, side, tuple(places), patch, remainder, multiple)

    return Windows(axis(height), axis(width))


@dataclass(frozen=True)
class AxisMap:
    """A map from the cells of an axis to its pixels, on the device that uses it.

    Attributes:
        matrix: float32 ``[pixels, cells]``.
        first, end: int64 ``[pixels]``, on the host: a pixel is made of the cells from ``first`` to before ``end``.
    """

    matrix: Tensor
    first: np.ndarray
    end: np.ndarray

    @classmethod
    def of(cls, matrix: Tensor, device: torch.device | str) -> AxisMap:
        """From a matrix on the CPU, such as :meth:`Axis.matrix`."""
        used, cells = matrix.numpy() != 0, matrix.shape[1]
        some = used.any(1)
        first = np.where(some, used.argmax(1), cells)
        end = np.where(some, cells - used[:, ::-1].argmax(1), 0)
        return cls(matrix.to(device, non_blocking=True), first, end)

    def __len__(self) -> int:
        return len(self.matrix)

    def __getitem__(self, pixels: slice) -> AxisMap:
        """The map to some of the pixels."""
        return AxisMap(self.matrix[pixels], self.first[pixels], self.end[pixels])

    @property
    def touched(self) -> slice:
        """The range of cells that all its pixels together are made of. Known without asking the device."""
        first, end = int(self.first.min(initial=self.matrix.shape[1])), int(self.end.max(initial=0))
        return slice(first, end) if first < end else slice(0, 0)


def spread(cells: Tensor, rows: AxisMap, columns: AxisMap) -> Tensor:
    """Part of a merged map: ``[C, a, b]`` cells to ``[C, H, W]``, the pixels of ``rows`` and ``columns``.

    Only the cells that the given rows and columns touch are read.
    """
    a, b = rows.touched, columns.touched
    return rows.matrix[:, a] @ (cells[:, a, b] @ columns.matrix[:, b].T)
