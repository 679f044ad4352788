"""Orders: disjoint, covering, lazy, and in the sequence that their names promise."""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytest import mark, raises

from rolling_diffusion.core.order import ORDERS, ROUTES, Block, make_order
from rolling_diffusion.core.order import order as order_of
from rolling_diffusion.core.plan import make_plan

TILE_ORDERS = [name for name in ORDERS if ROUTES[name].axis == "tiles"]
names = st.sampled_from(ORDERS)
sizes = st.integers(1, 40)


@given(names, sizes, sizes, st.integers(1, 50), st.integers(0, 3))
def test_blocks_are_disjoint_cover_the_canvas_and_know_their_place(name, height, width, size, seed):
    order = make_order(name, height, width, size, seed)
    hits = torch.zeros(height, width, dtype=torch.int)
    for i, block in enumerate(order):
        assert block.index == i and order[i] == block
        assert block.cells == block.height * block.width > 0
        hits[block.rows, block.columns] += 1
    assert (hits == 1).all() and len(order) == i + 1


@given(names, sizes, sizes, st.integers(1, 12))
def test_only_blocks_at_the_far_edge_are_smaller(name, height, width, size):
    blocks = make_order(name, height, width, size)
    full = {
        "height": height if name in ("left-to-right", "right-to-left") else size,
        "width": width if name in ("top-to-bottom", "bottom-to-top") else size,
    }
    for axis, extent in {"height": height, "width": width}.items():
        small = [b for b in blocks if getattr(b, axis) != full[axis]]
        assert all(getattr(b, axis) == extent % full[axis] for b in small)
    if name not in TILE_ORDERS:
        assert all(b.height == full["height"] and b.width == full["width"] for b in blocks[:-1])


def test_gap_counts_the_cells_between():
    block = Block(0, 10, 10, 4, 4)
    assert block.gap(block) == block.gap(Block(1, 14, 10, 4, 4)) == block.gap(Block(1, 6, 6, 4, 4)) == 0
    assert block.gap(Block(1, 17, 10, 4, 4)) == block.gap(Block(1, 10, 3, 4, 4)) == 3
    assert block.gap(Block(1, 16, 19, 4, 4)) == 5


def starts(name, height=5, width=5, size=2):
    return [(b.top, b.left) for b in make_order(name, height, width, size)]


def test_each_order_runs_as_it_is_called():
    assert starts("top-to-bottom") == [(0, 0), (2, 0), (4, 0)]
    assert starts("bottom-to-top") == [(3, 0), (1, 0), (0, 0)]
    assert starts("left-to-right") == [(0, 0), (0, 2), (0, 4)]
    assert starts("right-to-left") == [(0, 3), (0, 1), (0, 0)]
    assert starts("raster", width=4) == [(0, 0), (0, 2), (2, 0), (2, 2), (4, 0), (4, 2)]
    around = [(0, 0), (0, 2), (0, 4), (2, 4), (4, 4), (4, 2), (4, 0), (2, 0), (2, 2)]
    assert starts("spiral-in") == around
    assert starts("spiral-out") == around[::-1]


@given(sizes, sizes, st.integers(1, 8))
def test_a_spiral_touches_its_predecessor(height, width, size):
    blocks = list(make_order("spiral-out", height, width, size))
    steps = [(abs(a.top - b.top), abs(a.left - b.left)) for a, b in pairwise(blocks)]
    assert all(sorted(step) == [0, size] for step in steps)
    assert blocks[-1].top == blocks[-1].left == 0


def test_random_depends_on_its_seed_alone():
    assert starts("random") == starts("random")
    shuffled = [list(make_order("random", 20, 20, 2, seed)) for seed in (0, 1)]
    assert [b.top for b in shuffled[0]] != [b.top for b in shuffled[1]]


