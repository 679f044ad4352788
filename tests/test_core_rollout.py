"""The rollout: what it calls and when, what it shows, and how little it holds."""

import gc
import math
import tracemalloc
import weakref
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx, mark, raises
from tiny_denoiser import SIGMAS, TWO, Log, S, euler, noise, plan_of, run

from rolling_diffusion.core.cohort import block_seed
from rolling_diffusion.core.memory import Memory
from rolling_diffusion.core.order import Block
from rolling_diffusion.core.plan import make_plan
from rolling_diffusion.core.rollout import rollout


def events(plan, **given):
    log = Log()
    for block, _ in rollout(plan, log, euler, SIGMAS, noise, **given):
        log.events.append(("yield", block.index))
    return log.events


def test_the_protocol_in_sequence():
    assert events(plan_of(lag=2)) == [
        ("keep", [0, 1, 2]),
        ("start", 0),
        ("denoise", [0]),
        ("denoise", [0]),
        ("start", 1),
        ("denoise", [0, 1]),
        ("denoise", [0, 1]),
        ("commit", 0),
        ("yield", 0),
        ("start", 2),
        ("denoise", [1, 2]),
        ("denoise", [1, 2]),
        ("commit", 1),
        ("yield", 1),
        ("denoise", [2]),
        ("denoise", [2]),
        ("yield", 2),
    ]


def test_the_draft_moves_all_blocks_and_is_what_waiting_memory_holds():
    assert events(plan_of(**TWO, draft=2)) == [
        ("denoise", [0, 1]),
        ("denoise", [0, 1]),
        ("keep", [0, 1]),
        ("start", 0),
        ("denoise", [0]),
        ("denoise", [0]),
        ("commit", 0),
        ("yield", 0),
        ("start", 1),
        ("denoise", [1]),
        ("denoise", [1]),
        ("yield", 1),
    ]


def test_memory_that_is_off_is_never_asked_for():
    for kind in ("keep", "start"):
        assert kind not in dict(events(plan_of(lookahead=0)))
    assert "commit" not in dict(events(plan_of(persistence=0)))
    for plan in (plan_of(1), plan_of(lag=0)):
        blocks = [b.index for b in plan.blocks]
        assert events(plan) == [("denoise", blocks)] * S + [("yield", b) for b in blocks]


def test_a_short_lookahead_is_stored_as_the_window_comes_near():
    kept = [what for event, what in events(plan_of(5, lag="autoregressive", lookahead=5)) if event == "keep"]
    assert kept == [[0, 1, 2], [3], [4]]


@mark.parametrize("lag", [1, 2, 4])
def test_lag_counts_model_calls_and_the_window_is_never_exceeded(k_sampling, lag):
    plan, log = plan_of(5, lag=lag, lookahead=0), Log()
    assert run(plan, log, k_sampling.sample_heun) == [0, 1, 2, 3, 4]
    moving = [what for event, what in log.events if event == "denoise"]
    assert max(map(len, moving)) == plan.capacity
    assert next(k for k, blocks in enumerate(moving) if 1 in blocks) == (lag if plan.capacity > 1 else 2 * S - 1)
    assert all(sum(g in blocks for blocks in moving) == 2 * S - 1 for g in range(5))


class Remembering(Log):
    """Puts one key per token into a real Memory, and counts what its calls compute and see."""

    def __init__(self, plan, text):
        super().__init__()
        self.plan, self.text, self.computed, self.seen, self.calls = plan, text, 0, 0, 0
        self.memory = Memory(plan.rule)

    def call(self, blocks, kind=None):
        tokens = self.text + sum(self.plan.tokens(b) for b in blocks)
        self.computed += tokens
        view = self.memory.view(blocks)
        for block in blocks if kind else ():
            ones = torch.ones(1, self.plan.tokens(block), 1, 1)
            self.memory.put(kind, block, 0, ones, ones)
        return tokens + (0 if view is None else view.layer(0)[0].shape[1])

    def denoise(self, moving, keep=False):
        seen = self.call([m.block for m in moving], "waiting" if keep else None)
        self.calls += not keep
        if not keep and self.calls > self.plan.draft:
            self.seen = max(self.seen, seen)
        return super().denoise(moving, keep)

    def commit(self, block, x0):
        super().commit(block, x0)
        self.call([block], "finished")

    def start(self, block):
        super().start(block)
        self.memory.start(block)


