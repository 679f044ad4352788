"""`rolling-diffusion evaluate`: how well a model follows prompts, sampled in full, rolling and block by block."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from .. import __version__
from .arguments import Parser, decimal, name_in, seed, whole_number
from .files import check_target, save_json
from .model import DTYPES, EMBEDDED, base_name, card_of, device_named, load, locate
from .settings import check_room, check_side


def add_options(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--model", default=EMBEDDED, metavar="MODEL", help="a folder, a checkpoint file or a hub id (default: embedded)"
    )
    add("--prompts", type=whole_number(6), default=240, metavar="N", help="over the six tasks (default: 240)")
    add("--held-out", type=whole_number(0), default=0, metavar="N", help="more, of pairs never trained (default: 0)")
    add("--seed", type=seed, default=0, metavar="N", help="of the prompts (default: 0)")
    add("--steps", type=whole_number(1), metavar="N", help="(default: the model's own)")
    add("--cfg", type=decimal(0), metavar="SCALE", help="(default: the model's own)")
    add("--draft", type=whole_number(0), metavar="N", help="steps before the blocks part (default: the model's own)")
    add("--width", type=whole_number(1), metavar="PIXELS", help="a multiple of 16 (default: the model's own)")
    add("--height", type=whole_number(1), metavar="PIXELS", help="a multiple of 16 (default: the model's own)")
    what = "more ways: memory (each kind on and off), or all (also lags, drafts, noise levels; the default)"
    add("--study", nargs="?", const="all", type=name_in(("all", "memory")), metavar="WHICH", help=what)
    add("--ceiling", action="store_true", help="instead: the world's own pictures, as they are and through the VAE")
    add("--batch", type=whole_number(1), default=8, metavar="N", help="pictures at a time (default: 8)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (default: auto)")
    add("--dtype", type=name_in(DTYPES), default="auto", metavar="NAME", help=f"{', '.join(DTYPES)} (default: auto)")
    add("--json", type=Path, metavar="FILE", help="every number, for programs")


def run(values: argparse.Namespace) -> int:
    if values.json is not None:
        check_target(values.json)
    common = {name: getattr(values, name) for name in ("cfg", "draft", "width", "height")}
    common["num_inference_steps"] = values.steps
    common = {name: value for name, value in common.items() if value is not None}
    for side in common.keys() & {"width", "height"}:
        check_side(side, common[side])
    device = device_named(values.device)
    folder = locate(values.model)
    own = card_of(folder).size
    check_room(common.get("width", own), common.get("height", own))
    from tqdm import tqdm

    from ..evaluation import MEMORY, STUDY, WAYS, ceiling, evaluate, table

    pipeline = load(folder, device, values.dtype)
    if values.ceiling:
        print(table(ceiling(pipeline.pipe, values.prompts, values.seed, batch=values.batch)))
        return 0
    ways = {"all": STUDY, "memory": MEMORY, None: WAYS}[values.study]
    started = time.perf_counter()
    with tqdm(unit="picture", leave=False, disable=None) as bar:

        def progress(way: str, done: int, total: int) -> None:
            bar.total = total * len(ways)
            bar.set_description(way)
            bar.update(list(ways).index(way) * total + done - bar.n)

        report = evaluate(
            pipeline,
            values.prompts,
            values.seed,
            ways=ways,
            held_out=values.held_out,
            batch=values.batch,
            common=common,
            progress=progress,
        )
    print(table(report))
    if values.json is not None:
        about = {name: getattr(values, name) for name in ("model", "prompts", "held_out", "seed", "batch")}
        about["model"] = base_name(values.model)
        about |= common | {
            "device": device,
            "dtype": str(pipeline.pipe.dtype).removeprefix("torch."),
            "version": __version__,
        }
        about["seconds"] = round(time.perf_counter() - started, 1)
        print(f"\n{save_json(values.json, {**report, 'about': about})}")
    return 0
