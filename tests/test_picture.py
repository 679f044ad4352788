"""The picture of a plan tells the truth about it."""

import time

import numpy as np
import pytest

from rolling_diffusion import picture
from rolling_diffusion.core.order import ROUTES
from rolling_diffusion.core.plan import make_plan

KNOWN = [route.name for route in ROUTES.values() if not route.late]


def test_noise_is_the_plans_table():
    plan = make_plan(32, 32, 10, window=16, overlap=8, draft=2)
    ticks, blocks, noise = picture.noise_table(plan)
    assert ticks.tolist() == list(range(plan.ticks + 1)) and blocks.tolist() == [0, 1, 2, 3]
    assert np.allclose(noise, 1 - np.array(plan.table()).T / plan.steps)


def test_noise_follows_the_sigmas():
    plan = make_plan(32, 32, 2, window=16, overlap=8)
    noise = picture.noise_table(plan, sigmas=[4.0, 1.0, 0.0])[2]
    assert set(noise.ravel().tolist()) == {1.0, 0.25, 0.0}


def test_a_long_plan_is_sampled_from_first_to_last():
    plan = make_plan(100_000, 32, 28, window=64, overlap=56)
    ticks, blocks, noise = picture.noise_table(plan)
    assert len(ticks) <= picture.COLUMNS and len(blocks) <= picture.ROWS
    assert (ticks[0], ticks[-1], blocks[-1]) == (0, plan.ticks, len(plan.blocks) - 1)
    assert (noise[:, 0] == 1).all() and (noise[:, -1] == 0).all()


@pytest.mark.parametrize("order", KNOWN)
def test_the_heat_map_lights_up_in_order(order):
    plan = make_plan(32, 32, 8, order, window=16, overlap=0)
    image = np.asarray(picture.plan_picture(plan))
    left, top, right, _ = picture.CANVAS
    scale = (right - left) / 32
    corners = [image[int(top + b.top * scale) + 4, int(left + b.left * scale) + 4] for b in plan.blocks]
    assert np.array_equal(corners, picture.ramp(picture.ORDER, np.linspace(0, 1, len(plan.blocks))))


@pytest.mark.parametrize("order", KNOWN)
def test_many_small_blocks_are_drawn_in_their_order(order):
    plan = make_plan(4 * 115, 4 * 115, 8, order, window=8, overlap=4)  # a pixel a cell
    image = np.asarray(picture.plan_picture(plan))
    left, top = picture.CANVAS[:2]
    for y, x in ((0, 0), (20, 400), (230, 232), (459, 10), (459, 459)):
        expected = picture.ramp(picture.ORDER, np.array(plan.blocks.at(y, x) / (len(plan.blocks) - 1)))
        assert np.array_equal(image[top + y, left + x], expected)


def test_an_order_that_is_decided_late_is_not_shown_before():
    """However many blocks there are, and whatever way serves to count them."""
    for size, window in ((32, 16), (4 * 115, 8)):
        plan = make_plan(size, size, 8, "difficulty", window=window, overlap=window // 2, draft=2)
        image = np.asarray(picture.plan_picture(plan))
        left, top, right, bottom = picture.CANVAS
        seen = image[top + 4 : bottom - 4, left + 4 : right - 4].reshape(-1, 3)
        colours, counts = np.unique(seen, axis=0, return_counts=True)
        assert tuple(colours[counts.argmax()]) == picture.UNDECIDED and counts.max() > 0.9 * len(seen)


def test_a_huge_plan_is_drawn_in_seconds():
    plan = make_plan(1264, 1264, 20, "random", window=16, overlap=12, draft=10, lookahead=16, persistence=0.5)
    started = time.process_time()
    picture.plan_picture(plan)
    assert time.process_time() - started < 15  # it takes 3; minutes, if each block were counted and drawn


def test_the_chart_starts_in_noise_and_ends_clean():
    image = np.asarray(picture.plan_picture(make_plan(64, 64, 20, "spiral-out", window=32, overlap=16)))
    left, top, right, bottom = picture.CHART
    assert image[bottom - 3, left + 3].tolist() == list(picture.NOISE[-1])
    assert image[top + 3, right - 3].tolist() == list(picture.NOISE[0])


def test_marks_are_round_numbers():
    assert picture._marks(0, 44) == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    assert picture._marks(1, 4) == [1, 2, 3, 4]
    assert picture._marks(1, 64) == [1, 10, 20, 30, 40, 50, 60]
    assert picture._marks(7, 36) == [7, 10, 15, 20, 25, 30, 35]


def test_the_chart_begins_where_a_guide_ends():
    plan = make_plan(128, 128, 20, window=64, overlap=16, draft=10, guide=(64, 64))
    ticks, _, noise = picture.noise_table(plan)
    assert ticks.tolist() == list(range(10, plan.ticks + 1)) and (noise[:, 0] == 0.5).all()
