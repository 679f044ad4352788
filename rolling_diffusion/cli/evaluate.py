"""`rolling-diffusion evaluate`: how well a model follows prompts, sampled in full, rolling and block by block."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from .. import __version__
from ..defaults import MOST_STEPS, Card, read_index
from .arguments import Parser, decimal, name_in, seed, whole_number
from .batch import identity_of
from .files import check_apart, check_target, make_folder, save_json, save_png
from .model import DTYPES, EMBEDDED, base_name, device_named, load, locate
from .settings import check_room, check_side

BATCH = 8


def add_options(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--model", default=EMBEDDED, metavar="MODEL", help="a folder, a checkpoint file or a hub id (default: embedded)"
    )
    many = "over the six tasks (default: 240); of --study order over four, where a default rests on them (default: 480)"
    add("--prompts", type=whole_number(6), metavar="N", help=many)
    add("--held-out", type=whole_number(0), metavar="N", help="more, of pairs never trained (default: 0)")
    add("--seed", type=seed, default=0, metavar="N", help="of the prompts (default: 0)")
    add("--steps", type=whole_number(1, MOST_STEPS), metavar="N", help="(default: the model's own)")
    add("--cfg", type=decimal(0), metavar="SCALE", help="(default: the model's own)")
    add("--draft", type=whole_number(0), metavar="N", help="steps before the blocks part (default: the model's own)")
    add("--width", type=whole_number(1), metavar="PIXELS", help="a multiple of 16 (default: the model's own)")
    add("--height", type=whole_number(1), metavar="PIXELS", help="a multiple of 16 (default: the model's own)")
    what = (
        "more ways: memory (each kind on and off), order (what draws better than full sampling, on hard tasks, and at"
    )
    what += " equal cost), or all (also lags, drafts, noise levels; the default)"
    add("--study", nargs="?", const="all", type=name_in(("all", "memory", "order")), metavar="WHICH", help=what)
    only = "of --study order, this one and what it is compared with; may be given again (default: every row)"
    add("--row", action="append", metavar="NAME", help=only)
    strip = "instead: strips of so many pictures, stretch by stretch, beside tiles and all at once (default: 16)"
    add("--strip", nargs="?", const=16, type=whole_number(2), metavar="N", help=strip)
    add("--keep", type=Path, metavar="FOLDER", help="of --strip: a PNG of each strip in each way")
    add("--ceiling", action="store_true", help="instead: the world's own pictures, as they are and through the VAE")
    add("--batch", type=whole_number(1), metavar="N", help=f"pictures at a time (default: {BATCH})")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (default: auto)")
    add("--dtype", type=name_in(DTYPES), default="auto", metavar="NAME", help=f"{', '.join(DTYPES)} (default: auto)")
    add("--json", type=Path, metavar="FILE", help="every number, for programs")
    add(
        "--work",
        type=Path,
        metavar="FILE.jsonl",
        help="keeps what is judged: the same command again goes on from there",
    )


def run(values: argparse.Namespace) -> int:
    for file in (values.json, values.work):
        if file is not None:
            check_target(file)
    check_apart({"--json": values.json, "--work": values.work})
    of_orders = values.study == "order"
    if of_orders and (values.held_out is not None or values.draft is not None):
        raise ValueError("--study order has its own tasks and drafts: leave --held-out and --draft out")
    if values.row and not of_orders:
        raise ValueError("--row is of --study order: add that, or leave it out")
    common = {name: getattr(values, name) for name in ("cfg", "draft", "width", "height")}
    common["num_inference_steps"] = values.steps
    common = {name: value for name, value in common.items() if value is not None}
    if values.strip and values.ceiling:
        raise ValueError("--strip and --ceiling are two evaluations: say one of them")
    for other, foreign in (("strip", ("batch",)), ("ceiling", ("steps", "cfg", "draft"))):
        for name in ("work", "study", "held_out", "width", "height", *foreign):
            if getattr(values, other) and getattr(values, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is not of --{other}: leave it out")
    if values.keep and not values.strip:
        raise ValueError("--keep is of --strip: add that, or leave it out")
    for side in common.keys() & {"width", "height"}:
        check_side(f"--{side}", common[side])
    count, held_out = values.prompts or (480 if of_orders else 240), values.held_out or 0
    batch = values.batch or BATCH
    device = device_named(values.device)
    folder = locate(values.model)
    card = Card.in_folder(folder)
    check_room(common.get("width", card.size), common.get("height", card.size))
    index = Path(folder) / "model_index.json"
    if values.strip and index.is_file():  # of others it is known only when they are loaded
        from ..evaluation_strip import check_kind

        check_kind(str(read_index(index).get("_class_name")))
    if values.keep:
        make_folder(values.keep)
        if any(values.keep.glob("*.png")):
            raise ValueError(f"{values.keep} has pictures already: name another folder")
    from tqdm import tqdm

    from ..evaluation import (
        MEMORY,
        STUDY,
        WAYS,
        OrderStudy,
        Work,
        ceiling,
        evaluate,
        order_study,
        order_table,
        pace,
        plan_of,
        table,
    )
    from ..train.optimiser import halves
    from ..world.score import make_prompts

    rows = order_study(card, common, values.row or ()) if of_orders else []
    dtype = values.dtype
    if dtype == "auto" and of_orders and device == "cpu" and halves(device):
        dtype = "bfloat16"
    pipeline = load(folder, device, dtype)
    dtype = str(pipeline.pipe.dtype).removeprefix("torch.")
    if values.strip:
        from ..evaluation_strip import WAYS as STRIPS
        from ..evaluation_strip import evaluate_strips, strip_table

        def keep(way: str, number: int, pixels: Any) -> None:
            save_png(values.keep / f"{way.replace(' ', '-')}-{number + 1}.png", Image.fromarray(pixels))

        with tqdm(total=count * len(STRIPS), unit="stretch", leave=False, disable=None) as bar:
            more = {"stretches": values.strip, "progress": telling(bar), "keep": keep if values.keep else None}
            report = evaluate_strips(pipeline, count, values.seed, common=common, **more)
        print(strip_table(report))
        if values.json:
            print(save_json(values.json, report))
        return 0
    if values.ceiling:
        report = ceiling(pipeline.pipe, count, values.seed, batch=batch)
        print(table(report))
        if values.json:
            print(save_json(values.json, report))
        return 0
    # What a verdict depends on: the model, and the numbers that it is computed in.
    work = Work(values.work, {"model": identity_of(values.model), "dtype": dtype} if values.work else {})
    started = time.perf_counter()
    with tqdm(unit="picture", leave=False, disable=None) as bar:
        progress = telling(bar)
        if of_orders:
            if pipeline.card != card:  # a model without a card of ours has defaults of its own
                rows = order_study(pipeline.card, common, values.row or ())
            study = OrderStudy(pipeline, rows, count, values.seed, batch=batch, common=common, work=work)
            bar.total = sum(len(study.prompts_of(row)) for row in study.rows)
            pictures, units = study.left()
            if pictures:
                seconds = pace(pipeline, study.prompts[:batch], common)
                there = f"{bar.total - pictures:,} of them are in {values.work}; " if pictures < bar.total else ""
                bar.write(
                    f"{bar.total:,} pictures in {len(study.rows)} rows; {there}the rest takes about "
                    f"{duration(units * seconds)} in {dtype}, at {seconds:.1f} s a picture of full sampling",
                    file=sys.stderr,
                )
            report = study.run(progress)
        else:
            ways = {"all": STUDY, "memory": MEMORY, None: WAYS}[values.study]
            bar.total = (count + count // 6 + held_out) * len(ways)
            if not work.lines:
                seconds = pace(pipeline, make_prompts(min(batch, count), values.seed), common)
                each = [plan_of(pipeline.card, common | way).cost(0).relative for way in ways.values()]
                total = duration(bar.total * sum(each) / len(each) * seconds)
                bar.write(
                    f"{bar.total:,} pictures in {len(ways)} ways take about {total} in {dtype}, at "
                    f"{seconds:.1f} s a picture of full sampling",
                    file=sys.stderr,
                )
            report = evaluate(
                pipeline,
                count,
                values.seed,
                ways=ways,
                held_out=held_out,
                batch=batch,
                common=common,
                work=work,
                progress=progress,
            )
    print(order_table(report) if of_orders else table(report))
    if values.json is not None:
        about: dict[str, Any] = {"model": base_name(values.model), "held_out": held_out}
        about |= {"seed": values.seed, "batch": batch}
        about |= common | {"prompts": count, "device": device, "dtype": dtype, "version": __version__}
        about["seconds"] = round(time.perf_counter() - started, 1)
        print(f"\n{save_json(values.json, {**report, 'about': about})}")
    return 0


def telling(bar: Any) -> Callable[[str, int, int], None]:
    """What an evaluation tells of its progress, on a tqdm bar of all ways together."""
    finished: dict[str, int] = {}

    def tell(way: str, done: int, total: int) -> None:
        bar.set_description(way)
        finished[way] = done
        bar.update(sum(finished.values()) - bar.n)

    return tell


def duration(seconds: float) -> str:
    """In words: seconds, minutes or hours."""
    for size, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.{1 if seconds < 10 * size else 0}f} {name}"
    return f"{seconds:.0f} seconds"