@given(st.data())
def test_a_plan_knows_its_cost(data):
    order = data.draw(st.sampled_from(["top-to-bottom", "right-to-left", "spiral-out", "raster", "random"]))
    plan = make_plan(
        data.draw(st.integers(2, 8)) * 2,
        data.draw(st.integers(2, 8)) * 2,
        S,
        order,
        window=8,
        overlap=4,
        draft=data.draw(st.integers(0, 2)),
        lookahead=data.draw(st.sampled_from([None, 0, 1, 5, 9])),
        lag=data.draw(st.sampled_from([None, 0, 1, "autoregressive"])),
        persistence=data.draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])),
    )
    if data.draw(st.booleans()):
        plan = replace(plan, order=tuple(plan.blocks))  # the same blocks, as the caller's own
    cost, text = plan.cost(text_tokens=3), 3
    model = Remembering(plan, text)
    run(plan, model)
    happened = [event for event, _ in model.events]
    assert cost.ticks == happened.count("denoise")
    assert cost.waiting_calls == happened.count("keep")
    assert cost.commits == happened.count("commit")
    assert cost.token_evaluations == model.computed
    assert cost.peak_visible_tokens == model.seen
    assert cost.relative == model.computed / (S * (plan.height * plan.width // 4 + text))


def test_ten_thousand_blocks_stream_through_constant_memory():
    plan = make_plan(40_000, 4, 2, window=8, overlap=4, lookahead=8)
    alive, most, peaks, sizes = weakref.WeakSet(), 0, [], []

    class Counting(Log):
        def denoise(self, moving, keep=False):
            nonlocal most
            answers = super().denoise(moving, keep)
            alive.update(answers)
            most = max(most, len(alive))
            self.events.clear()
            return answers

    def drawn(block):
        x = torch.ones(1, 1, block.height, block.width)
        alive.add(x)
        return x

    done = 0
    for block, x in rollout(plan, Counting(), euler, SIGMAS[::2], drawn):
        assert block.index == done
        alive.add(x)
        done += 1
        if done in (100, 500, 9_500):
            gc.collect()
            sizes.append(len(gc.get_objects()))
            tracemalloc.start()
        if done in (200, 600, 9_600):
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert done == len(plan.blocks) == 10_000
    assert most <= 20  # tensors of a handful of blocks, never of the canvas
    assert peaks[2] < peaks[1] + 20_000 < 100_000  # bytes, in a hundred blocks near the start and near the end
    assert sizes[2] < sizes[1] + 1000  # Python objects in all, over nine thousand blocks


class Restless(Log):
    """Its guess at a block moves by so much a call: by so much more the further right and down the block lies."""

    def __init__(self):
        super().__init__()
        self.calls, self.kept = 0, []

    def denoise(self, moving, keep=False):
        super().denoise(moving, keep)
        if keep:
            self.kept = list(moving)
            return [m.x for m in moving]
        self.calls += 1
        return [torch.full_like(m.x, self.calls * (10 * (4 - m.block.top) + m.block.left)) for m in moving]


def test_an_order_of_difficulty_is_decided_at_the_end_of_the_draft():
    plan = make_plan(8, 8, S, "difficulty", window=4, overlap=0, draft=2)
    model, x = Restless(), torch.randn(1, 1, 8, 8)

    def part(block):
        return x[..., block.rows, block.columns]

    drawn = list(rollout(plan, model, euler, SIGMAS, part))
    assert [(b.index, b.top, b.left) for b, _ in drawn] == [(0, 4, 0), (1, 4, 4), (2, 0, 0), (3, 0, 4)]
    assert [what for event, what in model.events if event == "commit"] == [0, 1, 2]
    explicit = replace(plan, order=tuple(block for block, _ in drawn))
    again, frames = Restless(), []
    for (_, one), (_, two) in zip(drawn, rollout(explicit, again, euler, SIGMAS, part, callback=frames.append)):
        assert torch.equal(one, two)
    assert [len(what) for _, what in model.events[:3]] == [4, 4, 4] and model.events[3:] == again.events[3:]
    plain = list(rollout(replace(plan, lag=0), Restless(), euler, SIGMAS, part))
    assert [b.index for b, _ in plain] == [0, 1, 2, 3]


@mark.parametrize("order", ["raster", "difficulty"])
def test_waiting_blocks_are_stored_from_further_along_the_draft_s_velocity(order):
    x, kept = torch.randn(1, 1, 8, 8), {}
    for share in (0, 0.4):
        plan = make_plan(8, 8, S, order, window=4, overlap=0, draft=2, extrapolation=share)
        model = Restless()
        list(rollout(plan, model, euler, SIGMAS, lambda block: x[..., block.rows, block.columns]))
        kept[share] = {m.block: (m.x, float(m.sigma)) for m in model.kept}
    assert len(kept[0]) == 4
    for block, (state, sigma) in kept[0].items():
        further, level = kept[0.4][block]
        guess = 2 * (10 * (4 - block.top) + block.left)  # of the draft's second call
        velocity = (state - guess) / sigma
        assert sigma == 0.5 and level == approx(0.3)
        assert torch.allclose(further, state + (level - sigma) * velocity, atol=1e-5)


def test_blocks_come_as_soon_as_they_are_finished():
    log = Log()
    stream = rollout(plan_of(3, lag=2), log, euler, SIGMAS, noise)
    assert log.events == []
    next(stream)
    assert sum(event == "denoise" for event, _ in log.events) == S
    stream.close()


BOTTOM = Block(0, 8, 0, 4, 4)


@mark.parametrize("order", ["top-to-bottom", "bottom-to-top"])
def test_what_is_given_is_committed_first_and_never_moves(order):
    plan = make_plan(12, 4, S, order, window=6, overlap=2, draft=1, given=[BOTTOM])
    log, frames = Log(), []
    drawn = [b for b, _ in rollout(plan, log, euler, SIGMAS, noise, callback=frames.append, given=canvas_of(7.0))]
    assert log.events[:3] == [("commit", 2), ("denoise", [0, 1]), ("keep", [0, 1])]
    assert [what for event, what in log.events if event == "commit"] == [2, 0]
    assert drawn == list(plan.blocks) and all(2 not in [b.index for b in frame.blocks] for frame in frames)
    assert frames[0].canvas[..., 8:, :].eq(7).all()


@mark.parametrize("lag", [None, 0])
def test_what_is_left_may_be_one_block_or_all_at_one_level(lag):
    """A block is then the sampler on that block alone."""
    window = {"window": 64, "overlap": 0} if lag is None else {"window": 4, "overlap": 0}
    plan = make_plan(12, 4, S, **window, lag=lag, given=[BOTTOM])
    assert plan.alone and len(plan.blocks) == (1 if lag is None else 2)
    log, frames = Log(), []
    x = torch.randn(1, 1, 12, 4)

    def part(block):
        return x[..., block.rows, block.columns]

    drawn = list(rollout(plan, log, euler, SIGMAS, part, given=part, callback=frames.append))
    indices = [b.index for b in plan.blocks]
    assert log.events == [("commit", len(indices))] + [("denoise", indices)] * S
    assert [frame.total for frame in frames] == [S] * S
    for block, found in drawn:
        assert torch.equal(found, euler(lambda x, sigma: x / 2, part(block), SIGMAS))


def test_without_persistence_what_is_given_is_not_committed():
    plan = make_plan(12, 4, S, window=6, overlap=2, persistence=0, given=[BOTTOM])
    log = Log()
    list(rollout(plan, log, euler, SIGMAS, noise, given=canvas_of(0.0)))
    assert "commit" not in dict(log.events)


def test_cells_that_are_given_within_a_block_leave_it_a_block():
    plan = make_plan(12, 4, S, window=6, overlap=0, given=[Block(0, 0, 0, 2, 2)])
    assert plan.pieces == () and run(plan) == [0, 1]


@mark.parametrize("persistence", [0.5, 1.0])
def test_what_is_given_ahead_is_still_there_when_the_order_comes_to_it(persistence):
    """Thirty blocks away it is out of sight, and not forgotten."""
    ends = [Block(0, 0, 0, 2, 4), Block(0, 62, 0, 2, 4)]
    for order in ("top-to-bottom", "bottom-to-top"):
        plan = make_plan(64, 4, S, order, window=2, overlap=0, persistence=persistence, given=ends)
        model = Remembering(plan, 0)
        list(rollout(plan, model, euler, SIGMAS, noise, given=canvas_of(0.0)))
        assert all(piece in model.memory._stored["finished"] for piece in plan.pieces)


def canvas_of(value):
    return lambda block: torch.full((1, 1, block.height, block.width), value)


def test_frames_show_the_whole_canvas():
    plan, frames = plan_of(3, lag=2), []
    last = {}

    def look(frame):
        frames.append(frame)
        last["canvas"] = frame.canvas
        level = [SIGMAS[plan.index(frame.tick, b.index)] for b in frame.blocks]
        assert list(frame.sigmas) == level
        for block, x0 in zip(frame.blocks, frame.estimates):
            assert torch.equal(frame.canvas[..., block.rows, block.columns], x0)

    result = torch.zeros(1, 1, 12, 4)
    for block, x in rollout(plan, Log(), euler, SIGMAS, noise, callback=look):
        result[..., block.rows, block.columns] = x
    assert torch.equal(last["canvas"], result)
    assert torch.equal(frames[0].canvas[..., 4:, :], torch.zeros(1, 1, 8, 4))
    assert [frame.tick for frame in frames] == list(range(plan.ticks)) and frames[0].total == plan.ticks


def test_a_canvas_is_kept_only_for_those_who_look():
    streams = []

    def peek(frame):
        streams.append(frame._preview.canvas)
        if frame.tick == 4:
            assert not frame.canvas[..., :4, :].any() and frame.canvas[..., 4:12, :].all()

    run(plan_of(3, lag=2), callback=peek)
    assert streams[:5] == [None] * 5 and streams[5] is not None


def test_the_sampler_sees_the_denoisers_attributes_and_its_own_seed():
    seen = []

    def curious(model, x, sigmas, extra_args=None, **options):
        seen.append((model.inner_model, extra_args))
        return euler(model, x, sigmas, extra_args, **options)

    plan = plan_of(**TWO, lag=1)
    run(plan, sampler=curious, seed=5, options={"extra_args": {"cond": "a house", "seed": 5}})
    assert seen == [("the real one", {"cond": "a house", "seed": block_seed(5, block)}) for block in plan.blocks]
    seen.clear()
    run(plan_of(1), sampler=curious, seed=5, options={"extra_args": {"seed": 5}})
    assert seen == [("the real one", {"seed": 5})]


def test_options_may_depend_on_the_block(k_sampling):
    shapes = []

    def options(block):
        def draw(sigma, sigma_next):
            shapes.append((block.index, block.height))
            return torch.zeros(1, 1, block.height, block.width)

        return {"noise_sampler": draw}

    run(plan_of(**TWO), sampler=k_sampling.sample_euler_ancestral, options=options)
    assert shapes == [(0, 4)] * (S - 1) + [(1, 4)] * (S - 1)
    shapes.clear()
    run(plan_of(**TWO, lag=0), sampler=k_sampling.sample_euler_ancestral, options=options, callback=lambda frame: None)
    assert shapes == [(0, 8)] * (S - 1)


def test_with_noise_left_over_the_clean_estimate_is_committed():
    committed = []

    class Committing(Log):
        def commit(self, block, x0):
            committed.append(x0)

    plan, left = plan_of(**TWO), SIGMAS + 0.5
    (_, first), _ = rollout(plan, Committing(), euler, left, noise)
    step = 1 - (left[-2] - left[-1]) / left[-2] / 2  # of x, for x0 = x / 2
    torch.testing.assert_close(committed[0], first / step / 2)


@mark.parametrize(
    ("change", "message"),
    [
        ({"sigmas": SIGMAS[1:]}, r"sigmas has shape \(4,\), but 4 steps need 5 values"),
        ({"sigmas": SIGMAS.flip(0)}, "sigmas must be finite, never rise"),
        ({"sigmas": SIGMAS - 1}, "sigmas must be finite, never rise and end at 0 or above"),
        ({"sigmas": SIGMAS * math.nan}, "sigmas must be finite"),
        ({"options": {"noise_sampler": None}}, "one noise_sampler cannot serve several blocks"),
        ({"calls": [0, 1, 2]}, "calls must be 5 rising numbers for 4 steps"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(change, message):
    given = {"sigmas": SIGMAS, **change}
    with raises(ValueError, match=message):
        rollout(plan_of(), Log(), euler, given.pop("sigmas"), noise, **given)


def test_a_plan_with_given_parts_needs_what_they_hold():
    plan = make_plan(12, 4, S, window=6, overlap=2, given=[BOTTOM])
    with raises(ValueError, match="the plan has parts that are given: say what they hold"):
        rollout(plan, Log(), euler, SIGMAS, noise)


def test_a_sampler_without_steps_is_refused_where_steps_matter():
    runs = []

    def silent(model, x, sigmas, callback=None, disable=None, **options):
        runs.append(x)
        return euler(model, x, sigmas, **options)

    assert run(plan_of(), sampler=silent) == [0, 1, 2]
    with raises(ValueError, match="the sampler reports 0 steps for 4"):
        run(plan_of(draft=1), sampler=silent)
    runs.clear()
    plan, totals = plan_of(draft=1), set()
    assert run(plan, sampler=silent, calls=range(S + 1), callback=lambda frame: totals.add(frame.total)) == [0, 1, 2]
    assert totals == {plan.ticks} and len(runs) == 3  # none of them to count calls
