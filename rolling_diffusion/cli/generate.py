"""`rolling-diffusion generate`: a picture from a prompt, growing in an order."""

from __future__ import annotations

import argparse
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .arguments import Parser, decimal, name_in, whole_number
from .files import ANIMATIONS, check_target, find_ffmpeg, read_settings, save_animation, save_json, save_png
from .model import DTYPES, EMBEDDED, device_named, dtype_named, known_words, locate, unknown_words
from .settings import PLAN_DEFAULTS, add_plan_options, complete, plan_of

if TYPE_CHECKING:
    from PIL import Image

    from ..core.plan import Plan
    from ..pipeline import RollingFluxPipeline

# The k-diffusion names of diffusers' flow-capable schedulers, and of the spacings of their sigmas.
SAMPLERS = ("euler", "heun", "dpmpp_2m", "uni_pc")
SCHEDULERS = ("simple", "karras", "exponential", "beta")
DEFAULTS: dict[str, Any] = {
    **PLAN_DEFAULTS,
    "prompt": None,
    "negative_prompt": "",
    "cfg": 3.0,
    "sampler": "euler",
    "scheduler": "simple",
    "model": EMBEDDED,
    "device": "auto",
    "dtype": "auto",
}
MOST_FRAMES = 60  # of an animation; a longer run is sampled evenly


def add_options(parser: Parser) -> None:
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="what to draw, in quotes")
    add("-o", "--output", type=Path, metavar="FILE.png", help="(default: named after the prompt and the seed)")
    add("--from", dest="again", type=Path, metavar="FILE.png", help="use the settings in a picture made by generate")
    add("--negative-prompt", metavar="TEXT", help="what to keep away from")
    add("--cfg", type=decimal(0), metavar="SCALE", help="how closely to follow the prompt (default: 3)")
    add("--sampler", type=name_in(SAMPLERS), metavar="NAME", help=f"{', '.join(SAMPLERS)} (default: euler)")
    add("--scheduler", type=name_in(SCHEDULERS), metavar="NAME", help=f"{', '.join(SCHEDULERS)} (default: simple)")
    add("--model", metavar="MODEL", help="a folder, a checkpoint file or a hub id (default: embedded)")
    add("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--dtype", type=name_in(DTYPES), metavar="NAME", help=f"{', '.join(DTYPES)} (default: auto)")
    add(
        "--batch", type=whole_number(1), default=1, metavar="N", help="pictures, with seeds from --seed on (default: 1)"
    )
    add("--animation", type=Path, metavar="FILE", help="the picture appearing: .gif, .webp or .mp4")
    add("--report", type=Path, metavar="FILE.json", help="settings, cost and times, for programs")
    add_plan_options(parser)


def run(values: argparse.Namespace) -> int:
    """Everything that can be refused is refused before the model is loaded."""
    settings = complete(values, read_settings(values.again) if values.again else {}, DEFAULTS)
    if not (settings["prompt"] or "").strip():
        raise ValueError('a prompt is needed: rolling-diffusion generate "a red ball above a blue boat"')
    plan = plan_of(settings)
    outputs = targets(values, settings)
    settings["device"] = device_named(settings["device"])
    folder = locate(settings["model"])

    started = time.perf_counter()
    pipeline = load(folder, settings)
    warn(pipeline, settings)
    loaded = time.perf_counter() - started

    pictures = []
    for number, output in enumerate(outputs):
        one = settings | {"seed": settings["seed"] + number}
        frames: list[Image.Image] | None = [] if values.animation and number == 0 else None
        started = time.perf_counter()
        image = draw(pipeline, one, plan, frames)
        seconds = time.perf_counter() - started
        save_png(output, image, one | {"version": __version__})
        if frames is not None:
            save_animation(values.animation, [*frames, image])
        pictures.append({"file": str(output), "seed": one["seed"], "seconds": round(seconds, 3)})
        print(output)
    if values.animation:
        print(values.animation)
    if values.report:
        save_json(values.report, report(settings, plan, pipeline, pictures, loaded))
        print(values.report)
    return 0


