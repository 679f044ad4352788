"""Memory: what is stored, what is seen, with which weight, and when it is freed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rolling_diffusion.core.memory import Memory, View
from rolling_diffusion.core.order import Block, make_order
from rolling_diffusion.core.rule import Rule

LAYERS, HEADS, DIM = 2, 2, 4


def keys(block: Block, layer: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """A key and a value that tell the block and the layer: key 100 * layer + index, value its negative."""
    key = torch.full((batch, block.cells, HEADS, DIM), 100.0 * layer + block.index)
    return key, -key


def put(memory: Memory, kind: str, *blocks: Block) -> None:
    for block in blocks:
        for layer in range(LAYERS):
            memory.put(kind, block, layer, *keys(block, layer))


def seen(view: View | None) -> list[int]:
    """Indices of the blocks that a view shows, in order of its tokens; keys and values agree in every layer."""
    if view is None:
        return []
    key, value = view.layer(0)
    assert torch.equal(value, -key)
    for layer in range(LAYERS):
        assert torch.equal(view.layer(layer)[0], key + 100.0 * layer)
    return list(dict.fromkeys(key[0, :, 0, 0].int().tolist()))


STRIPS = list(make_order("top-to-bottom", 20, 6, 2))  # ten strips, 2 cells thick
TILES = {(b.top // 2, b.left // 2): b for b in make_order("raster", 10, 10, 2)}  # five by five


def test_a_block_in_motion_sees_finished_and_waiting_blocks_but_never_itself():
    memory = Memory(Rule(size=2))
    put(memory, "waiting", *STRIPS)
    put(memory, "finished", *STRIPS[:3])
    for block in STRIPS[:3]:
        memory.start(block)
    view = memory.view([STRIPS[3], STRIPS[4]])
    assert view is not None and view.bias is None
    assert seen(view) == [0, 1, 2, 5, 6, 7, 8, 9]
    assert memory.tokens == 10 * 12
    memory.start(STRIPS[9])
    assert seen(memory.view([STRIPS[3], STRIPS[4]])) == [0, 1, 2, 5, 6, 7, 8]
    memory.clear()
    assert memory.tokens == 0 and memory.view([STRIPS[3]]) is None


def test_persistence_weighs_strips_by_age_and_drops_what_weighs_below_a_thousandth():
    p = 0.3  # p**5 = 0.0024 stays, p**6 = 0.0007 goes
    memory = Memory(Rule(p, size=2, onward=True))
    put(memory, "finished", *STRIPS[:8])
    put(memory, "waiting", STRIPS[9])
    view = memory.view([STRIPS[8]])
    assert view is not None and view.bias is not None
    assert seen(view) == [3, 4, 5, 6, 7, 9]
    expected = [5 * math.log(p)] * 12 + [4 * math.log(p)] * 12 + [3 * math.log(p)] * 12
    expected += [2 * math.log(p)] * 12 + [math.log(p)] * 12 + [0.0] * 12
    torch.testing.assert_close(view.bias, torch.tensor(expected))
    assert memory.tokens == 6 * 12, "strips below the threshold never come near again: they are freed"


def test_a_look_from_ahead_of_the_blocks_in_motion_frees_nothing():
    """Storing waiting blocks asks for a view from where they are, further on than the blocks in motion."""
    for memory in (Memory(Rule(0.3, size=2, onward=True)), Memory(Rule(cap=24, sinks=0, size=2))):
        put(memory, "finished", *STRIPS[:3])
        assert len(seen(memory.view([STRIPS[7]], free=False))) == (1 if memory.rule.cap is None else 2)
        assert memory.tokens == 3 * 12
        assert seen(memory.view([STRIPS[3]])) == ([0, 1, 2] if memory.rule.cap is None else [1, 2])


def test_tiles_weigh_by_their_distance_not_their_age():
    memory = Memory(Rule(0.1, size=2))  # distances 1 and 2 weigh 0.1 and 0.01; 4 weighs too little
    put(memory, "finished", TILES[0, 0], TILES[1, 1], TILES[2, 0], TILES[4, 4])
    view = memory.view([TILES[0, 1]])
    assert view is not None and view.bias is not None
    assert seen(view) == [TILES[0, 0].index, TILES[1, 1].index, TILES[2, 0].index]
    expected = torch.tensor([1.0, 1, 2]).repeat_interleave(4) * math.log(0.1)
    torch.testing.assert_close(view.bias, expected)
    assert memory.tokens == 16, "a tile is hidden, not freed: a spiral comes back to it"
    assert TILES[4, 4].index in seen(memory.view([TILES[3, 4]]))


def test_persistence_zero_stores_nothing_finished():
    memory = Memory(Rule(0.0))
    put(memory, "finished", *STRIPS)
    assert memory.tokens == 0 and memory.view([STRIPS[0]]) is None
    assert not memory.rule.stores("finished") and memory.rule.stores("waiting")


@pytest.mark.parametrize(
    "lookahead, visible", [(None, [2, 3, 4, 5]), (0, []), (1, [2]), (2, [2]), (3, [2, 3]), (5, [2, 3, 4])]
)
def test_lookahead_counts_cells_from_the_nearest_block_in_motion(lookahead: int | None, visible: list[int]):
    memory = Memory(Rule(lookahead=lookahead, size=2))
    put(memory, "waiting", *STRIPS[:6])
    memory.start(STRIPS[0])
    memory.start(STRIPS[1])
    assert seen(memory.view([STRIPS[0], STRIPS[1]])) == visible
    assert memory.rule.stores("waiting") == (lookahead != 0)


def test_the_cap_keeps_sinks_then_the_nearest_and_frees_the_rest():
    memory = Memory(Rule(cap=5 * 12, sinks=2, size=2))
    for block in STRIPS[:9]:
        memory.view([block])
        put(memory, "finished", block)
        assert memory.tokens <= 6 * 12, "the cap, and the block just committed"
    assert seen(memory.view([STRIPS[9]])) == [0, 1, 6, 7, 8]
    assert memory.tokens == 5 * 12
    assert Rule(cap=0).stores("finished") is False


def test_the_cap_hides_far_waiting_blocks_without_forgetting_them():
    memory = Memory(Rule(cap=2 * 12, sinks=0, size=2))
    put(memory, "waiting", *STRIPS[1:6])
    assert seen(memory.view([STRIPS[0]])) == [1, 2]
    memory.start(STRIPS[1])
    assert seen(memory.view([STRIPS[1]])) == [2, 3]


def test_concatenation_is_kept_while_the_visible_blocks_stay_and_memory_is_stored_once():
    memory = Memory(Rule(0.9, size=2))
    put(memory, "finished", *STRIPS[:3])
    first = memory.view([STRIPS[3]])
    assert first is not None and memory.view([STRIPS[3]]) is first
    key = first.layer(0)[0]
    later = memory.view([STRIPS[4]])  # the same blocks, further away
    assert later is not None and first.bias is not None and later.bias is not None
    assert later.layer(0)[0] is key and torch.all(later.bias < first.bias)

    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in stored(memory, layer=0)}
    assert sum(storages.values()) == 2 * 3 * 12 * HEADS * DIM * 4, "slices of the concatenation, no second copy"

    put(memory, "finished", STRIPS[3])
    wider = memory.view([STRIPS[4]])
    assert seen(wider) == [0, 1, 2, 3]


def test_a_hidden_block_does_not_keep_an_old_concatenation_alive():
    memory = Memory(Rule(0.1, size=2))
    put(memory, "finished", TILES[0, 0], TILES[0, 1])
    assert len(seen(memory.view([TILES[1, 0]]))) == 2
    put(memory, "finished", TILES[4, 4])
    assert seen(memory.view([TILES[4, 3]])) == [TILES[4, 4].index]
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in stored(memory, 0))
    assert len(stored(memory, 0)) == 6


def stored(memory: Memory, layer: int) -> list[Tensor]:
    blocks = {**memory._stored["finished"], **memory._stored["waiting"]}
    return [t for layers in blocks.values() for t in layers[layer]]


def test_put_stores_a_copy_of_its_own_not_the_whole_that_a_slice_belongs_to():
    memory = Memory(Rule(size=2))
    whole = torch.randn(1, 1000, HEADS, DIM)
    memory.put("finished", STRIPS[0], 0, whole[:, :12], whole[:, 12:24])
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in stored(memory, 0))


def test_gradients_end_at_put():
    x = torch.randn(1, 12, HEADS, DIM, requires_grad=True)
    memory = Memory(Rule(size=2))
    for block in STRIPS[:2]:
        memory.put("finished", block, 0, x * 2, x * 3)
    view = memory.view([STRIPS[2]])
    assert view is not None
    key, value = view.layer(0)
    assert not key.requires_grad and not value.requires_grad


def test_memory_may_be_stored_elsewhere_than_it_is_computed():
    memory = Memory(Rule(size=2), device="meta")  # any device that is not the computation's
    memory.put("finished", STRIPS[0], 0, *keys(STRIPS[0], 0))
    assert {t.device.type for t in stored(memory, 0)} == {"meta"}


def test_below_persistence_one_memory_stays_flat_however_many_blocks_finish():
    memory = Memory(Rule(0.5, size=2, onward=True))
    for i in range(2_000):
        block = Block(i, 2 * i, 0, 2, 6)
        memory.view([block])
        put(memory, "finished", block)
    assert memory.tokens <= 11 * 12  # 0.5**9 is the last weight above a thousandth


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"persistence": 1.5}, "persistence is 1.5"),
        ({"persistence": -0.1}, "must be from 0 to 1"),
        ({"lookahead": -2}, "lookahead is -2"),
        ({"cap": -1}, "cap is -1"),
        ({"size": 0}, "size is 0"),
    ],
)
def test_bad_settings_are_named(kwargs: dict, words: str):
    with pytest.raises(ValueError, match=words):
        Memory(Rule(**kwargs))
    with pytest.raises(ValueError, match="'done'"):
        Memory().put("done", STRIPS[0], 0, *keys(STRIPS[0], 0))
