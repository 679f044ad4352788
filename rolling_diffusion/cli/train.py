"""`rolling-diffusion train`: makes the embedded model again, from nothing; a run that was stopped goes on."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..train import MINUTES, STAGES
from ..train import run as train
from .arguments import Parser, decimal, seed, whole_number
from .files import make_folder
from .model import device_named


def add_options(parser: Parser) -> None:
    add = parser.add_argument
    add("-o", "--output", type=Path, default=Path("runs/model"), metavar="FOLDER", help="(default: runs/model)")
    add("--work", type=Path, default=Path("runs/train"), metavar="FOLDER", help="checkpoints (default: runs/train)")
    add("--start", type=Path, metavar="FOLDER", help="a trained model to train further (default: from nothing)")
    for stage, minutes in MINUTES.items():
        add(f"--{stage}-minutes", type=decimal(0), default=minutes, metavar="N", help=f"(default: {minutes:g})")
    for stage, steps in STAGES.items():
        add(
            f"--{stage}-steps",
            type=whole_number(0 if stage == "decoder" else 1),
            default=steps,
            metavar="N",
            help=f"(default: {steps})",
        )
    add("--batch", type=whole_number(1), default=1, metavar="N", help="times the pictures in a step (default: 1)")
    add("--workers", type=whole_number(0), default=0, metavar="N", help="processes that render pictures (default: 0)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda (default: auto)")
    add("--seed", type=seed, default=0, metavar="N", help="(default: 0)")


def run(values: argparse.Namespace) -> int:
    if not values.uniform_minutes and not values.rolling_minutes:
        raise ValueError("--uniform-minutes and --rolling-minutes are both 0: there is nothing to train")
    for folder in (values.output, values.work):
        make_folder(folder)
    train(
        values.output,
        values.work,
        uniform_minutes=values.uniform_minutes,
        rolling_minutes=values.rolling_minutes,
        text_steps=values.text_steps,
        decoder_steps=values.decoder_steps,
        start=values.start,
        batch=values.batch,
        workers=values.workers,
        device=device_named(values.device),
        seed=values.seed,
    )
    return 0
