"""Dense passes that leave padding out: where the images of a batch lie on its grid of cells, and how they are packed.

A batch is a stack of equal squares, of which an image that is not square fills a part, top left. A tower that drops
padding (:attr:`open_clip.ImageTower.drop_padding`) runs its blocks on the cells of the images alone. Images of one size
stay a batch ``[B, n, C]``; others are packed end to end, ``[1, T, C]``, so that everything that treats tokens one by
one runs once, and attention runs image by image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Size = tuple[int, int]
#: Per image the pixels (height, width) that it takes of a padded input.
Sizes = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Canvas:
    """Which cells of a batch's grid the images take.

    Attributes:
        grid: cells (h, w) of the batch.
        taken: per image the cells (rows, columns), from the top left.
    """

    grid: Size
    taken: tuple[Size, ...]

    @staticmethod
    def of(sizes: Sizes | None, count: int, grid: Size, patch: int, margin: int = 0) -> Canvas:
        """From pixels: cells that an image touches, and ``margin`` more to the right and below where there are any.

        Args:
            sizes: per image the pixels (height, width) that it takes of the input; None for all of them.
            count: number of images.
            grid: cells of the input.
            patch: pixels of a cell.

        Raises:
            ValueError: another number of sizes, or one that is empty or does not fit into the input.
        """
        if sizes is None:
            return Canvas(grid, (grid,) * count)
        if len(sizes) != count:
            raise ValueError(f"{len(sizes)} sizes for {count} images: give (height, width) in pixels for each")
        taken = []
        for i, size in enumerate(sizes):
            height, width = (int(side) for side in size)
            if not (0 < height <= grid[0] * patch and 0 < width <= grid[1] * patch):
                whole = f"{grid[0] * patch}x{grid[1] * patch}"
                raise ValueError(f"image {i} takes {height}x{width} pixels of an input of {whole}: give a part of it")
            cells = (-(-side // patch) + margin for side in (height, width))
            taken.append(tuple(min(n, most) for n, most in zip(cells, grid, strict=True)))
        return Canvas(grid, tuple(taken))

    @property
    def uniform(self) -> bool:
        """Whether all images take the same cells, so that they stay a batch."""
        return len(set(self.taken)) <= 1

    @property
    def full(self) -> bool:
        """Whether there is no padding."""
        return set(self.taken) <= {self.grid}

    @property
    def numbers(self) -> list[int]:
        """Cells of each image."""
        return [rows * columns for rows, columns in self.taken]

    def gather(self, cells: Tensor) -> Tensor:
        """Cells of the images, of all cells ``[B, h*w, C]``: ``[B, n, C]`` where uniform, else packed ``[1, T, C]``."""
        if self.full:
            return cells
        grid = cells.unflatten(1, self.grid)
        if self.uniform:
            rows, columns = self.taken[0]
            return grid[:, :rows, :columns].flatten(1, 2)
        parts = [one[:rows, :columns].flatten(0, 1) for one, (rows, columns) in zip(grid, self.taken, strict=True)]
        return torch.cat(parts)[None]

    def split(self, cells: Tensor) -> list[Tensor]:
        """What :meth:`gather` gave, one ``[1, n_i, C]`` per image."""
        return list(cells.split(1)) if self.uniform else list(cells.split(self.numbers, dim=1))

    def spread(self, cells: Tensor) -> Tensor:
        """The inverse of :meth:`gather`; cells of the padding repeat the image's nearest one. ``[B, h*w, C]``."""
        if self.full:
            return cells
        if self.uniform:
            return _fill(cells.unflatten(1, self.taken[0]), self.grid).flatten(1, 2)
        parts = [_fill(x.unflatten(1, t), self.grid) for x, t in zip(self.split(cells), self.taken, strict=True)]
        return torch.cat(parts).flatten(1, 2)

    def rows(self, table: Callable[[Size], Tensor]) -> list[Tensor]:
        """Rows of a table of positions for the cells of each image; one for all where uniform.

        Tables are those of the square around the input, of which an image takes the top left part: so an image has
        the same positions with its padding as without.

        Args:
            table: of a grid (h, w), ``[..., h*w, C]``.
        """
        side = max(self.grid)
        return self._cut(table((side, side)), (side, side))

    def rows_of(self, table: Tensor) -> Tensor:
        """Rows, end to end, of a table ``[..., h*w, C]`` of the batch's own grid."""
        rows = self._cut(table, self.grid)
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-2)

    def _cut(self, table: Tensor, grid: Size) -> list[Tensor]:
        square, chosen = table.unflatten(-2, grid), self.taken[:1] if self.uniform else self.taken
        return [square[..., :rows, :columns, :].flatten(-3, -2) for rows, columns in chosen]


def _fill(cells: Tensor, grid: Size) -> Tensor:
    """``[b, rows, columns, C]`` on a larger grid, the last row and column repeated."""
    below, right = grid[0] - cells.shape[1], grid[1] - cells.shape[2]
    if right:
        cells = torch.cat([cells, cells[:, :, -1:].expand(-1, -1, right, -1)], dim=2)
    return torch.cat([cells, cells[:, -1:].expand(-1, below, -1, -1)], dim=1) if below else cells


def packed_rotary(rows: Sequence[Tensor], prefix: int) -> Tensor:
    """Rotary table of packed tokens ``[..., T, 2 d]``: ``prefix`` tokens ahead of each image, which it leaves alone.

    Args:
        rows: per image, sines and cosines ``[..., n_i, 2 d]``.
    """
    if not prefix:
        return torch.cat(list(rows), dim=-2)
    still = torch.zeros_like(rows[0][..., :1, :])
    still[..., still.shape[-1] // 2 :] = 1  # sine 0, cosine 1
    still = still.expand(*still.shape[:-2], prefix, -1)
    return torch.cat([part for own in rows for part in (still, own)], dim=-2)


def interleave(prefix: Tensor, cells: Sequence[Tensor]) -> Tensor:
    """Packed tokens ``[1, T, C]``: of each image its prefix tokens ``[B, P, C]``, then its cells ``[1, n_i, C]``."""
    return torch.cat([part for one, own in zip(prefix.split(1), cells, strict=True) for part in (one, own)], dim=1)


def without_prefix(tokens: Tensor, numbers: Sequence[int], prefix: int) -> Tensor:
    """The cells of packed tokens ``[1, T, C]``, end to end; ``numbers`` of cells."""
    parts = tokens.split([n + prefix for n in numbers], dim=1)
    return torch.cat([part[:, prefix:] for part in parts], dim=1) if prefix else tokens
