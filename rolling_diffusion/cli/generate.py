"""`rolling-diffusion generate`: a picture from a prompt, growing in an order."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..defaults import CELL, LAST_SEED, TOKEN, Card, nearest_side
from . import ranks
from .animation import SUFFIXES, Film, check_mp4, save_animation
from .arguments import Parser, decimal, name_in, whole_number
from .files import check_apart, check_target, free, read_picture, save_json, save_png
from .model import DTYPES, EMBEDDED, QUANTIZERS, device_named, load_said, locate, lora, quiet, resolved, warnings_of
from .prompts import add_prompts, check_said, shared_out, take_prompts, texts_of
from .replay import changed, record, replayed
from .settings import GUIDE, PLAN_DEFAULTS, add_plan_options, check_room, complete, fitted, plan_of

if TYPE_CHECKING:
    from PIL import Image

    from ..core.plan import Plan
    from ..pipeline import Rolling, Tick

# As the pipeline names them; written down here, so that a misspelled one is found before diffusers is imported.
SAMPLERS = ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "lcm")
SCHEDULERS = ("simple", "karras", "exponential", "beta")
DEFAULTS: dict[str, Any] = {
    **PLAN_DEFAULTS,
    "wrap": None,
    "prompt": None,
    "prompts": None,
    "negative_prompt": "",
    "image": None,
    "mask": None,
    "strength": None,
    "cfg": None,
    "sampler": "euler",
    "scheduler": "simple",
    "model": EMBEDDED,
    "variant": None,
    "device": "auto",
    "dtype": "auto",
    "cpu_offload": None,
    "lora": None,
    "quantize": None,
}
SETTINGS = tuple(DEFAULTS)


def add_options(parser: Parser) -> None:
    add = parser.add_argument
    add_prompts(parser, "the picture")
    add("-o", "--output", type=Path, metavar="FILE.png", help="(default: a free name, of the prompt and the seed)")
    add(
        "--from",
        dest="again",
        type=Path,
        metavar="FILE.png",
        help="say again what was said for a picture made by generate",
    )
    add_drawing_options(parser)
    add(
        "--batch",
        type=whole_number(1, 10_000),
        default=1,
        metavar="N",
        help="pictures, with seeds from --seed on (default: 1)",
    )
    add("--animation", type=Path, metavar="FILE", help="the picture appearing: .gif, .webp or .mp4")
    add("--report", type=Path, metavar="FILE.json", help="settings, cost and times, for programs")


def add_drawing_options(parser: Parser) -> None:
    """An option for each of SETTINGS, but for prompts. All default to None."""
    add = parser.add_argument
    add("--image", type=Path, metavar="FILE", help="a picture to start from")
    add("--mask", type=Path, metavar="FILE", help="of that picture: white is drawn anew, black stays")
    add(
        "--strength",
        type=decimal(0, 1),
        metavar="S",
        help="how much of it is drawn anew (default: the pipeline's own)",
    )
    circle = "x, y or xy: along these axes the edges meet without a seam (default: no circle)"
    add("--wrap", type=name_in(("x", "y", "xy")), metavar="AXES", help=circle)
    add_sampling_options(parser)
    add_model_options(parser)
    add_plan_options(parser)


def add_sampling_options(parser: Parser) -> None:
    """How a prompt is followed. All default to None."""
    add = parser.add_argument
    add("--negative-prompt", metavar="TEXT", help="what to keep away from")
    add("--cfg", type=decimal(0), metavar="SCALE", help="how closely to follow the prompt (default: the model's own)")
    add("--sampler", type=name_in(SAMPLERS), metavar="NAME", help=f"{', '.join(SAMPLERS)} (default: euler)")
    add("--scheduler", type=name_in(SCHEDULERS), metavar="NAME", help=f"{', '.join(SCHEDULERS)} (default: simple)")


def add_model_options(parser: Parser) -> None:
    """Which model, and where it is to work. All default to None."""
    add = parser.add_argument
    add("--model", metavar="MODEL", help="a folder, a checkpoint file or a hub id (default: embedded)")
    add("--variant", metavar="NAME", help="of the model's weights, such as fp16")
    add("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (default: auto)")
    add("--dtype", type=name_in(DTYPES), metavar="NAME", help=f"{', '.join(DTYPES)} (default: auto)")
    idle, layers = "keep idle parts of the model off the GPU", "keep all but one layer off the GPU: least memory, slow"
    add("--cpu-offload", dest="cpu_offload", action="store_const", const="model", help=idle)
    add("--sequential-offload", dest="cpu_offload", action="store_const", const="sequential", help=layers)
    add("--lora", type=lora, action="append", metavar="NAME[=STRENGTH]", help="a file or a hub id; may be given again")
    add("--quantize", type=name_in(QUANTIZERS), metavar="NAME", help=f"{', '.join(QUANTIZERS)}, on loading")


@dataclass(frozen=True)
class Job:
    """What is to be done, all of it checked. settings: every number; said: the names of those that the user said."""

    settings: dict[str, Any]
    said: frozenset[str]
    plan: Plan
    card: Card
    folder: str
    outputs: list[Path]
    image: Image.Image | None
    mask: Image.Image | None


def run(values: argparse.Namespace) -> int:
    job = prepare(values)
    with ranks.together(job.settings["device"]):
        return draw_all(values, job)


def draw_all(values: argparse.Namespace, job: Job) -> int:
    """Draws the pictures of a job. Of several processes that do it together, the first one speaks, and writes files."""
    started, first = time.perf_counter(), ranks.first()
    pipeline = load_for(job)
    ranks.share(pipeline, job.settings["device"])
    loaded = time.perf_counter() - started
    if pipeline.card != job.card:  # a model without a card of ours has defaults of its own
        job = prepare(values, (job.folder, pipeline.card))
    settings = job.settings | resolved(pipeline, job.settings)
    if first:
        for warning in warnings_of(pipeline, *texts_of(settings), settings["negative_prompt"]):
            print(f"warning: {warning}", file=sys.stderr)
        for note in notes(values, job, settings):
            print(f"note: {note}", file=sys.stderr)

    pictures = []
    for number, output in enumerate(job.outputs):
        one = settings | {"seed": settings["seed"] + number}
        film = Film() if values.animation and number == 0 and first else None
        started = time.perf_counter()
        image = draw(pipeline, one, job, film)
        seconds, kept = time.perf_counter() - started, ranks.most(pipeline.memory_bytes)
        if not first:
            continue
        if ranks.count() > 1:
            size = f"{kept / 2**20:.2f} MiB"
            print(f"note: memory of keys and values is {size} in each of {ranks.count()} processes", file=sys.stderr)
        file = save_png(output, image, record(job.said, one), fresh=values.output is None)
        print(file)
        took = {"seconds": round(seconds, 3), "memory_bytes": kept}
        pictures.append({"file": str(file), "seed": one["seed"], **took})
        if film is not None:
            print(save_animation(values.animation, [*film.frames, image]))
    if values.report and first:
        print(save_json(values.report, report(settings, job, pictures, loaded)))
    return 0


def load_for(job: Job) -> Rolling:
    """The model that the job needs."""
    start = None if job.image is None else "image" if job.mask is None else "mask"
    return load_said(job.folder, job.settings, start)


def notes(values: argparse.Namespace, job: Job, settings: dict[str, Any]) -> Iterator[str]:
    """What is not as it was, or not as it was given."""
    if job.image is not None and job.image.size != (settings["width"], settings["height"]):
        size = f"{job.image.width} × {job.image.height} pixels"
        yield f"--image is of {size}, and is scaled to {settings['width']} × {settings['height']}"
    yield from notes_of_defaults(values, settings)


def notes_of_defaults(values: argparse.Namespace, settings: dict[str, Any]) -> Iterator[str]:
    """Which defaults have changed since a picture was made that is made again."""
    if values.again:
        for name, (old, new) in changed(values.again, values, settings).items():
            yield f"{values.again} was made with {name} {old}, and is now made with {new}, as the default has changed"


def prepare(
    values: argparse.Namespace, model: tuple[str, Card] | None = None, outputs: list[Path] | None = None
) -> Job:
    """Refuses everything that can be: before the model is loaded, and most of it before diffusers is.

    model: its folder and card, where they are known. outputs: where the caller names the files.
    """
    again = replayed(values.again, values, SETTINGS) if values.again else {}
    again = take_prompts(values, again, rectangles=True)
    said = {name: value for name, value in vars(values).items() if name in SETTINGS and value is not None} | again
    name, first = said.get("model", EMBEDDED), said.get("seed", 0)
    check_said(said, 'rolling-diffusion generate "a red ball above a blue boat"')
    texts = texts_of({"prompts": None, **said})
    check_text(*texts, said.get("negative_prompt", ""))
    if first + values.batch - 1 > LAST_SEED:
        raise ValueError(f"--seed {first} leaves no seeds for --batch {values.batch}: the last one is {LAST_SEED}")
    outputs = targets(values, " ".join(texts), first) if outputs is None else outputs
    image, mask = pictures_of(said)
    if image is not None:  # a side that is not said is its own, or the nearest that there is
        again = {"width": nearest_side(image.width), "height": nearest_side(image.height), **again}
    if model is None:
        model = (folder := locate(name)), Card.in_folder(folder)
    folder, card = model
    settings = complete(values, again, DEFAULTS, card)
    check_room(settings["width"], settings["height"])
    plan = plan_of(settings, card)
    check_places(settings)
    settings = fitted(settings, plan, card) | {"device": ranks.own(device_named(values.device or "auto"))}
    return Job(settings, frozenset({*said, "seed"}), plan, card, folder, outputs, image, mask)


def is_text(text: str) -> bool:
    """Is it without the marks that stand for bytes which are no text?"""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def check_text(*texts: str) -> None:
    """ValueError for bytes that are no text."""
    if not all(map(is_text, texts)):
        raise ValueError("the prompt holds bytes that are no text in this terminal's encoding: write it in UTF-8")


def check_places(settings: dict[str, Any]) -> None:
    """ValueError for prompts whose places cannot be on this canvas."""
    if settings["prompts"]:
        quiet()
        from ..pipeline.places import Places

        places = Places(shared_out(settings["prompts"]), settings["order"], 0, CELL, TOKEN)
        places.maps(settings["height"] // CELL, settings["width"] // CELL)


def targets(values: argparse.Namespace, prompt: str, seed: int) -> list[Path]:
    """The files to write, one per picture of the batch; all of them, and those beside them, are checked.

    A name that was given is written to; one that was not is of the prompt and the seed, and of no file that exists.
    """
    words = "-".join(re.findall(r"\w+", prompt.lower()))[:60].encode()[:120].decode(errors="ignore").strip("-")
    outputs: list[Path] = []
    for number in range(values.batch):
        if values.output is None:
            outputs.append(free(Path(f"{words or 'picture'}-{seed + number}.png")))
        elif values.batch == 1:
            outputs.append(values.output)
        else:
            outputs.append(values.output.with_name(f"{values.output.stem}-{number + 1}{values.output.suffix}"))
        check_target(outputs[-1], (".png",))
    if values.animation:
        check_target(values.animation, SUFFIXES)
        if values.animation.suffix.lower() == ".mp4":
            check_mp4()
    if values.report:
        check_target(values.report)
    pictures = {f"picture {number}" if values.batch > 1 else "--output": p for number, p in enumerate(outputs, 1)}
    file = getattr(values, "prompts_file", None)
    check_apart({"--prompts": file, **pictures, "--animation": values.animation, "--report": values.report})
    return outputs


def pictures_of(said: dict[str, Any]) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture to start from, and its mask."""
    for name in ("mask", "strength"):
        if name in said and "image" not in said:
            raise ValueError(f"--{name} is of a picture to start from: name it with --image")
    image = read_picture(said["image"], "--image", "RGB") if "image" in said else None
    mask = read_picture(said["mask"], "--mask", "L") if "mask" in said else None
    if image is not None and mask is not None and image.size != mask.size:
        sizes = [f"{picture.width} × {picture.height}" for picture in (mask, image)]
        raise ValueError(f"--mask is of {sizes[0]} pixels, and must be as large as --image, {sizes[1]}")
    return image, mask


