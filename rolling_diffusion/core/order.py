"""Orders: the canvas cut into blocks, and the sequence in which they are generated."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

ROW_ORDERS = ("top-to-bottom", "bottom-to-top")
COLUMN_ORDERS = ("left-to-right", "right-to-left")
TILE_ORDERS = ("spiral-out", "spiral-in", "raster", "random")
ORDERS = ROW_ORDERS + COLUMN_ORDERS + TILE_ORDERS


@dataclass(frozen=True)
class Block:
    """A rectangle of cells, generated as one unit. `index` is its place in the order."""

    index: int
    top: int
    left: int
    height: int
    width: int

    @property
    def cells(self) -> int:
        return self.height * self.width

    @property
    def rows(self) -> slice:
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        return slice(self.left, self.left + self.width)

    def gap(self, other: Block) -> int:
        """Cells that lie between two blocks, along the axis where they are further apart; 0 if they touch.

        A waiting block is within reach of a block in motion if their gap is below the lookahead.
        """
        down = max(other.rows.start - self.rows.stop, self.rows.start - other.rows.stop)
        across = max(other.columns.start - self.columns.stop, self.columns.start - other.columns.stop)
        return max(down, across, 0)


@dataclass(frozen=True)
class Order(Sequence[Block]):
    """The blocks of a height × width canvas (cells), in order: disjoint, together the whole canvas.

    Rows and columns are cut into strips `size` cells thick, the other orders into size × size tiles; blocks at the far
    edge may be smaller. A block is worked out when it is asked for, so an order of any length costs nothing.
    """

    name: str
    height: int
    width: int
    size: int
    seed: int = 0

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Blocks down and across."""
        down = 1 if self.name in COLUMN_ORDERS else -(-self.height // self.size)
        across = 1 if self.name in ROW_ORDERS else -(-self.width // self.size)
        return down, across

    @cached_property
    def path(self) -> Sequence[int]:
        """Flat positions in the grid, in order. Strips that run backwards have a flipped grid, not a reversed path."""
        down, across = self.grid
        if self.name in ("spiral-in", "spiral-out"):
            path = _spiral(down, across)
            return path if self.name == "spiral-in" else path[::-1]
        if self.name == "random":
            draw = random.Random(self.seed)
            return sorted(range(down * across), key=lambda _: draw.random())
        return range(down * across)

    @cached_property
    def _places(self) -> Sequence[int] | dict[int, int]:
        """The inverse of the path; a plain range is its own."""
        return self.path if isinstance(self.path, range) else {at: i for i, at in enumerate(self.path)}

    def __len__(self) -> int:
        down, across = self.grid
        return down * across

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Block, ...]: ...
    def __getitem__(self, index: int | slice) -> Block | tuple[Block, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of an order of {len(self)} blocks")
        index %= len(self)
        row, column = divmod(self.path[index], self.grid[1])
        top, height = self._cut(row, self.height, self.name in COLUMN_ORDERS, self.name == "bottom-to-top")
        left, width = self._cut(column, self.width, self.name in ROW_ORDERS, self.name == "right-to-left")
        return Block(index, top, left, height, width)

    def _cut(self, i: int, extent: int, whole: bool, flipped: bool) -> tuple[int, int]:
        """Start and length of the i-th cut of an axis, in cells."""
        if whole:
            return 0, extent
        length = min(self.size, extent - i * self.size)
        return (extent - i * self.size - length if flipped else i * self.size), length

    def near(self, block: Block, reach: int) -> list[int]:
        """Indices of the blocks whose gap to `block` is below `reach` cells, itself included, ascending."""
        down, across = self.grid
        row, column = divmod(self.path[block.index], across)
        n = -(-reach // self.size)  # n grid steps away, n - 1 whole blocks lie between
        rows = range(max(0, row - n), min(down, row + n + 1))
        columns = range(max(0, column - n), min(across, column + n + 1))
        return sorted(self._places[r * across + c] for r in rows for c in columns)


def _spiral(down: int, across: int) -> list[int]:
    """Flat positions of a grid, clockwise from the top left corner to the centre: take the top row, turn the rest."""
    grid: Sequence[Sequence[int]] = [range(r * across, (r + 1) * across) for r in range(down)]
    path: list[int] = []
    while grid:
        path.extend(grid[0])
        grid = list(zip(*grid[1:], strict=True))[::-1]
    return path


def span(name: str, height: int, width: int) -> int:
    """Cells that a window travels to see the canvas: along the order for strips, the larger side for tiles."""
    return height if name in ROW_ORDERS else width if name in COLUMN_ORDERS else max(height, width)


def make_order(name: str, height: int, width: int, size: int, seed: int = 0) -> Order:
    """The order `name` over a height × width canvas, in blocks `size` cells thick; `seed` is for "random" alone."""
    if name not in ORDERS:
        raise ValueError(f"unknown order {name!r}: choose one of {', '.join(ORDERS)}")
    for what, value in {"height": height, "width": width, "block size": size}.items():
        if value < 1:
            raise ValueError(f"{what} is {value} cells, and must be at least 1")
    return Order(name, height, width, size, seed)
