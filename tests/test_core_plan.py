"""Plans: the formula and what it promises, over all plans that can be made."""

import math
import time
import tracemalloc
from dataclasses import FrozenInstanceError, asdict, replace
from itertools import pairwise
from math import isclose

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from pytest import MonkeyPatch, mark, raises

from rolling_diffusion.core import cost
from rolling_diffusion.core.order import ORDERS, ROUTES
from rolling_diffusion.core.plan import Plan, make_plan
from rolling_diffusion.defaults import Card, plan_for


@st.composite
def plans(draw, lags: tuple = (None, "autoregressive", 0, 1, 2, 5)) -> Plan:
    even = st.integers(1, 8).map(lambda n: 2 * n)
    steps = draw(st.integers(1, 12))
    window = draw(even)
    return make_plan(
        draw(even),
        draw(even),
        steps,
        window=window,
        overlap=draw(st.integers(0, window // 2 - 1)) * 2,
        draft=(draft := draw(st.integers(0, steps - 1))),
        order=draw(st.sampled_from([name for name in ORDERS if draft > 1 or not ROUTES[name].late])),
        lookahead=draw(st.sampled_from([None, 0, 1, 6, 20])),
        lag=draw(st.sampled_from([lag for lag in lags if not isinstance(lag, int) or lag <= steps - draft])),
        persistence=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
    )


@given(plans())
def test_every_block_takes_each_step_once_and_never_a_step_back(plan):
    for column in zip(*plan.table()):
        assert column[0] == 0 and column[-1] == plan.steps
        assert all(after - before in (0, 1) for before, after in pairwise(column))


@given(plans())
def test_earlier_blocks_are_never_noisier(plan):
    assert all(list(row) == sorted(row, reverse=True) for row in plan.table())


@given(plans())
def test_moving_are_the_blocks_that_take_a_step(plan):
    table = plan.table()
    for k in range(plan.ticks):
        assert list(plan.moving(k)) == [g for g in range(len(plan.blocks)) if table[k + 1][g] > table[k][g]]
        assert plan.moving(k), "an idle tick"
        assert k < plan.draft or len(plan.moving(k)) <= plan.capacity
    assert not plan.moving(plan.ticks)


@given(plans(lags=(None,)))
def test_blocks_in_motion_never_exceed_the_window(plan):
    share = (plan.window - plan.overlap) / plan.window
    assert plan.alone or plan.capacity <= math.ceil((1 / share) ** (2 if plan.blocks.tiled else 1) - 1e-9)


@given(plans(lags=(0,)))
def test_no_lag_is_the_plain_schedule(plan):
    assert plan.table() == tuple((k,) * len(plan.blocks) for k in range(plan.steps + 1))
    assert plan.ticks == plan.steps and not plan.waits and not plan.commits


@given(plans(lags=("autoregressive",)))
def test_autoregressive_moves_one_block_at_a_time(plan):
    assert plan.lag == plan.steps - plan.draft or len(plan.blocks) == 1
    assert all(len(plan.moving(k)) == 1 for k in range(plan.draft, plan.ticks)) or plan.alone


@given(plans(), st.integers(0, 9), st.integers(1, 30))
def test_start_foretells_what_due_decides(plan, draft, run):
    if plan.alone:
        return
    cases = [(plan.draft, plan.steps - plan.draft), (draft, max(run, plan.lag))]
    for draft, run in cases:
        tick, since, ends, starts = draft, 0, [], []
        while len(starts) < len(plan.blocks):
            moving = sum(end > tick for end in ends)
            if plan.due(moving, tick - since):
                starts.append(tick)
                ends.append(tick + run)
                since = tick
            tick += 1
        assert starts == [plan.start(g, draft, run) for g in range(len(plan.blocks))]
        if (draft, run) == cases[0]:
            assert all(
                g in plan.moving(start) and g not in plan.moving(start - 1)
                for g, start in enumerate(starts)
                if start > draft
            )


@given(plans())
def test_what_comes_within_reach_is_stored_before_it_is_seen_and_once(plan):
    stored: list[int] = []
    for g, new in enumerate(plan.arrivals()):
        stored += new
        if plan.waits:
            moving = [plan.blocks[i] for i in plan.moving(plan.start(g))]
            reach = math.inf if plan.lookahead is None else plan.lookahead
            seen = {b.index for b in plan.blocks[g + 1 :] if min(b.gap(m) for m in moving) < reach}
            assert seen <= set(stored)
    assert len(stored) == len(set(stored))
    assert plan.waits or not stored


def test_what_has_passed_is_forgotten():
    arrivals = make_plan(4 * 10_000, 4, 2, window=8, overlap=4, lookahead=8).arrivals()
    next(arrivals)
    tracemalloc.start()
    assert sum(map(len, arrivals)) == 10_000 - 3
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000


def test_the_formula_in_numbers():
    plan = make_plan(128, 128, 20)
    assert (plan.size, len(plan.blocks), plan.lag, plan.ticks, plan.capacity) == (48, 3, 15, 50, 2)
    assert make_plan(128, 128, 20, "spiral-out").lag == 11  # 20 * (3/4)**2 = 11.25
    assert make_plan(128, 128, 20, draft=10).lag == 8  # 7.5, rounded to even as Python does
    assert make_plan(128, 128, 20, window=32, overlap=24).lag == 5
    # 10 / 4 = 2.5 rounds to 2: five blocks in motion, where the window touches four. So 3.
    assert make_plan(128, 128, 10, window=32, overlap=24).lag == 3
    assert [plan.index(k, 1) for k in (0, 15, 16, 35, 50)] == [0, 0, 1, 20, 20]
    draft = make_plan(128, 128, 20, draft=5, lag=4)
    assert [draft.index(k, 2) for k in (0, 4, 5, 6, 13, 14, 28, 29)] == [0, 4, 5, 5, 5, 6, 20, 20]


@mark.parametrize(
    ("order", "height", "width"), [("top-to-bottom", 64, 400), ("left-to-right", 400, 64), ("raster", 64, 40)]
)
def test_a_window_over_the_whole_canvas_is_one_block(order, height, width):
    plan = make_plan(height, width, 20, order)
    assert plan.alone and [b.cells for b in plan.blocks] == [height * width]
    assert plan.cost().relative == 1


def test_steps_may_be_given_as_sigmas():
    assert make_plan(128, 128, [1.0, 0.5, 0.0]) == make_plan(128, 128, 2)


def test_plans_are_values():
    plan = make_plan(128, 128, 20)
    assert plan == make_plan(128, 128, 20) and hash(plan) == hash(make_plan(128, 128, 20))
    assert {plan: 1}[make_plan(128, 128, 20)] == 1 and plan != replace(plan, seed=1)
    with raises(FrozenInstanceError):
        plan.lag = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_a_plan_of_any_length_costs_nothing():
    tracemalloc.start()
    plan = make_plan(48 * 10**7, 128, 20)
    assert len(plan.blocks) == 10**7
    assert plan.index(15 * 5 * 10**6 + 10, 5 * 10**6) == 10
    assert plan.moving(15 * 5 * 10**6) == range(5 * 10**6 - 1, 5 * 10**6 + 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000


def test_cost_of_the_textbook_plan():
    plan = make_plan(128, 128, 20)  # 3 strips of 48, 48 and 32 rows
    strips, canvas = (48 * 128 // 4, 48 * 128 // 4, 32 * 128 // 4), 128 * 128 // 4
    cost = plan.cost(text_tokens=512)
    assert (cost.ticks, cost.waiting_calls, cost.commits) == (50, 1, 2)
    assert cost.peak_moving_tokens == strips[0] + strips[1]
    assert cost.peak_visible_tokens == canvas + 512
    assert cost.token_evaluations == 20 * canvas + canvas + strips[0] + strips[1] + 512 * 53
    assert cost.relative == cost.token_evaluations / (20 * (canvas + 512))
    assert cost.tokens_per_tick == 20 * canvas / 50 + 512


def test_memory_that_is_off_costs_nothing():
    plan = make_plan(128, 128, 20, lookahead=0, persistence=0)
    assert plan.cost().relative == 1 and plan.cost().peak_visible_tokens == plan.cost().peak_moving_tokens
    assert make_plan(128, 128, 20, persistence=0).cost().relative == 21 / 20


def test_long_canvases_see_a_bounded_part():
    reach = {"lookahead": 64, "persistence": 0.5}
    seen = {h: make_plan(h, 128, 20, **reach).cost().peak_visible_tokens for h in (48 * 20, 48 * 200)}
    assert seen[48 * 20] == seen[48 * 200] == (9 + 2 + 2) * 48 * 128 // 4  # 0.5**9 > 1e-3; two in motion; two ahead
    assert make_plan(48 * 200, 128, 20).cost(cap=4096).peak_visible_tokens == 4096 + 2 * 48 * 128 // 4


def test_a_plan_prints_its_cost():
    text = str(make_plan(128, 128, 20))
    assert "3 blocks top-to-bottom" in text and "lag 15" in text
    assert "50 ticks + 1 for waiting blocks + 2 commits" in text and "1.09 of a full pass" in text


@mark.parametrize(
    ("change", "message"),
    [
        ({"order": "up"}, "unknown order 'up': choose one of"),
        ({"window": 0}, "window is 0 cells, and must be a positive multiple of 2"),
        ({"window": 1}, "window is 1 cells, and must be a positive multiple of 2"),
        ({"height": 127}, "height is 127 cells, and must be a positive multiple of 2"),
        ({"overlap": 64}, "overlap is 64 cells, and must be a multiple of 2 from 0 to below the window of 64"),
        ({"overlap": -2}, "overlap is -2 cells"),
        ({"overlap": 3}, "overlap is 3 cells"),
        ({"steps": 0}, "steps is 0, and must be at least 1"),
        ({"draft": 20}, "draft is 20 steps, and must be from 0 to 19"),
        ({"draft": -1}, "draft is -1 steps"),
        ({"lookahead": -1}, "lookahead is -1 cells, and must be at least 0"),
        ({"lag": 21}, "lag is 21, and must be from 0 to 20"),
        ({"lag": "slow"}, "lag is 'slow'"),
        ({"persistence": 1.5}, "persistence is 1.5, and must be from 0 to 1"),
        ({"extrapolation": 1.5}, "extrapolation is 1.5, and must be from 0 to 1"),
        ({"extrapolation": "far"}, "extrapolation is 'far', and must be from 0 to 1"),
        ({"extrapolation": 0.4}, "extrapolation is 0.4, and needs a draft of at least 1 step"),
        ({"order": "difficulty", "draft": 1}, "draft is 1 steps, and the order 'difficulty' needs at least 2"),
        ({"persistence": math.nan}, "persistence is nan"),
        ({"multiple": 0}, "multiple is 0"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, message):
    with raises(ValueError) as caught:
        make_plan(**{"height": 128, "width": 128, "steps": 20, **change})
    assert message in str(caught.value) and "\n" not in str(caught.value)


@mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 4.0}, "steps is 4.0, and must be a whole number"),
        ({"steps": True}, "steps is True, and must be a whole number"),
        ({"height": 128.0}, "height is 128.0, and must be a whole number of cells"),
        ({"window": True}, "window is True, and must be a whole number of cells"),
        ({"overlap": "16"}, "overlap is '16', and must be a whole number of cells"),
        ({"draft": 2.5}, "draft is 2.5, and must be a whole number of steps"),
        ({"lookahead": 1.5}, "lookahead is 1.5, and must be a whole number of cells"),
        ({"lag": True}, "lag is True, and must be a whole number of ticks"),
        ({"seed": None}, "seed is None, and must be a whole number"),
        ({"steps": np.array([1.0])}, "steps is 0, and must be at least 1"),
        ({"persistence": "all"}, "persistence is 'all', and must be from 0 to 1"),
    ],
)
def test_what_is_no_whole_number_is_refused_in_one_sentence(change, message):
    with raises(ValueError) as caught:
        make_plan(**{"height": 128, "width": 128, "steps": 20, **change})
    assert str(caught.value).startswith(message)


@mark.parametrize("kind", [np.int64, np.uint8, np.int16])
def test_numpy_s_integers_are_whole_numbers(kind):
    numbers = {
        "height": 128,
        "width": 64,
        "steps": 4,
        "window": 32,
        "overlap": 8,
        "draft": 1,
        "lookahead": 16,
        "lag": 2,
    }
    plan = make_plan(**{name: kind(n) for name, n in numbers.items()}, multiple=kind(2), seed=kind(1))
    assert plan == make_plan(**numbers, multiple=2, seed=1)
    assert all(type(value) in (int, str, float, tuple, type(None)) for value in asdict(plan).values())
    assert plan_for(Card(), kind(128), kind(64), kind(4)) == plan_for(Card(), 128, 64, 4)
    assert make_plan(128, 64, np.linspace(1, 0, 5)) == make_plan(128, 64, 4)


def test_no_steps_are_refused_by_that_name():
    for none in (0, np.int64(0), [1.0]):
        with raises(ValueError, match="steps is 0, and must be at least 1"):
            plan_for(Card(), 128, 128, none)
        with raises(ValueError, match="steps is 0, and must be at least 1"):
            plan_for(Card(), 128, 128, none, calls_per_step=2)


@given(plans(), st.sampled_from([None, 30]))
def test_a_sample_counts_strips_as_if_it_went_through_them_all(plan, cap):
    plan = replace(plan, order="bottom-to-top", height=plan.height * 60)
    exact = plan.cost(7, cap)
    with MonkeyPatch.context() as patch:
        patch.setattr(cost, "MOST", 64)
        cost.count.cache_clear()
        sampled = plan.cost(7, cap)
        cost.count.cache_clear()
    if cap is None:
        assert sampled == exact
    else:  # where the cap is reached the sum has a bend
        assert replace(sampled, pairs=0) == replace(exact, pairs=0)
        assert isclose(sampled.pairs, exact.pairs, rel_tol=0.02)


@mark.parametrize("order", ["random", "spiral-out", "raster"])
def test_a_sample_of_tiles_comes_near(order):
    plan = make_plan(120, 140, 12, order, window=12, overlap=8, draft=4, lookahead=8, persistence=0.3)
    with MonkeyPatch.context() as patch:
        patch.setattr(cost, "WORK", 2**40)
        exact = plan.cost(7)
        cost.count.cache_clear()
        patch.setattr(cost, "MOST", 256)
        sampled = plan.cost(7)
        cost.count.cache_clear()
    assert replace(sampled, pairs=0, peak_visible_tokens=0) == replace(exact, pairs=0, peak_visible_tokens=0)
    assert isclose(sampled.pairs, exact.pairs, rel_tol=0.02)
    assert isclose(sampled.peak_visible_tokens, exact.peak_visible_tokens, rel_tol=0.2)


@mark.parametrize(
    "given",
    [
        {"height": 400_000, "width": 32, "lookahead": 64, "persistence": 0.5},
        {"height": 40_000_000, "width": 32},
        {"height": 1264, "width": 1264, "order": "random", "lookahead": 16, "persistence": 0.5},
        {"height": 1264, "width": 1264, "order": "spiral-out", "lookahead": 700, "persistence": 0.99},
    ],
)
def test_a_huge_plan_is_counted_in_seconds(given):
    plan = make_plan(steps=20, window=16, overlap=12, draft=10, **given)
    started = time.process_time()
    assert plan.cost(512).relative > 1
    assert time.process_time() - started < 15  # it takes 2; minutes, if each block were counted


@given(plans(), st.randoms(use_true_random=False))
def test_a_decided_order_is_the_same_plan_in_another_order(plan, draw):
    plan = replace(plan, order="difficulty", draft=min(2, plan.steps - 1), lag=min(plan.lag, 1))
    numbers = [draw.choice([0.0, 0.5, draw.random()]) for _ in plan.blocks]
    decided = plan.decided(numbers)
    assert decided.late is False and decided.blocks.name == "difficulty"
    assert set(decided.blocks) == set(plan.blocks)
    assert [b.index for b in decided.blocks] == list(range(len(plan.blocks)))
    known = dict(zip(plan.blocks, numbers))
    assert [known[b] for b in decided.blocks] == sorted(numbers)
    ties = [[b for b in order if known[b] == 0.5] for order in (plan.blocks, decided.blocks)]
    assert ties[0] == ties[1]
    assert decided.table() == plan.table() and decided.size == plan.size and decided.blocks.tiled == plan.blocks.tiled
    assert hash(decided) and decided.cost().ticks == plan.cost().ticks


def test_what_is_counted_before_an_order_is_decided_is_what_it_costs():
    """Where every block sees the whole canvas."""
    plan = make_plan(32, 24, 8, "difficulty", window=16, overlap=8, draft=2)
    assert plan.late and str(plan).splitlines()[0].endswith("blocks difficulty, decided at the end of the draft")
    decided = plan.decided([float(-g) for g in range(len(plan.blocks))])
    assert decided.cost(3) == plan.cost(3)


def test_no_lag_or_one_block_has_nothing_to_decide():
    for given_ in ({"lag": 0}, {"window": 32, "overlap": 0}):
        plan = make_plan(32, 32, 8, "difficulty", extrapolation=0.5, **{"window": 16, "overlap": 8, **given_})
        assert plan.alone and not plan.late
