"""Settings: every number behind a picture, and the plan that they make."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from ..core.order import COLUMN_ORDERS, ORDERS, ROW_ORDERS
from ..core.plan import DRAFT, Plan, draft_steps, make_plan
from .arguments import Parser, decimal, name_in, number_or, seed, whole_number

CELL, TOKEN = 8, 2  # pixels a cell, cells a token: Flux's, and the embedded model's
EVERYTHING = "all"  # a lookahead over the whole canvas
PLAN_DEFAULTS: dict[str, Any] = {
    "width": None,
    "height": None,
    "steps": None,
    "order": "top-to-bottom",
    "draft": None,
    "lookahead": None,
    "lag": None,
    "persistence": 1.0,
    "seed": 0,
}


@dataclass(frozen=True)
class Habits:
    """What a model is sampled with when nothing is said; here, as the embedded model's card has it.

    size: pixels a side. draft: share of the steps. native_tokens: of the image, up to which a block sees the whole
    canvas. text_tokens: of a prompt.
    """

    size: int = 256
    steps: int = 20
    draft: float = DRAFT
    native_tokens: int = 1024
    text_tokens: int = 32


def add_plan_options(parser: Parser) -> None:
    """The options that make a plan. All default to None, so that what was said stays apart from what is filled in."""
    group = parser.add_argument_group("the plan")
    add = group.add_argument
    add("--width", type=whole_number(1), metavar="PIXELS", help="a multiple of 16 (default: the model's own)")
    add("--height", type=whole_number(1), metavar="PIXELS", help="a multiple of 16 (default: the model's own)")
    add(
        "--steps",
        type=whole_number(1),
        metavar="N",
        help="noise levels that every block passes through (default: the model's own)",
    )
    add("--order", type=name_in(ORDERS), metavar="NAME", help=f"{', '.join(ORDERS)} (default: top-to-bottom)")
    add("--window", type=whole_number(1), metavar="CELLS", help="cells that are in motion (default: half the canvas)")
    add("--overlap", type=whole_number(0), metavar="CELLS", help="cells that stay as it advances (default: half of it)")
    add(
        "--draft",
        type=whole_number(0),
        metavar="STEPS",
        help="first steps that all blocks take together (default: the model's own)",
    )
    reach = number_or(EVERYTHING, "cells")
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
    add("--seed", type=seed, metavar="N", help="of the noise, and of --order random (default: 0)")


def fit_window(order: str, height: int, width: int) -> int:
    """A window (cells) of about half the canvas (cells) along the order, so that it visibly rolls; a multiple of 4."""
    extent = height if order in ROW_ORDERS else width if order in COLUMN_ORDERS else min(height, width)
    return max(2 * TOKEN, round(extent / 2 / (2 * TOKEN)) * 2 * TOKEN) if extent > TOKEN else TOKEN


def complete(
    values: argparse.Namespace, recorded: dict[str, Any], defaults: dict[str, Any], habits: Habits
) -> dict[str, Any]:
    """What was said, else what was recorded, else the default, for each of `defaults`; the rest fitted to the model and
    the canvas."""
    said = {name: value for name, value in vars(values).items() if value is not None}
    settings = {name: said.get(name, recorded.get(name, default)) for name, default in defaults.items()}

    def fit(name: str, value: Any) -> Any:
        known = said.get(name, recorded.get(name))
        settings[name] = value if known is None else known
        return settings[name]

    height, width = (fit(side, habits.size) for side in ("height", "width"))
    for side in ("width", "height"):
        check_side(side, settings[side])
    steps = fit("steps", habits.steps)
    fit("draft", draft_steps(steps, habits.draft))
    window = fit("window", fit_window(settings["order"], height // CELL, width // CELL))
    fit("overlap", window // 2 // TOKEN * TOKEN)
    known = width * height <= habits.native_tokens * (CELL * TOKEN) ** 2
    fit("lookahead", EVERYTHING if known else window)
    return settings


def check_side(name: str, pixels: int) -> None:
    """ValueError unless `pixels` is a multiple of a token's side, 16."""
    side = CELL * TOKEN
    if pixels % side:
        low = pixels // side * side
        nearby = f"{low} or {low + side}" if low else f"{side}"
        raise ValueError(f"--{name} is {pixels} pixels, and must be a multiple of {side}: take {nearby}")


def check_room(width: int, height: int) -> None:
    """ValueError if this machine cannot even hold the finished picture, of so many pixels."""
    import psutil

    need, there = (
        (3 + 12) * width * height,
        psutil.virtual_memory().total,
    )  # as bytes, and as the floats that it is from
    if need > there:
        raise ValueError(
            f"{width} × {height} pixels take at least {need / 2**30:,.0f} GiB of memory, and this machine has "
            f"{there / 2**30:,.0f} GiB: take a smaller --width or --height"
        )


def plan_of(settings: dict[str, Any]) -> Plan:
    """The plan that these settings make; heun takes two ticks a step, and one for the last."""
    steps, draft = settings["steps"], settings["draft"]
    if settings.get("sampler") == "heun":
        steps, draft = 2 * steps - 1, 2 * draft
    return make_plan(
        settings["height"] // CELL,
        settings["width"] // CELL,
        steps,
        order=settings["order"],
        window=settings["window"],
        overlap=settings["overlap"],
        draft=draft,
        lookahead=None if settings["lookahead"] == EVERYTHING else settings["lookahead"],
        seed=settings["seed"],
        lag=settings["lag"],
        multiple=TOKEN,
        persistence=settings["persistence"],
    )
