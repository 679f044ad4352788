"""Orders: disjoint, covering, lazy, and in the sequence that their names promise."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from pytest import mark, raises

from rolling_diffusion.core.order import ORDERS, ROUTES, Block, make_order

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


@given(names, sizes, sizes, st.integers(1, 12), st.integers(1, 30), st.data())
def test_near_finds_the_blocks_whose_gap_is_below_the_reach(name, height, width, size, reach, data):
    order = make_order(name, height, width, size)
    block = order[data.draw(st.integers(0, len(order) - 1))]
    assert order.near(block, reach) == [b.index for b in order if block.gap(b) < reach]


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
