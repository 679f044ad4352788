"""Settings: every number behind a picture, and the plan that they make."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import Any

from ..core.order import ORDERS, Block
from ..core.plan import Plan
from ..defaults import CELL, EVERYWHERE, MOST_STEPS, SIDE, TOKEN, Card, plan_for
from .arguments import Parser, decimal, name_in, number_or, seed, whole_number

PLAN_DEFAULTS: dict[str, Any] = {
    "width": None,
    "height": None,
    "steps": None,
    "order": "top-to-bottom",
    "window": None,
    "overlap": None,
    "draft": None,
    "guide": None,
    "lookahead": None,
    "lag": None,
    "persistence": 1.0,
    "extrapolation": None,
    "seed": 0,
}


GUIDE: dict[Any, bool] = {"on": True, "off": False}


def add_plan_options(
    parser: Parser, sides: bool = True, orders: Collection[str] = ORDERS, order: str = "top-to-bottom"
) -> None:
    """The options that make a plan. All default to None, so that what was said stays apart from what is filled in.

    sides: with those of a canvas whose size is known; orders, order: those to choose from, if any, and the default."""
    group = parser.add_argument_group("the plan")
    add = group.add_argument
    if sides:
        add("--width", type=whole_number(1), metavar="PIXELS", help="a multiple of 16 (default: the model's own)")
        add("--height", type=whole_number(1), metavar="PIXELS", help="a multiple of 16 (default: the model's own)")
    add(
        "--steps",
        type=whole_number(1, MOST_STEPS),
        metavar="N",
        help="noise levels that every block passes through (default: the model's own)",
    )
    if orders:
        add("--order", type=name_in(orders), metavar="NAME", help=f"{', '.join(orders)} (default: {order})")
    add("--window", type=whole_number(1), metavar="CELLS", help="cells that are in motion (default: the model's own)")
    stay = "cells that stay as it advances (default: the model's own, at most half of it)"
    add("--overlap", type=whole_number(0), metavar="CELLS", help=stay)
    add(
        "--draft",
        type=whole_number(0),
        metavar="STEPS",
        help="first steps that all blocks take together (default: the model's own)",
    )
    if sides:
        small = (
            "on: a picture of the model's own size takes the place of the draft (default: where the canvas is larger)"
        )
        add("--guide", type=name_in(GUIDE), metavar="WHICH", help=small)
    reach = number_or(EVERYWHERE, "cells")
    add(
        "--lookahead",
        type=reach,
        metavar="CELLS",
        help="how far waiting blocks are seen, or all (default: all, or"
        " the window where the canvas is larger than the model's own)",
    )
    ticks = number_or("autoregressive", "ticks (0 is ordinary diffusion)")
    add("--lag", type=ticks, metavar="TICKS", help="ticks between blocks, or autoregressive (default: fits the window)")
    add("--persistence", type=decimal(0, 1), metavar="P", help="memory of finished blocks, 0 to 1 (default: 1)")
    less = "share of its noise that a waiting block is remembered without, 0 to 1 (default: the model's own)"
    add("--extrapolation", type=decimal(0, 1), metavar="SHARE", help=less)
    add("--seed", type=seed, metavar="N", help="of the noise, and of --order random (default: 0)")


def complete(
    values: argparse.Namespace, recorded: dict[str, Any], defaults: dict[str, Any], card: Card
) -> dict[str, Any]:
    """What was said, else what was recorded, else the default, for each of `defaults`; size and steps from the card.

    What the plan fits to the canvas stays None.
    """
    said = {name: value for name, value in vars(values).items() if value is not None}
    settings = {name: said.get(name, recorded.get(name, default)) for name, default in defaults.items()}
    for name, own in (("width", card.size), ("height", card.size), ("steps", card.steps)):
        if name in defaults and settings[name] is None:
            settings[name] = own
    for side in ("width", "height"):
        if side in defaults:
            check_side(f"--{side}", settings[side])
    return settings


def check_side(name: str, pixels: int) -> None:
    """ValueError unless `pixels` is a multiple of a token's side, 16."""
    if pixels % SIDE:
        low = pixels // SIDE * SIDE
        nearby = f"{low} or {low + SIDE}" if low else f"{SIDE}"
        raise ValueError(f"{name} is {pixels} pixels, and must be a multiple of {SIDE}: take {nearby}")


def check_room(width: int, height: int, remedy: str = "take a smaller --width or --height") -> None:
    """ValueError if this machine cannot even hold the finished picture, of so many pixels."""
    import psutil

    need, there = (3 + 12) * width * height, psutil.virtual_memory().total  # as bytes, and as floats before
    if need > there:
        raise ValueError(
            f"{width} × {height} pixels take at least {-(-need // 2**30):,} GiB of memory, and this machine has "
            f"{there / 2**30:,.0f} GiB: {remedy}"
        )


def plan_of(settings: dict[str, Any], card: Card, given: Sequence[Block] = ()) -> Plan:
    """The plan that these settings make with a model; heun takes two ticks a step, and one for the last."""
    return plan_for(
        card,
        settings["height"] // CELL,
        settings["width"] // CELL,
        settings["steps"],
        order=settings["order"],
        window=settings["window"],
        overlap=settings["overlap"],
        persistence=settings["persistence"],
        draft=settings["draft"],
        lookahead="auto" if settings["lookahead"] is None else settings["lookahead"],
        lag=settings["lag"],
        seed=settings["seed"],
        multiple=TOKEN,
        extrapolation=settings["extrapolation"],
        given=given,
        calls_per_step=2 if settings.get("sampler") == "heun" else 1,
        guide=settings.get("image") is None and GUIDE.get(settings.get("guide"), "auto"),
    )


def fitted(settings: dict[str, Any], plan: Plan, card: Card) -> dict[str, Any]:
    """The settings, with what the plan has fitted to the canvas in place of None."""
    reach = EVERYWHERE if plan.lookahead is None else plan.lookahead
    found = {"window": plan.window, "overlap": plan.overlap, "lookahead": reach, "extrapolation": plan.extrapolation}
    found["draft"] = card.draft_steps(settings["steps"])
    return settings | {name: value for name, value in found.items() if settings.get(name) is None}