def targets(values: argparse.Namespace, settings: dict[str, Any]) -> list[Path]:
    """The files to write, one per picture of the batch; all of them, and those beside them, are checked."""
    words = "-".join(re.findall(r"\w+", settings["prompt"].lower()))[:60].strip("-")
    first = values.output or Path(f"{words or 'picture'}-{settings['seed']}.png")
    outputs = [first]
    if values.batch > 1:
        outputs = [first.with_name(f"{first.stem}-{i + 1}{first.suffix}") for i in range(values.batch)]
    for output in outputs:
        check_target(output, (".png",))
    if values.animation:
        check_target(values.animation, ANIMATIONS)
        if values.animation.suffix.lower() == ".mp4":
            find_ffmpeg()
    if values.report:
        check_target(values.report)
    return outputs


def load(folder: str, settings: dict[str, Any]) -> RollingFluxPipeline:
    from ..pipeline import RollingFluxPipeline

    dtype = dtype_named(settings["dtype"], settings["device"])
    settings["dtype"] = str(dtype).removeprefix("torch.")
    one_file = Path(folder).is_file()
    read = RollingFluxPipeline.from_single_file if one_file else RollingFluxPipeline.from_pretrained
    pipeline = read(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(settings["device"])


def warn(pipeline: RollingFluxPipeline, settings: dict[str, Any]) -> None:
    """Names the words that the model has never seen, and those that it has."""
    text = f"{settings['prompt']} {settings['negative_prompt']}"
    unknown = unknown_words(pipeline.tokenizer_2, text)
    if unknown:
        print(f"warning: this model does not know {', '.join(map(repr, unknown))}. It knows:", file=sys.stderr)
        print(" ".join(known_words(pipeline.tokenizer_2)), file=sys.stderr)


def draw(
    pipeline: RollingFluxPipeline, settings: dict[str, Any], plan: Plan, frames: list[Image.Image] | None
) -> Image.Image:
    """One picture; `frames` collects pictures of it as it appears."""
    import torch
    from tqdm import tqdm

    bar = tqdm(total=plan.ticks, unit="call", leave=False)

    def on_frame(frame) -> None:
        bar.total = frame.total
        bar.update(frame.tick + 1 - bar.n)
        bar.set_description(f"block {frame.blocks[0].index + 1} of {len(plan.blocks)}")
        if frames is not None and frame.tick % max(1, -(-frame.total // MOST_FRAMES)) == 0:
            frames.append(pipeline.preview(frame))

    with bar:
        return pipeline(
            prompt=settings["prompt"],
            negative_prompt=settings["negative_prompt"] or None,
            width=settings["width"],
            height=settings["height"],
            num_inference_steps=settings["steps"],
            cfg=settings["cfg"],
            order=settings["order"],
            window=settings["window"],
            overlap=settings["overlap"],
            attention_persistence=settings["persistence"],
            draft=settings["draft"],
            lookahead=settings["lookahead"],
            lag=settings["lag"],
            sampler=settings["sampler"],
            scheduler_sigmas=settings["scheduler"],
            generator=torch.Generator("cpu").manual_seed(settings["seed"]),
            on_frame=on_frame,
        ).images[0]


def report(
    settings: dict[str, Any],
    plan: Plan,
    pipeline: RollingFluxPipeline,
    pictures: list[dict[str, Any]],
    loaded: float,
) -> dict[str, Any]:
    """What was made, from what, at what cost."""
    import diffusers
    import torch

    return {
        "version": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "settings": settings,
        "plan": asdict(plan),
        "cost": asdict(plan.cost(pipeline.tokenizer_max_length)),
        "load_seconds": round(loaded, 3),
        "pictures": pictures,
    }
