"""`rolling-diffusion generate`: a picture from a prompt, growing in an order."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..defaults import Card
from .arguments import Parser, decimal, name_in, whole_number
from .files import ANIMATIONS, check_target, find_ffmpeg, read_settings, save_animation, save_json, save_png
from .model import DTYPES, EMBEDDED, QUANTIZERS, device_named, known_words, load, locate, lora, unknown_words
from .settings import CELL, PLAN_DEFAULTS, add_plan_options, complete, plan_of

if TYPE_CHECKING:
    from PIL import Image

    from ..core.order import Block
    from ..core.plan import Plan
    from ..pipeline import RollingFluxPipeline

# As the pipeline names them; written down here, so that a misspelled one is found before diffusers is imported.
SAMPLERS = ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "lcm")
SCHEDULERS = ("simple", "karras", "exponential", "beta")
DEFAULTS: dict[str, Any] = {
    **PLAN_DEFAULTS,
    "prompt": None,
    "negative_prompt": "",
    "cfg": None,
    "sampler": "euler",
    "scheduler": "simple",
    "model": EMBEDDED,
    "device": "auto",
    "dtype": "auto",
    "cpu_offload": None,
    "lora": None,
    "quantize": None,
}
PAPER = (243, 240, 232)
BLUR = 0.75 * CELL  # pixels, at equal powers of picture and noise: about what is finer than where their spectra meet
MOST_FRAMES = 30  # of an animation; a longer run is sampled evenly


def add_options(parser: Parser) -> None:
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="what to draw, in quotes")
    add("-o", "--output", type=Path, metavar="FILE.png", help="(default: named after the prompt and the seed)")
    add("--from", dest="again", type=Path, metavar="FILE.png", help="use the settings in a picture made by generate")
    add("--negative-prompt", metavar="TEXT", help="what to keep away from")
    add("--cfg", type=decimal(0), metavar="SCALE", help="how closely to follow the prompt (default: the model's own)")
    add("--sampler", type=name_in(SAMPLERS), metavar="NAME", help=f"{', '.join(SAMPLERS)} (default: euler)")
    add("--scheduler", type=name_in(SCHEDULERS), metavar="NAME", help=f"{', '.join(SCHEDULERS)} (default: simple)")
    add("--model", metavar="MODEL", help="a folder, a checkpoint file or a hub id (default: embedded)")
    add("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--dtype", type=name_in(DTYPES), metavar="NAME", help=f"{', '.join(DTYPES)} (default: auto)")
    idle, layers = "keep idle parts of the model off the GPU", "keep all but one layer off the GPU: least memory, slow"
    add("--cpu-offload", dest="cpu_offload", action="store_const", const="model", help=idle)
    add("--sequential-offload", dest="cpu_offload", action="store_const", const="sequential", help=layers)
    add("--lora", type=lora, action="append", metavar="NAME[=STRENGTH]", help="a file or a hub id; may be given again")
    add("--quantize", type=name_in(QUANTIZERS), metavar="NAME", help=f"{', '.join(QUANTIZERS)}, on loading")
    add(
        "--batch", type=whole_number(1), default=1, metavar="N", help="pictures, with seeds from --seed on (default: 1)"
    )
    add("--animation", type=Path, metavar="FILE", help="the picture appearing: .gif, .webp or .mp4")
    add("--report", type=Path, metavar="FILE.json", help="settings, cost and times, for programs")
    add_plan_options(parser)


def run(values: argparse.Namespace) -> int:
    """Everything that can be refused is refused before the model is loaded, and most of it before diffusers is."""
    recorded = read_settings(values.again) if values.again else {}
    name = values.model or recorded.get("model", EMBEDDED)
    prompt = values.prompt or recorded.get("prompt") or ""
    if not prompt.strip():
        raise ValueError('a prompt is needed: rolling-diffusion generate "a red ball above a blue boat"')
    outputs = targets(values, prompt, recorded.get("seed", 0) if values.seed is None else values.seed)
    folder = locate(name)
    card = Card.in_folder(folder)
    settings = complete(values, recorded, DEFAULTS, card)
    plan = plan_of(settings, card)
    settings["device"] = device_named(values.device or recorded.get("device", "auto"))

    started = time.perf_counter()
    options = {"cpu_offload": settings["cpu_offload"] or False, "quantize": settings["quantize"]}
    pipeline = load(folder, settings["device"], settings["dtype"], lora=dict(settings["lora"] or ()), **options)
    settings["dtype"] = str(pipeline.dtype).removeprefix("torch.")
    settings["cfg"] = pipeline.card.cfg if settings["cfg"] is None else settings["cfg"]
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


def targets(values: argparse.Namespace, prompt: str, seed: int) -> list[Path]:
    """The files to write, one per picture of the batch; all of them, and those beside them, are checked."""
    words = "-".join(re.findall(r"\w+", prompt.lower()))[:60].strip("-")
    first = values.output or Path(f"{words or 'picture'}-{seed}.png")
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


def warn(pipeline: RollingFluxPipeline, settings: dict[str, Any]) -> None:
    """Names the words that the model has never seen, and those that it has."""
    text = f"{settings['prompt']} {settings['negative_prompt']}"
    unknown = unknown_words(pipeline.tokenizer_2, text)
    if unknown:
        print(f"warning: this model does not know {', '.join(map(repr, unknown))}. It knows:", file=sys.stderr)
        print(" ".join(known_words(pipeline.tokenizer_2)), file=sys.stderr)


def unveiled(image: Image.Image, plan: Plan, levels: Mapping[Block, float]) -> Image.Image:
    """The picture as far as its noise lets it show: finished blocks sharp, others blurred by their noise (0 to 1).

    Blocks without a level are left as bare paper.

    The model's guess shows detail that noise still hides and later steps may change. A picture's spectrum falls as 1/f²
    and that of noise is flat: they meet at a wavelength in proportion to σ / (1 - σ), and what is finer is blurred.
    """
    from PIL import Image, ImageDraw, ImageFilter

    def area(blocks: Iterable[Block]) -> Image.Image:
        mask = Image.new("L", image.size)
        for block in blocks:
            top, left = block.top * CELL, block.left * CELL
            edges = (left, top, left + block.width * CELL - 1, top + block.height * CELL - 1)
            ImageDraw.Draw(mask).rectangle(edges, fill=255)
        return mask

    seen = image
    for level in sorted({*levels.values()}, reverse=True):
        radius = min(BLUR * level / max(1 - level, 0.01), min(image.size) / 4)
        soft = area(block for block in levels if levels[block] <= level).filter(ImageFilter.GaussianBlur(CELL))
        seen = Image.composite(image.filter(ImageFilter.GaussianBlur(radius)), seen, soft)
    seen.paste(PAPER, mask=area(block for block in plan.blocks if block not in levels))
    return seen


def draw(
    pipeline: RollingFluxPipeline, settings: dict[str, Any], plan: Plan, frames: list[Image.Image] | None
) -> Image.Image:
    """One picture; `frames` collects pictures of it as it appears."""
    import torch
    from tqdm import tqdm

    levels: dict[Block, float] = {}
    bar = tqdm(total=plan.ticks, unit="call", leave=False, disable=None)

    def on_frame(frame) -> None:
        bar.total = frame.total
        bar.update(frame.tick + 1 - bar.n)
        together = len(frame.blocks) == len(plan.blocks)
        bar.set_description("all blocks" if together else f"block {frame.blocks[0].index + 1} of {len(plan.blocks)}")
        if frames is None:
            return
        # In every tick: a block may come and go between two frames that are kept. Blocks finish in their order.
        levels.update(dict.fromkeys(plan.blocks[: frame.blocks[0].index], 0.0))
        levels.update(zip(frame.blocks, frame.sigmas))
        if frame.tick % max(1, -(-frame.total // MOST_FRAMES)) == 0:
            frames.append(unveiled(pipeline.preview(frame), plan, levels))

    with bar:
        images, *_ = pipeline(
            prompt=settings["prompt"],
            negative_prompt=settings["negative_prompt"] or None,
            width=settings["width"],
            height=settings["height"],
            num_inference_steps=settings["steps"],
            cfg=settings["cfg"],
            order=settings["order"],
            window=plan.window,
            overlap=plan.overlap,
            attention_persistence=settings["persistence"],
            draft=settings["draft"],
            lookahead=plan.lookahead,
            lag=settings["lag"],
            sampler=settings["sampler"],
            scheduler_sigmas=settings["scheduler"],
            generator=torch.Generator("cpu").manual_seed(settings["seed"]),
            on_frame=on_frame,
            return_dict=False,
        )
    return images[0]


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
        "cost": asdict(plan.cost(pipeline.card.max_sequence_length)),
        "load_seconds": round(loaded, 3),
        "pictures": pictures,
    }
