"""Orders: the canvas cut into blocks, and the sequence in which they are generated.

A new order is one decorated function, from a grid of blocks to a path through it:

    @order("columns")
    def _columns(down, across, seed):
        return [r * across + c for c in range(across) for r in range(down)]
"""

from __future__ import annotations

import operator
import random
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, NamedTuple, overload

Walk = Callable[[int, int, int], Sequence[int]]
"""(blocks down, blocks across, seed) to the flat positions of the grid, row * across + column, each once."""


class Route(NamedTuple):
    """A named way over the canvas."""

    name: str
    path: Walk
    axis: str  # "rows" or "columns": strips that lie one below, or beside, the other; "tiles"
    backwards: bool = False  # are strips cut from the far edge, so that the last one, not the first, may be smaller?
    late: bool = False  # is the way known only at the end of the draft, and the path one to count with until then?


ROUTES: dict[str, Route] = {}


def order(name: str, axis: str = "tiles", backwards: bool = False, late: bool = False) -> Callable[[Walk], Walk]:
    """Registers a function as the order `name`, over tiles, or over strips along an axis, "rows" or "columns"."""

    def register(path: Walk) -> Walk:
        ROUTES[name] = Route(name, path, axis, backwards, late)
        return path

    return register


def _straight(down: int, across: int, seed: int) -> Sequence[int]:
    return range(down * across)


order("top-to-bottom", "rows")(_straight)
order("bottom-to-top", "rows", backwards=True)(_straight)
order("left-to-right", "columns")(_straight)
order("right-to-left", "columns", backwards=True)(_straight)


@order("spiral-out")
def _outwards(down: int, across: int, seed: int) -> Sequence[int]:
    return _inwards(down, across, seed)[::-1]


@order("spiral-in")
def _inwards(down: int, across: int, seed: int) -> Sequence[int]:
    """Clockwise from the top left corner to the centre, ring by ring."""
    path: list[int] = []
    top, left, low, right = 0, 0, (down - 1) * across, across - 1  # edges of a ring; rows as positions in column 0
    while top <= low and left <= right:
        path += range(top + left, top + right + 1)
        path += range(top + across + right, low + right + 1, across)
        if top < low:
            path += range(low + right - 1, low + left - 1, -1)
        if left < right:
            path += range(low - across + left, top + left, -across)
        top, left, low, right = top + across, left + 1, low - across, right - 1
    return path


order("raster")(_straight)


@order("random")
def _random(down: int, across: int, seed: int) -> Sequence[int]:
    draw = random.Random(seed)
    return sorted(range(down * across), key=lambda _: draw.random())


@order("difficulty", late=True)
def _difficulty(down: int, across: int, seed: int) -> Sequence[int]:
    """Easy blocks first: `Plan.decided` knows which are. Until then it goes from tile to tile as "random" does."""
    return _random(down, across, seed)


@dataclass(frozen=True)
class Found:
    """A path over tiles that was found while drawing, in the form of an order's function."""

    name: str
    path: tuple[int, ...]

    @property
    def __name__(self) -> str:  # as a function has it
        return self.name

    def __call__(self, down: int, across: int, seed: int) -> Sequence[int]:
        return self.path


ORDERS = tuple(ROUTES)
# The order that leads away from each side of a picture.
AWAY = {"left": "right-to-left", "right": "left-to-right", "top": "bottom-to-top", "bottom": "top-to-bottom"}
STRAIGHT = tuple(name for name, route in ROUTES.items() if route.axis != "tiles")  # along which a canvas may grow


@dataclass(frozen=True)
class Block:
    """A rectangle of cells, generated as one unit. `index` is its place in the order, and no part of what it is: a
    block stays the same one where its order is decided anew."""

    index: int = field(compare=False)
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

    def common(self, other: Block) -> int:
        """Cells that lie in both."""
        down = min(self.rows.stop, other.rows.stop) - max(self.top, other.top)
        across = min(self.columns.stop, other.columns.stop) - max(self.left, other.left)
        return max(down, 0) * max(across, 0)


