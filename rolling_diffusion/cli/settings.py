"""Settings: every number behind a picture, and the plan that they make."""

from __future__ import annotations

import argparse
from typing import Any

from ..core.order import COLUMN_ORDERS, ORDERS, ROW_ORDERS
from ..core.plan import Plan, make_plan
from .arguments import Parser, decimal, lag, name_in, whole_number

CELL, TOKEN = 8, 2  # pixels a cell, cells a token: Flux's, and the embedded model's
EMBEDDED = "embedded"
PLAN_DEFAULTS: dict[str, Any] = {
    "width": 256,
    "height": 256,
    "steps": 20,
    "order": "top-to-bottom",
    "draft": 0,
    "lookahead": None,
    "lag": None,
    "persistence": 1.0,
    "seed": 0,
}


def add_plan_options(parser: Parser) -> None:
    """The options that make a plan. All default to None, so that what was said stays apart from what is filled in."""
    group = parser.add_argument_group("the plan")
    add = group.add_argument
    add("--width", type=whole_number(1), metavar="PIXELS", help="a multiple of 16 (default: 256)")
    add("--height", type=whole_number(1), metavar="PIXELS", help="a multiple of 16 (default: 256)")
    add("--steps", type=whole_number(1), metavar="N", help="noise levels that every block passes through (default: 20)")
    add("--order", type=name_in(ORDERS), metavar="NAME", help=f"{', '.join(ORDERS)} (default: top-to-bottom)")
    add("--window", type=whole_number(1), metavar="CELLS", help="cells that are in motion (default: half the canvas)")
    add("--overlap", type=whole_number(0), metavar="CELLS", help="cells that stay as it advances (default: half of it)")
    add("--draft", type=whole_number(0), metavar="STEPS", help="first steps that all blocks take together (default: 0)")
    add("--lookahead", type=whole_number(0), metavar="CELLS", help="how far waiting blocks are seen (default: all)")
    add("--lag", type=lag, metavar="TICKS", help="ticks between blocks, or autoregressive (default: fits the window)")
    add("--persistence", type=decimal(0, 1), metavar="P", help="memory of finished blocks, 0 to 1 (default: 1)")
    add("--seed", type=whole_number(0), metavar="N", help="of the noise, and of --order random (default: 0)")


def fit_window(order: str, height: int, width: int) -> int:
    """A window (cells) of about half the canvas (cells) along the order, so that it visibly rolls; a multiple of 4."""
    extent = height if order in ROW_ORDERS else width if order in COLUMN_ORDERS else min(height, width)
    return max(2 * TOKEN, round(extent / 2 / (2 * TOKEN)) * 2 * TOKEN) if extent > TOKEN else TOKEN


def complete(values: argparse.Namespace, recorded: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What was said, else what was recorded, else the default, for each of `defaults`; window and overlap fitted."""
    said = {name: value for name, value in vars(values).items() if value is not None}
    settings = {name: said.get(name, recorded.get(name, default)) for name, default in defaults.items()}
    for side in ("width", "height"):
        check_side(side, settings[side])
    fitted = fit_window(settings["order"], settings["height"] // CELL, settings["width"] // CELL)
    window = settings["window"] = said.get("window", recorded.get("window", fitted))
    half = window // 2 // TOKEN * TOKEN
    kept = recorded.get("overlap", half) if "window" not in said else half
    settings["overlap"] = said.get("overlap", kept)
    return settings


def check_side(name: str, pixels: int) -> None:
    """ValueError unless `pixels` is a multiple of a token's side, 16."""
    side = CELL * TOKEN
    if pixels % side:
        low = pixels // side * side
        nearby = f"{low} or {low + side}" if low else f"{side}"
        raise ValueError(f"--{name} is {pixels} pixels, and must be a multiple of {side}: take {nearby}")


def plan_of(settings: dict[str, Any]) -> Plan:
    """The plan that these settings make."""
    return make_plan(
        settings["height"] // CELL,
        settings["width"] // CELL,
        settings["steps"],
        order=settings["order"],
        window=settings["window"],
        overlap=settings["overlap"],
        draft=settings["draft"],
        lookahead=settings["lookahead"],
        seed=settings["seed"],
        lag=settings["lag"],
        multiple=TOKEN,
        persistence=settings["persistence"],
    )
