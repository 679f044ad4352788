"""`rolling-diffusion extend`: a picture carried on beyond its edges."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..core.order import AWAY, route_of
from ..defaults import SIDE, Card, context_of
from .arguments import Parser, whole_number
from .files import check_target, free, read_picture, save_png
from .generate import DEFAULTS as OF_PICTURES
from .generate import add_model_options, add_sampling_options, call_options, check_text
from .model import EMBEDDED, device_named, load_said, locate, resolved, warnings_of
from .replay import record
from .settings import add_plan_options, check_room, complete, fitted
from .stream import NO_STREAM, bar_of, plan_of_stretch, teller

DEFAULTS: dict[str, Any] = {
    **{name: value for name, value in OF_PICTURES.items() if name not in (*NO_STREAM, "order", "prompts")},
    "picture": None,
    **dict.fromkeys(AWAY),  # left and right first: what is added above and below is as wide as it becomes
}
SETTINGS = tuple(DEFAULTS)


def add_options(parser: Parser) -> None:
    add = parser.add_argument
    add("picture", type=Path, metavar="PICTURE", help="to carry on; its own pixels stay as they are")
    add("prompt", metavar="PROMPT", help="what to draw beyond it, in quotes")
    for side in AWAY:
        add(f"--{side}", type=whole_number(1), metavar="PIXELS", help="to add there")
    add("-o", "--output", type=Path, metavar="FILE.png", help="(default: a free name, of the picture)")
    add_sampling_options(parser)
    add_model_options(parser)
    add_plan_options(parser, sides=False, orders=())


def run(values: argparse.Namespace) -> int:
    said = {name for name in SETTINGS if getattr(values, name, None) is not None}
    sides = {side: getattr(values, side) for side in AWAY if side in said}
    if not sides:
        raise ValueError("a side is needed: --right 256, or --left, --top or --bottom")
    if not values.prompt.strip():
        raise ValueError('the prompt is empty: rolling-diffusion extend picture.png "a red ball" --right 256')
    picture = read_picture(values.picture, "PICTURE", "RGB")
    output = values.output or free(values.picture.with_name(f"{values.picture.stem}-extended.png"))
    check_target(output, (".png",))
    folder = locate(values.model or EMBEDDED)
    card = Card.in_folder(folder)
    complete(values, {}, DEFAULTS, card)
    check_text(values.prompt, values.negative_prompt or "")
    size = [picture.width + sum(sides.get(s, 0) for s in ("left", "right"))]
    size.append(picture.height + sum(sides.get(s, 0) for s in ("top", "bottom")))
    check_room(size[0], size[1], "extend it by less")
    settings = settled(values, picture.size, sides, card)
    pipeline = load_said(folder, settings)
    if pipeline.card != card:  # a model without a card of ours has defaults of its own
        settings = settled(values, picture.size, sides, pipeline.card)
    settings |= resolved(pipeline, settings)
    for warning in warnings_of(pipeline, settings["prompt"], settings["negative_prompt"]):
        print(f"warning: {warning}", file=sys.stderr)
    image = draw(pipeline, picture, sides, settings, frozenset(said))
    print(save_png(output, image, record({*said, "seed"}, settings), fresh=values.output is None))
    return 0


def settled(values: argparse.Namespace, size: tuple[int, int], sides: dict[str, int], card: Any) -> dict[str, Any]:
    """Every number, those of the plan fitted to the last side; ValueError for a plan that cannot be."""
    found = complete(values, {}, DEFAULTS, card)
    stretch = card.size
    width, height = size
    settings = found
    for side, pixels in sides.items():
        route = route_of(AWAY[side])
        along, across = (height, width) if route.axis == "rows" else (width, height)
        if along < SIDE:
            raise ValueError(f"PICTURE is of {width} × {height} pixels, and must be of {SIDE} at least each way")
        sizes = {
            "across": across + -across % SIDE,
            "stretch": stretch,
            "context": context_of(stretch, SIDE),
        }
        plan = plan_of_stretch(found | sizes | {"order": AWAY[side]}, card, route)
        settings = fitted(found, plan, card)
        width, height = (width, height + pixels) if route.axis == "rows" else (width + pixels, height)
    return settings | {"device": device_named(values.device or "auto")}


def draw(pipeline: Any, picture: Any, sides: dict[str, int], settings: dict[str, Any], said: frozenset[str]) -> Any:
    """The picture, carried on beyond one side after the other."""
    from ..pipeline.extend import extend

    options, stretch = call_options(pipeline, settings, said), pipeline.card.size
    for side, pixels in sides.items():
        length = pixels + -pixels % SIDE
        ends = [*range(stretch, length, stretch), length]
        across = picture.height if side in ("left", "right") else picture.width
        with bar_of(across, length, 0) as bar:
            bar.set_description(side)
            how = {"seed": settings["seed"], "on_tick": teller(bar, ends)}
            picture = extend(pipeline, picture, side, pixels, settings["prompt"], **how, **options)
    return picture