@mark.parametrize("name", ["top-to-bottom", "right-to-left", "raster"])
def test_a_long_canvas_costs_nothing(name):
    order = make_order(name, 10**9, 10**9, 10)
    assert len(order) >= 10**8
    assert order[len(order) // 2].cells >= 100
    assert order[-1] == order[len(order) - 1]


def test_bad_input_is_refused():
    with raises(ValueError, match="unknown order 'spiral': choose one of top-to-bottom, "):
        make_order("spiral", 4, 4, 2)
    with raises(ValueError, match="block size is 0 cells"):
        make_order("raster", 4, 4, 0)
    with raises(IndexError):
        make_order("raster", 4, 4, 2)[4]


def test_a_new_order_is_one_decorated_function():
    @order_of("columns")
    def columns(down, across, seed):
        return [r * across + c for c in range(across) for r in range(down)]

    try:
        plan = make_plan(8, 8, 4, "columns", window=6, overlap=2)
        assert [(b.top, b.left) for b in plan.blocks] == [(0, 0), (4, 0), (0, 4), (4, 4)]
        with raises(ValueError, match=r"unknown order 'colums': choose one of .*, columns"):
            make_plan(8, 8, 4, "colums")
    finally:
        del ROUTES["columns"]


def test_a_function_of_the_callers_own_is_an_order_of_tiles():
    def snake(down, across, seed):
        rows = [list(range(r * across, (r + 1) * across)) for r in range(down)]
        return [at for r, row in enumerate(rows) for at in (row[::-1] if r % 2 else row)]

    plan = make_plan(16, 16, 4, snake, window=8, overlap=4)
    assert [b.left for b in plan.blocks[:8]] == [0, 4, 8, 12, 12, 8, 4, 0]
    assert plan == make_plan(16, 16, 4, snake, window=8, overlap=4) and hash(plan)
    assert "16 blocks snake" in str(plan)
    assert make_plan(16, 16, 4, lambda down, across, seed: np.arange(down * across)[::-1], window=8, overlap=4).blocks


@mark.parametrize("path", [[0, 1, 2, 2], [0, 1, 2], [0, 1, 2, 4], [0.5, 1, 2, 3]])
def test_a_function_that_is_no_path_is_refused(path):
    with raises(ValueError, match=r"must (give each from 0 to 3 once|be a whole number)") as caught:
        make_plan(8, 8, 4, lambda down, across, seed: path, window=6, overlap=2)
    assert "\n" not in str(caught.value)


OWN = (Block(0, 0, 0, 8, 4), Block(9, 0, 4, 4, 4), Block(9, 4, 4, 4, 4), Block(0, 0, 8, 8, 2))


def test_blocks_of_the_callers_own():
    plan = make_plan(8, 10, 6, OWN, window=6, overlap=2, lookahead=1)
    assert [b.index for b in plan.blocks] == [0, 1, 2, 3] and plan.blocks[1].left == 4
    assert plan.size == 4 and plan.blocks.tiled and plan.lag == 3  # 6 * (4 / 6)**2 = 2.67
    assert [list(new) for new in plan.arrivals()] == [[0, 1, 2], [3], [], []]
    assert plan == make_plan(8, 10, 6, list(OWN), window=6, overlap=2, lookahead=1) and hash(plan)
    assert "4 blocks in an order of its own" in str(plan) and plan.cost().relative > 1
    strips = [Block(0, y, 0, 2, 10) for y in (4, 0, 6, 2)]
    assert not make_plan(8, 10, 6, strips, window=6, overlap=2).blocks.tiled
    assert not make_plan(8, 10, 6, strips, window=6, overlap=2).rule.onward


@mark.parametrize(
    ("blocks", "message"),
    [
        ([*OWN[:3], Block(3, 0, 6, 8, 4)], "blocks 1 and 3 of the order overlap, and must be disjoint"),
        (OWN[:3], "no block of the order holds the cell in row 0, column 8, and they must cover the canvas"),
        ([*OWN[:3], Block(3, 0, 8, 8, 4)], "block 3 of the order, 8 × 4 cells at row 0, column 8, must lie within"),
        ([*OWN[:3], Block(3, 0, 8, 8, 1)], "must lie on multiples of 2 cells"),
        ([], "order is [], and must be a name, a function from a grid to a path, or Blocks"),
        ([(0, 0, 8, 10)], "must be a name, a function"),
        (7, "order is 7, and must be a name"),
    ],
)
def test_blocks_that_are_no_order_are_refused(blocks, message):
    with raises(ValueError) as caught:
        make_plan(8, 10, 6, blocks, window=6, overlap=2)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def orders(names_or_own: st.DataObject):
    """A named order, or the same blocks as the caller's own."""
    name, size = names_or_own.draw(names), names_or_own.draw(st.integers(1, 12))
    order = make_order(name, names_or_own.draw(sizes), names_or_own.draw(sizes), size)
    return make_order(list(order), order.height, order.width) if names_or_own.draw(st.booleans()) else order


@given(st.data(), st.integers(1, 30))
def test_what_an_order_knows_of_its_blocks(data, reach):
    order = orders(data)
    block = order[data.draw(st.integers(0, len(order) - 1))]
    near = [b.index for b in order if block.gap(b) < reach]
    assert order.near(block, reach) == near and order.earliest(block.index, reach) == near[0]
    assert order.cells_before(block.index) == sum(b.cells for b in order[: block.index])
    assert order.cells_before(len(order)) == order.height * order.width
    corners = [(block.top, block.left), (block.rows.stop - 1, block.columns.stop - 1)]
    assert [order.at(*corner) for corner in corners] == [block.index] * 2


@given(st.data())
def test_an_onward_order_leaves_blocks_for_good(data):
    order = orders(data)
    if order.onward:
        gaps = [order[0].gap(b) for b in order]
        assert gaps == sorted(gaps)


def test_difficulty_goes_over_tiles_and_is_known_late():
    assert ROUTES["difficulty"].late and not any(ROUTES[name].late for name in ORDERS if name != "difficulty")
    order = make_order("difficulty", 12, 12, 4, seed=3)
    assert order.tiled and [b.index for b in order] == list(range(9))
    assert list(order) == list(make_order("random", 12, 12, 4, seed=3))  # what is counted with until then


def test_a_block_is_where_it_lies_wherever_it_stands_in_an_order():
    assert Block(0, 2, 2, 4, 4) == Block(5, 2, 2, 4, 4) and len({Block(0, 2, 2, 4, 4), Block(5, 2, 2, 4, 4)}) == 1
    assert Block(0, 2, 2, 4, 4) != Block(0, 2, 2, 4, 2)