def call_options(pipeline: Rolling, settings: dict[str, Any], said: frozenset[str], **start: Any) -> dict[str, Any]:
    """Arguments of a call, but for its prompt and size; ValueError for what the pipeline does not take.

    start: what it starts from, None for what it does not. What was not said of the plan is left to the call, which fits
    it by the same rules: to the steps that a picture to start from leaves, and to each stretch of a canvas that grows.
    """
    start["negative_prompt"] = settings["negative_prompt"] or None
    start = {name: value for name, value in start.items() if value is not None}
    for name in start:
        if name not in pipeline.parameters:
            option = {"mask_image": "--mask"}.get(name, f"--{name.replace('_', '-')}")
            raise ValueError(f"{option} is not for {type(pipeline.pipe).__name__}, which takes no {name}: leave it out")
    names = ("window", "overlap", "draft", "lookahead", "extrapolation")
    return (
        start
        | {name: settings[name] for name in names if name in said}
        | {
            "num_inference_steps": settings["steps"],
            "cfg": settings["cfg"],
            "attention_persistence": settings["persistence"],
            "lag": settings["lag"],
            "sampler": settings["sampler"],
            "scheduler_sigmas": settings["scheduler"],
        }
    )


def draw(pipeline: Rolling, settings: dict[str, Any], job: Job, film: Film | None = None) -> Image.Image:
    """One picture; `film` is shown every frame."""
    import torch
    from tqdm import tqdm

    start = {"image": job.image, "mask_image": job.mask, "strength": settings["strength"]}
    options = call_options(pipeline, settings, job.said, **start)
    if settings["wrap"]:
        options["wrap"] = settings["wrap"]
    if "guide" in job.said:
        options["guide"] = GUIDE[settings["guide"]]
    blocks = job.plan.blocks
    bar = tqdm(total=job.plan.ticks, unit="call", leave=False, disable=None if ranks.first() else True)

    def on_tick(tick: Tick) -> None:
        bar.total = tick.total
        bar.update(tick.number + 1 - bar.n)
        together = len(tick.blocks) == len(blocks)
        bar.set_description("all blocks" if together else f"block {tick.blocks[0].index + 1} of {len(blocks)}")
        if film is not None:
            film.add(tick, pipeline.preview)

    with bar:
        images, *_ = pipeline(
            prompt=shared_out(settings["prompts"]) if settings["prompts"] else settings["prompt"],
            width=settings["width"],
            height=settings["height"],
            order=settings["order"],
            **options,
            generator=torch.Generator("cpu").manual_seed(settings["seed"]),
            on_tick=on_tick,
            return_dict=False,
        )
    return images[0]


def report(settings: dict[str, Any], job: Job, pictures: list[dict[str, Any]], loaded: float) -> dict[str, Any]:
    """What was made, from what, at what cost."""
    import diffusers
    import torch

    return {
        "version": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "processes": ranks.count(),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
        "plan": asdict(job.plan),
        "cost": asdict(job.plan.cost(job.card.max_sequence_length)),
        "load_seconds": round(loaded, 3),
        "pictures": pictures,
    }
