"""Defaults: what was said, what the card says and what fits the canvas, as one plan for every front-end."""

import json
from dataclasses import asdict
from pathlib import Path

from pytest import mark, raises

import rolling_diffusion
from rolling_diffusion.cli.main import main
from rolling_diffusion.core.order import ORDERS, span
from rolling_diffusion.defaults import Card, plan_for

FLUX = Card()
EMBEDDED = Card.in_folder(Path(rolling_diffusion.__file__).parent / "embedded")


def test_the_cards():
    assert EMBEDDED.trained and (EMBEDDED.size, EMBEDDED.steps, EMBEDDED.window) == (256, 20, None)
    assert Card.in_folder("no/such/folder") == FLUX
    assert rolling_diffusion.Card is Card and rolling_diffusion.plan_for is plan_for


def test_flux_s_defaults():
    plan = plan_for(FLUX, 128, 128, 28)
    assert (plan.window, plan.overlap, plan.draft, plan.lookahead) == (64, 16, 14, None)
    assert plan_for(FLUX, 256, 128, 28).lookahead == 64  # beyond its native size: one window
    assert plan_for(FLUX, 256, 128, 28, window=32).lookahead == 32
    assert plan_for(FLUX, 256, 128, 28, lookahead=None) == plan_for(FLUX, 256, 128, 28, lookahead="all")
    assert plan_for(FLUX, 256, 128, 28, lookahead="all").lookahead is None
    assert plan_for(FLUX, 128, 128, 28, lookahead=0, draft=0).draft == 0


def test_a_card_without_a_window_takes_half_of_the_canvas():
    plan = plan_for(EMBEDDED, 32, 32, 20)
    assert (plan.window, plan.overlap, plan.draft, plan.lookahead) == (16, 8, 10, None)
    assert plan_for(EMBEDDED, 64, 32, 20, order="spiral-out").window == 32
    assert plan_for(EMBEDDED, 128, 64, 28).overlap == 32
    assert (plan_for(EMBEDDED, 2, 2, 4).window, plan_for(EMBEDDED, 2, 2, 4).overlap) == (2, 0)


@mark.parametrize("card", [FLUX, EMBEDDED])
def test_the_overlap_is_at_most_half_of_the_window(card):
    assert [plan_for(card, 128, 128, 20, window=w).overlap for w in (24, 16, 6, 2)] == [12, 8, 2, 0]


@mark.parametrize("order", ORDERS)
@mark.parametrize("height, width", [(32, 32), (128, 32), (30, 58), (6, 6), (4, 4), (2, 2), (512, 128)])
def test_the_fitted_window_always_makes_a_plan(order, height, width):
    plan = plan_for(EMBEDDED, height, width, 20, order=order)
    extent = span(order, height, width)
    assert 0.3 * extent <= plan.window <= max(4, 0.7 * extent)
    assert len(plan.blocks) > 1 or extent <= 4


def test_heun_s_steps_are_two_ticks_and_one_for_the_last():
    plan = plan_for(FLUX, 128, 128, 20, calls_per_step=2)
    assert (plan.steps, plan.draft) == (39, 20)
    assert plan_for(FLUX, 128, 128, 20, draft=19, calls_per_step=2).draft == 38
    with raises(ValueError, match="draft is 20 steps, and must be from 0 to 19"):
        plan_for(FLUX, 128, 128, 20, draft=20, calls_per_step=2)


@mark.parametrize(
    ("argv", "card", "canvas"),
    [
        ((), EMBEDDED, (32, 32)),
        (("--width", "512", "--order", "spiral-out"), EMBEDDED, (32, 64)),
        (("--height", "2048", "--window", "24"), EMBEDDED, (256, 32)),
        (("--model", "black-forest-labs/FLUX.1-dev"), FLUX, (128, 128)),
        (("--model", "black-forest-labs/FLUX.1-dev", "--height", "2048"), FLUX, (256, 128)),
    ],
)
def test_the_command_line_makes_the_same_plans(argv, card, canvas, tmp_path):
    file = tmp_path / "plan.json"
    assert main(["plan", *argv, "--json", str(file)]) == 0
    said = {"order": "spiral-out"} if "spiral-out" in argv else {"window": 24} if "24" in argv else {}
    plan = plan_for(card, *canvas, card.steps, **said, guide="auto")
    assert json.loads(file.read_text())["plan"] == json.loads(json.dumps(asdict(plan)))


@mark.parametrize(
    ("change", "message"),
    [
        ({"lookahead": "far"}, 'lookahead is \'far\', and must be a number of cells, "all" or "auto"'),
        ({"draft": 20}, "draft is 20 steps, and must be from 0 to 19"),
        ({"window": 1}, "window is 1 cells, and must be a positive multiple of 2"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, message):
    with raises(ValueError) as caught:
        plan_for(FLUX, 128, 128, 20, **change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@mark.parametrize(
    ("text", "words"),
    [("[]", "must hold an object"), ('{"rolling": 1}', '"rolling" in .* is 1'), ("{", "is not valid JSON")],
)
def test_a_card_that_cannot_be_read_is_one_sentence(text, words, tmp_path):
    (tmp_path / "model_index.json").write_text(text)
    with raises(ValueError, match=words):
        Card.in_folder(tmp_path)