class Order(Sequence[Block]):
    """The blocks of a height × width canvas (cells), in order: disjoint, together the whole canvas."""

    name: str
    height: int
    width: int
    size: int  # thickness of the blocks

    @property
    @abstractmethod
    def tiled(self) -> bool:
        """Is the canvas cut along both axes?"""

    @property
    def onward(self) -> bool:
        """Does it move away from each block for good, so that nothing out of sight is ever seen again?"""
        return False

    @abstractmethod
    def block(self, index: int) -> Block:
        """The block at an index from 0 to below the length."""

    @abstractmethod
    def at(self, row: int, column: int) -> int:
        """Index of the block that covers a cell."""

    @abstractmethod
    def near(self, block: Block, reach: int) -> list[int]:
        """Indices of the blocks whose gap to `block` is below `reach` cells, itself included, ascending."""

    @abstractmethod
    def earliest(self, index: int, reach: int) -> int:
        """The first of `near(self[index], reach)`, in constant time."""

    @abstractmethod
    def cells_before(self, index: int) -> int:
        """Cells of all blocks before this index, in constant time."""

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Block, ...]: ...
    def __getitem__(self, index: int | slice) -> Block | tuple[Block, ...]:
        if isinstance(index, slice):
            return tuple(self.block(i) for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of an order of {len(self)} blocks")
        return self.block(index % len(self))


@dataclass(frozen=True)
class GridOrder(Order):
    """Strips `size` cells thick, or size × size tiles, along a route; blocks at the far edge may be smaller.

    A block is worked out when it is asked for, so along a straight route an order of any length costs nothing.
    """

    route: Route
    height: int
    width: int
    size: int
    seed: int = 0

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.route.name

    @property
    def tiled(self) -> bool:
        return self.route.axis == "tiles"

    @property
    def onward(self) -> bool:
        return not self.tiled and isinstance(self.path, range)

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Blocks down and across."""
        down = 1 if self.route.axis == "columns" else -(-self.height // self.size)
        across = 1 if self.route.axis == "rows" else -(-self.width // self.size)
        return down, across

    @cached_property
    def path(self) -> Sequence[int]:
        """Flat positions in the grid, in order. ValueError if the route's function does not give each once."""
        down, across = self.grid
        path = self.route.path(down, across, self.seed)
        if isinstance(path, range) and path == range(down * across):
            return path
        path = [whole(f"a position of the order {self.name!r}", at) for at in path]
        if sorted(path) != list(range(down * across)):
            raise ValueError(
                f"the order {self.name!r} gives {len(path)} positions on a grid of {down} × {across} blocks, and must "
                f"give each from 0 to {down * across - 1} once"
            )
        return path

    @cached_property
    def _places(self) -> Sequence[int]:
        """The inverse of the path; a plain range is its own."""
        if isinstance(self.path, range):
            return self.path
        places = [0] * len(self)
        for i, at in enumerate(self.path):
            places[at] = i
        return places

    def __len__(self) -> int:
        down, across = self.grid
        return down * across

    def block(self, index: int) -> Block:
        row, column = divmod(self.path[index], self.grid[1])
        top, height = self._cut(row, self.height, self.route.axis == "columns")
        left, width = self._cut(column, self.width, self.route.axis == "rows")
        return Block(index, top, left, height, width)

    def _cut(self, i: int, extent: int, uncut: bool) -> tuple[int, int]:
        """Start and length of the i-th cut of an axis, in cells."""
        if uncut:
            return 0, extent
        length = min(self.size, extent - i * self.size)
        return (extent - i * self.size - length if self.route.backwards else i * self.size), length

    def at(self, row: int, column: int) -> int:
        down, across = self.grid
        if self.route.backwards:  # the axis that is not cut has a single place, wherever it is asked
            row, column = self.height - 1 - row, self.width - 1 - column
        r, c = (0 if n == 1 else at // self.size for n, at in ((down, row), (across, column)))
        return self._places[r * across + c]

    def near(self, block: Block, reach: int) -> list[int]:
        down, across = self.grid
        row, column = divmod(self.path[block.index], across)
        n = -(-reach // self.size)  # n grid steps away, n - 1 whole blocks lie between
        left, right = max(0, column - n), min(across, column + n + 1)
        rows = range(max(0, row - n), min(down, row + n + 1))
        return sorted(chain.from_iterable(self._places[r * across + left : r * across + right] for r in rows))

    def earliest(self, index: int, reach: int) -> int:
        down, across = self.grid
        n = -(-reach // self.size)
        row, column = divmod(self.path[index], across)
        if isinstance(self.path, range):
            return max(0, row - n) * across + max(0, column - n)
        return self._lowest_near(min(n, max(down, across)))[row][column]

    def _lowest_near(self, n: int) -> list[tuple[int, ...]]:
        """For each place of the grid the lowest index at most n steps away, worked out once."""
        known: dict[int, list[tuple[int, ...]]] = self.__dict__.setdefault("_lowest_known", {})
        if n not in known:
            across = self.grid[1]
            rows = [self._places[at : at + across] for at in range(0, len(self), across)]
            columns = zip(*(_lowest(row, n) for row in rows))
            known[n] = list(zip(*(_lowest(column, n) for column in columns)))
        return known[n]

    def cells_before(self, index: int) -> int:
        if not isinstance(self.path, range):
            return self._sums[index]
        down, across = self.grid
        row, column = divmod(index, across)
        tall, wide = self.height if down == 1 else self.size, self.width if across == 1 else self.size
        above = min(row * tall, self.height)
        return above * self.width + min(tall, self.height - above) * min(column * wide, self.width)

    @cached_property
    def _sums(self) -> list[int]:
        down, across = self.grid
        tall = [self._cut(r, self.height, self.route.axis == "columns")[1] for r in range(down)]
        wide = [self._cut(c, self.width, self.route.axis == "rows")[1] for c in range(across)]
        return list(accumulate((tall[at // across] * wide[at % across] for at in self.path), initial=0))


@dataclass(frozen=True)
class OwnOrder(Order):
    """Blocks that the caller cut. ValueError unless they are disjoint, whole tokens, and together the whole canvas."""

    height: int
    width: int
    blocks: tuple[Block, ...]
    multiple: int = 1  # cells a token

    name = "in an order of its own"

    def __post_init__(self) -> None:
        self._owners  # noqa: B018  (looked at, and so checked, now)

    @property
    def tiled(self) -> bool:
        return any(b.height < self.height for b in self.blocks) and any(b.width < self.width for b in self.blocks)

    @cached_property
    def size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Thickness of the thickest block."""
        return max(min(b.height, b.width) for b in self.blocks)

    @cached_property
    def _owners(self) -> list[array[int]]:
        """For each token, by row and column, the index of the block that it belongs to."""
        down, across, side = self.height // self.multiple, self.width // self.multiple, self.multiple
        owners = [array("l", [-1]) * across for _ in range(down)]
        for i, b in enumerate(self.blocks):
            if any(n % side for n in (b.top, b.left, b.height, b.width)):
                raise ValueError(f"block {i} of the order, {_place(b)}, must lie on multiples of {side} cells")
            if not (0 <= b.top < b.rows.stop <= self.height and 0 <= b.left < b.columns.stop <= self.width):
                raise ValueError(
                    f"block {i} of the order, {_place(b)}, must lie within the canvas of {self.height} × {self.width}"
                )
            start, stop = b.left // side, b.columns.stop // side
            for row in owners[b.top // side : b.rows.stop // side]:
                taken = max(row[start:stop])
                if taken >= 0:
                    raise ValueError(f"blocks {taken} and {i} of the order overlap, and must be disjoint")
                row[start:stop] = array("l", [i]) * (stop - start)
        for y, row in enumerate(owners):
            if -1 in row:
                place = f"row {y * side}, column {row.index(-1) * side}"
                raise ValueError(f"no block of the order holds the cell in {place}, and they must cover the canvas")
        return owners

    def __len__(self) -> int:
        return len(self.blocks)

    def block(self, index: int) -> Block:
        return self.blocks[index]

    def at(self, row: int, column: int) -> int:
        return self._owners[row // self.multiple][column // self.multiple]

    def near(self, block: Block, reach: int) -> list[int]:
        side = self.multiple
        left, right = max(0, (block.left - reach) // side), -(-(block.columns.stop + reach) // side)
        top, bottom = max(0, (block.top - reach) // side), -(-(block.rows.stop + reach) // side)
        return sorted({i for row in self._owners[top:bottom] for i in row[left:right]})

    def earliest(self, index: int, reach: int) -> int:
        known: dict[tuple[int, int], int] = self.__dict__.setdefault("_earliest_known", {})
        if (index, reach) not in known:
            known[index, reach] = self.near(self.blocks[index], reach)[0]
        return known[index, reach]

    def cells_before(self, index: int) -> int:
        return self._sums[index]

    @cached_property
    def _sums(self) -> list[int]:
        return list(accumulate((b.cells for b in self.blocks), initial=0))


@dataclass(frozen=True)
class RestOrder(Order):
    """An order over what is left of a canvas of which parts are given: over the rectangle at (top, left) that holds all
    the rest, without those of its blocks that are given as a whole."""

    height: int
    width: int
    base: Order  # over the rectangle
    top: int
    left: int
    given: tuple[Block, ...]

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.name

    @property
    def size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.size

    @property
    def tiled(self) -> bool:
        return self.base.tiled

    @cached_property
    def onward(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Not where the order comes nearer to what is given: it is out of sight at first, and needed later."""
        first, last = self[0], self[-1]
        return self.base.onward and all(first.gap(piece) <= last.gap(piece) for piece in self.pieces)

    @cached_property
    def _kept(self) -> Sequence[int]:
        """Indices in the base of the blocks that are drawn."""
        base = self.base
        inside = Block(0, self.top, self.left, base.height, base.width)
        if not any(inside.common(block) for block in self.given):
            return range(len(base))
        return [i for i in range(len(base)) if not _covers(self.given, self._moved(base[i]))]

    @cached_property
    def _own(self) -> Mapping[int, int]:
        return {i: own for own, i in enumerate(self._kept)}

    def _moved(self, block: Block) -> Block:
        return replace(block, top=block.top + self.top, left=block.left + self.left)

    def __len__(self) -> int:
        return len(self._kept)

    def block(self, index: int) -> Block:
        return replace(self._moved(self.base.block(self._kept[index])), index=index)

    def at(self, row: int, column: int) -> int:
        """As of any order; -1 where the canvas is given."""
        row, column = row - self.top, column - self.left
        if not (0 <= row < self.base.height and 0 <= column < self.base.width):
            return -1
        return self._own.get(self.base.at(row, column), -1)

    def near(self, block: Block, reach: int) -> list[int]:
        near = self.base.near(self.base[self._kept[block.index]], reach)
        return near if isinstance(self._kept, range) else [self._own[i] for i in near if i in self._own]

    def earliest(self, index: int, reach: int) -> int:
        if isinstance(self._kept, range):
            return self.base.earliest(index, reach)
        return self.near(self[index], reach)[0]

    def cells_before(self, index: int) -> int:
        return self.base.cells_before(index) if isinstance(self._kept, range) else self._sums[index]

    @cached_property
    def _sums(self) -> list[int]:
        return list(accumulate((block.cells for block in self), initial=0))

    @property
    def pieces(self) -> Iterator[Block]:
        """What is given and not drawn, in pieces no thicker than a block, numbered after the blocks that are drawn."""
        bottom, right = self.top + self.base.height, self.left + self.base.width
        bands = [
            Block(0, 0, 0, self.top, self.width),
            Block(0, bottom, 0, self.height - bottom, self.width),
            Block(0, self.top, 0, self.base.height, self.left),
            Block(0, self.top, right, self.base.height, self.width - right),
        ]
        parts = [piece for band in bands if band.cells for piece in _split(band, self.size)]
        parts += [self._moved(self.base[i]) for i in range(len(self.base)) if i not in self._own]
        return (replace(part, index=len(self) + i) for i, part in enumerate(parts))


def rectangles(mask: Sequence[Sequence[bool]], side: int = 1) -> tuple[Block, ...]:
    """What is true in a mask, whose places are `side` cells wide and high, as disjoint blocks of cells."""
    found: list[Block] = []
    open_runs: dict[tuple[int, int], int] = {}  # (first, end) of a run of columns: the row that it began in
    for row in range(len(mask) + 1):
        runs: set[tuple[int, int]] = set()
        start = None
        for column, given in enumerate([*(mask[row] if row < len(mask) else ()), False]):
            if given and start is None:
                start = column
            elif not given and start is not None:
                runs.add((start, column))
                start = None
        for run in [run for run in open_runs if run not in runs]:
            top = open_runs.pop(run)
            sides = top * side, run[0] * side, (row - top) * side, (run[1] - run[0]) * side
            found.append(Block(len(found), *sides))
        for run in runs:
            open_runs.setdefault(run, row)
    return tuple(found)


def check_given(given: Iterable[Any], height: int, width: int, multiple: int = 1) -> tuple[Block, ...]:
    """The parts of a canvas that are given. ValueError unless they are disjoint, whole tokens, and not all of it."""
    if not given:
        return ()
    parts = numbered(given, "given")
    rows = [0] * (height // multiple)  # a bit for each token
    for part in parts:
        at = f"given has {_place(part)}"
        if any(n % multiple for n in (part.top, part.left, part.height, part.width)):
            raise ValueError(f"{at}, which must lie on multiples of {multiple} cells")
        if not (0 <= part.top < part.rows.stop <= height and 0 <= part.left < part.columns.stop <= width):
            raise ValueError(f"{at}, which must lie within the canvas of {height} × {width}")
        bits = ((1 << part.width // multiple) - 1) << part.left // multiple
        for row in range(part.top // multiple, part.rows.stop // multiple):
            if rows[row] & bits:
                raise ValueError(f"{at}, part of which is given twice")
            rows[row] |= bits
    if all(row == (1 << width // multiple) - 1 for row in rows):
        raise ValueError("all of the canvas is given, and nothing is left to draw")
    return parts


def rest_of(given: Sequence[Block], height: int, width: int) -> Block:
    """The rectangle that holds all that is not given."""
    rest = Block(0, 0, 0, height, width)
    while True:  # parts that lie along a whole edge are taken off
        whole_edge = next((cut for part in given if (cut := _less(rest, part)) != rest), rest)
        if whole_edge == rest:
            return rest
        rest = whole_edge


def _less(rest: Block, part: Block) -> Block:
    """A rectangle without a part that lies along one of its edges; itself if none does."""
    top, bottom, left, right = rest.top, rest.rows.stop, rest.left, rest.columns.stop
    if part.left <= left and part.columns.stop >= right:
        top = max(top, part.rows.stop) if part.top <= top else top
        bottom = min(bottom, part.top) if part.rows.stop >= bottom else bottom
    elif part.top <= top and part.rows.stop >= bottom:
        left = max(left, part.columns.stop) if part.left <= left else left
        right = min(right, part.left) if part.columns.stop >= right else right
    return Block(0, top, left, bottom - top, right - left)


def _covers(parts: Iterable[Block], block: Block) -> bool:
    """Whether disjoint parts cover all of a block."""
    return sum(block.common(part) for part in parts) == block.cells


def _split(band: Block, size: int) -> Iterator[Block]:
    for top in range(band.top, band.rows.stop, size):
        for left in range(band.left, band.columns.stop, size):
            yield Block(0, top, left, min(size, band.rows.stop - top), min(size, band.columns.stop - left))


def route_of(order: str | Walk) -> Route:
    """The route of a name, or of a function, which goes over tiles unless it is registered otherwise."""
    if callable(order):
        own = Route(getattr(order, "__name__", "of its own"), order, "tiles")
        return next((route for route in ROUTES.values() if route.path is order), own)
    if order not in ROUTES:
        raise ValueError(f"unknown order {order!r}: choose one of {', '.join(ROUTES)}")
    return ROUTES[order]


def span(order: str | Walk | Sequence[Block], height: int, width: int) -> int:
    """Cells that a window travels to see the canvas: along the order for strips, the larger side for tiles."""
    axis = route_of(order).axis if isinstance(order, str) or callable(order) else "tiles"
    return {"rows": height, "columns": width, "tiles": max(height, width)}[axis]


def make_order(
    order: str | Walk | Sequence[Block], height: int, width: int, size: int = 1, seed: int = 0, multiple: int = 1
) -> Order:
    """An order over a height × width canvas (cells).

    order: a name in ORDERS; a function like those, for an order of tiles; or the blocks themselves, whatever their
    index. size: thickness of the blocks in cells, unless they are given; seed: for functions that draw, such as
    "random"; multiple: cells a token.
    """
    height, width, size = (
        whole(what, value, 1, "cells") for what, value in {"height": height, "width": width, "block size": size}.items()
    )
    if isinstance(order, str) or callable(order):
        return GridOrder(route_of(order), height, width, size, whole("seed", seed))
    return OwnOrder(height, width, numbered(order), multiple)


def numbered(blocks: Iterable[Any], what: str = "order") -> tuple[Block, ...]:
    """The blocks of the caller's own order, with their places in it as indices."""
    own = tuple(blocks) if isinstance(blocks, Iterable) else ()
    if not own or not all(isinstance(b, Block) for b in own):
        may = "a name, a function from a grid to a path, or Blocks" if what == "order" else "Blocks"
        raise ValueError(f"{what} is {blocks!r}, and must be {may}")
    sides = [[whole(f"a side of block {i}", n) for n in (b.top, b.left, b.height, b.width)] for i, b in enumerate(own)]
    return tuple(Block(i, *four) for i, four in enumerate(sides))


def whole(what: str, value: Any, least: int | None = None, unit: str = "") -> int:
    """`value` as an int, numpy's integers included; ValueError, in one sentence, for anything else."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ValueError(f"{what} is {value!r}, and must be a whole number{f' of {unit}' if unit else ''}")
    if least is not None and number < least:
        raise ValueError(f"{what} is {number}{f' {unit}' if unit else ''}, and must be at least {least}")
    return number


def share(what: str, value: float) -> float:
    """`value` as a float; ValueError unless it is from 0 to 1."""
    try:
        fine = 0 <= value <= 1
    except TypeError:
        fine = False
    if not fine:
        raise ValueError(f"{what} is {value!r}, and must be from 0 to 1")
    return float(value)


def _lowest(values: Sequence[int], n: int) -> list[int]:
    """For each value the lowest at most n places away."""
    edge, width = [max(values)] * n, 2 * n + 1
    lowest, done = [*edge, *values, *edge], 1  # lowest[i] is that of `done` places from i on
    while done < width:
        step = min(done, width - done)
        lowest = list(map(min, lowest, lowest[step:]))
        done += step
    return lowest


def _place(block: Block) -> str:
    return f"{block.height} × {block.width} cells at row {block.top}, column {block.left}"
