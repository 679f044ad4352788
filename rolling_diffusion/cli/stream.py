"""`rolling-diffusion stream`: a canvas of any length, with prompts along it, onto a disk as it is drawn."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.order import STRAIGHT, Block, Route, route_of
from ..defaults import CELL, SIDE, TOKEN, Card, context_of
from .arguments import Parser, fail, whole_number
from .generate import DEFAULTS as OF_PICTURES
from .generate import add_model_options, add_sampling_options, call_options, check_text, notes_of_defaults
from .model import EMBEDDED, device_named, load_said, locate, resolved, warnings_of
from .prompts import add_prompts, check_said, shared_out, take_prompts, texts_of
from .replay import record, replayed
from .settings import add_plan_options, check_room, check_side, complete, fitted, plan_of

if TYPE_CHECKING:
    from ..core.plan import Plan
    from ..pipeline import Rolling, Tick
    from .growing import Output

NO_STREAM = ("width", "height", "guide", "wrap", "image", "mask", "strength")
DEFAULTS: dict[str, Any] = {
    **{name: value for name, value in OF_PICTURES.items() if name not in NO_STREAM},
    "order": "left-to-right",
    "length": None,
    "across": None,
    "stretch": None,
    "context": None,
    "slice": None,
    "pyramid": None,
}
SETTINGS = tuple(DEFAULTS)


def add_options(parser: Parser) -> None:
    add = parser.add_argument
    add_prompts(parser, "the canvas")
    add("--length", type=whole_number(1), metavar="PIXELS", help="along the order (default: a stretch for each prompt)")
    add("--across", type=whole_number(1), metavar="PIXELS", help="across the order (default: the model's own)")
    add("-o", "--output", type=Path, metavar="OUT", required=True, help="a folder of slices, a .png or a .tif")
    add("--slice", type=whole_number(1), metavar="PIXELS", help="length of a folder's slices (default: a stretch)")
    add("--pyramid", action="store_const", const="yes", help="a .tif holds itself at a half, a quarter and so on, too")
    add("--from", dest="again", type=Path, metavar="OUT", help="say again what was said for one made by stream")
    add("--stretch", type=whole_number(1), metavar="PIXELS", help="drawn by one call (default: the model's own size)")
    seen = "of the stretch before, that a call sees (default: half of a stretch)"
    add("--context", type=whole_number(1), metavar="PIXELS", help=seen)
    add_sampling_options(parser)
    add_model_options(parser)
    add_plan_options(parser, sides=False, orders=STRAIGHT, order="left-to-right")


@dataclass(frozen=True)
class Job:
    """What is to be done, all of it checked. settings: every number; said: the names of those that the user said.

    prompts: as the library takes them."""

    settings: dict[str, Any]
    said: frozenset[str]
    plan: Plan
    card: Card
    folder: str
    prompts: Any
    output: Output


def run(values: argparse.Namespace) -> int:
    job = prepare(values)
    pipeline = load_said(job.folder, job.settings)
    if pipeline.card != job.card:  # a model without a card of ours has defaults of its own
        job = prepare(values, (job.folder, pipeline.card))
    with closing(job.output):
        return write(values, job, pipeline)


def write(values: argparse.Namespace, job: Job, pipeline: Rolling) -> int:
    """All that is not there yet, in its place, whatever ends it."""
    settings, output = job.settings | resolved(pipeline, job.settings), job.output
    across, length = settings["across"], settings["length"]
    state, finished = output.begin(record(job.said, settings), across, length)
    if finished:
        print(output.path)
        print(f"note: {output.path} was finished before", file=sys.stderr)
        return 0
    for warning in warnings_of(pipeline, *texts_of(settings), settings["negative_prompt"]):
        print(f"warning: {warning}", file=sys.stderr)
    for note in notes_of_defaults(values, settings):
        print(f"note: {note}", file=sys.stderr)
    if output.written:
        print(f"note: {output.path} goes on after {output.written:,} of {length:,} pixels", file=sys.stderr)
    goes_on = "the same command goes on"
    try:
        if output.written < length:
            draw(pipeline, settings, job, state)
        output.finish()
    except KeyboardInterrupt:
        output.show()
        fail(f"stopped: {output.path} holds {output.written:,} of {length:,} pixels, and {goes_on}")
        return 130
    except OSError as error:
        why = error.strerror or str(error) or type(error).__name__
        kept = output.written if os.path.exists(output.state) else 0  # others may have taken it away
        fail(f"cannot write {output.path}: {why}; {kept:,} of {length:,} pixels are kept, and {goes_on}")
        return 1
    print(output.path)
    return 0


def prepare(values: argparse.Namespace, model: tuple[str, Card] | None = None) -> Job:
    """Refuses everything that can be, before the model is loaded. model: its folder and card, where they are known."""
    from .growing import PICTURES, open_output

    again = take_prompts(values, replayed(values.again, values, SETTINGS) if values.again else {})
    is_file = values.output.suffix.lower() in PICTURES and not values.output.is_dir()
    for name, otherwise in {
        "slice": is_file,
        "pyramid": not is_file or values.output.suffix.lower() == ".png",
    }.items():
        if otherwise:
            again.pop(name, None)
    said = {name: value for name, value in vars(values).items() if name in SETTINGS and value is not None} | again
    check_said(said, 'rolling-diffusion stream "a red ball" --length 1024 -o strip.png')
    if model is None:
        model = (folder := locate(said.get("model", EMBEDDED))), Card.in_folder(folder)
    folder, card = model
    settings = complete(values, again, DEFAULTS, card)
    check_text(*texts_of(settings), settings["negative_prompt"])
    settings |= {name: card.size for name in ("across", "stretch") if settings[name] is None}
    if settings["context"] is None:
        settings["context"] = context_of(settings["stretch"], SIDE)
    prompts, settings["length"] = along(settings)
    for name in ("length", "across", "stretch", "context"):
        check_side(f"--{name}", settings[name])
    route = route_of(settings["order"])
    axis = 0 if route.axis == "rows" else 1
    size = settings["slice"] if is_file else settings["slice"] or settings["stretch"]
    output = open_output(values.output, axis, route.backwards, size, settings["pyramid"] is not None)
    check_room(settings["across"], settings["stretch"] + settings["context"], "take a smaller --across or --stretch")
    plan = plan_of_stretch(settings, card, route)
    settings = fitted(settings, plan, card) | {"device": device_named(values.device or "auto")}
    next(ends_of(prompts, settings))  # refuses places that cannot be
    return Job(settings, frozenset({*said, "seed"}), plan, card, folder, prompts, output)


def along(settings: dict[str, Any]) -> tuple[Any, int]:
    """The prompts, as the library takes them, and the length of the canvas, in pixels.

    Prompts without places share the length evenly; where none is said, each has a stretch."""
    prompts, length = settings["prompts"], settings["length"]
    if prompts and isinstance(prompts[0], str) and length is None:
        return prompts, len(prompts) * settings["stretch"]
    if length is None:
        raise ValueError("--length is missing: say how many pixels long the canvas is to be")
    if not prompts:
        return settings["prompt"], length
    if isinstance(prompts[0], str):
        if SIDE * len(prompts) > length:
            raise ValueError(
                f"{len(prompts)} prompts go beyond a --length of {length} pixels: each takes {SIDE} at least"
            )
    else:
        for place, prompt in prompts:
            if isinstance(place, int) and place:
                check_side(f"the place of {prompt!r}", place)
    return shared_out(prompts), length


def ends_of(prompts: Any, settings: dict[str, Any]) -> Iterator[int]:
    """Pixels at which each stretch ends; ValueError for prompts out of order or beyond the canvas."""
    from ..core.growing import stretches

    if isinstance(prompts, list) and not isinstance(prompts[0], str):
        prompts = [(place // CELL if isinstance(place, int) else place, prompt) for place, prompt in prompts]
    parts = stretches(prompts, settings["length"] // CELL, settings["stretch"] // CELL, TOKEN)
    return (CELL * (part.start + part.length) for part in parts)


def plan_of_stretch(settings: dict[str, Any], card: Card, route: Route) -> Plan:
    """That of a call in the middle of the canvas, which sees the stretch before."""
    across, new, seen = (settings[name] // CELL for name in ("across", "stretch", "context"))
    if route.axis == "rows":
        sides, given = (seen + new, across), Block(0, new if route.backwards else 0, 0, seen, across)
    else:
        sides, given = (across, seen + new), Block(0, 0, new if route.backwards else 0, across, seen)
    size = {"height": CELL * sides[0], "width": CELL * sides[1]}
    return plan_of(settings | size, card, (given,))


def draw(pipeline: Rolling, settings: dict[str, Any], job: Job, state: Any) -> None:
    """All that is not there yet."""
    output, done = job.output, 0 if state is None else int(state["number"])
    options = call_options(pipeline, settings, job.said)
    if route_of(settings["order"]).axis == "rows":
        options["width"] = settings["across"]
    else:
        options["height"] = settings["across"]
    with bar_of(settings["across"], settings["length"], output.written) as bar:
        strips = pipeline.stream(
            job.prompts,
            order=settings["order"],
            length=settings["length"],
            stretch=settings["stretch"],
            context=settings["context"],
            seed=settings["seed"],
            state=state,
            on_tick=teller(bar, ends_of(job.prompts, settings), done),
            **options,
        )
        for strip in strips:
            output.add(strip.start, strip.pixels, strip.state)


def teller(bar: Any, ends: Iterable[int], done: int = 0) -> Callable[[Tick], None]:
    """Moves a bar to where a stretch ends, in as many steps as it has ticks. done: stretches before."""
    spans = itertools.islice(itertools.pairwise(itertools.chain([0], ends)), done, None)
    span = None

    def on_tick(tick: Tick) -> None:
        nonlocal span
        start, stop = span = span or next(spans)
        bar.update(max(0, start + (stop - start) * (tick.number + 1) // tick.total - bar.n))
        if tick.number + 1 == tick.total:
            span = None

    return on_tick


def bar_of(across: int, length: int, done: int) -> Any:
    """A bar of pixels along the order, with the speed of the canvas."""
    from tqdm import tqdm

    class Bar(tqdm):
        @property
        def format_dict(self) -> Any:
            known: dict[str, Any] = dict(super().format_dict)
            rate = known["rate"] or (known["n"] - known["initial"]) / (known["elapsed"] or 1)
            return known | {"speed": f"{60 * rate * across / 1e6:.2f} Mpx/min"}

    shape = "{l_bar}{bar}| {n_fmt}/{total_fmt} pixels [{elapsed}<{remaining}, {speed}]"
    return Bar(total=length, initial=done, leave=False, disable=None, bar_format=shape)
