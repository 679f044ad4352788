"""`python -m benchmarks.stream`: memory and time of long canvases, against short ones; writes benchmarks/stream.md.

The command itself, with the embedded model, few steps and no guidance: neither ratio asks for more.
"""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rolling_diffusion import load, roll
from rolling_diffusion.cli import growing, main

from . import ratios

MODEL = Path(__file__).parent.parent / "rolling_diffusion" / "embedded"
ACROSS, SHORT, LONG, STEPS = 256, 2048, 16384, 2
EARLY, LATE = 2, LONG // ACROSS - 2  # stretches drawn before those that are timed: both see one before, and one follows
PROMPT = "a red ball by day on grass"


def measured(length: int, folder: Path) -> int:
    """Peak memory of the command that draws a canvas, in a process of its own, in KiB; leaves states in the folder."""
    command = [sys.executable, "-m", "benchmarks.stream", str(length), str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def command(length: int, folder: Path) -> None:
    add = growing.Output.add

    def kept(output: Any, start: int, pixels: Any, state: Any) -> None:
        if state is not None and int(state["number"]) in (EARLY, LATE):
            save_file({n: t.contiguous() for n, t in state.items()}, folder / f"{int(state['number'])}.safetensors")
        add(output, start, pixels, state)

    growing.Output.add = kept
    said = ["--length", str(length), "--across", str(ACROSS), "--steps", str(STEPS), "--cfg", "1", "--device", "cpu"]
    assert main(["stream", PROMPT, *said, "-o", str(folder / f"{length}.png")]) == 0
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def timed(folder: Path, repeats: int) -> tuple[float, list[float]]:
    """A stretch at the end of the long canvas against one at its start."""
    pipe = load(MODEL, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    rolling = roll(pipe)

    def one(number: int) -> None:
        state = load_file(folder / f"{number}.safetensors")
        how = {"length": LONG, "height": ACROSS, "num_inference_steps": STEPS, "cfg": 1.0}
        next(rolling.stream(PROMPT, state=state, **how))

    return ratios(lambda: one(LATE), lambda: one(EARLY), repeats)


def run(repeats: int = 12) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        short, long = measured(SHORT, folder), measured(LONG, folder)
        middle, every = timed(folder, repeats)
    where = f"torch {torch.__version__.split('+')[0]}, {torch.get_num_threads()} threads, {platform.machine()}"
    lines = [
        "# Streams",
        "",
        f"Written by `python -m benchmarks.stream` ({where}). `stream`, {ACROSS} pixels across, {STEPS} steps, cfg 1.",
        "",
        "| | ratio | target |",
        "| --- | --- | --- |",
        f"| peak memory, {LONG} pixels long against {SHORT} | **{long / short:.3f}** | at most 1.05 |",
        f"| time of stretch {LATE + 1} against stretch {EARLY + 1} | **{middle:.3f}** | at most 1.05 |",
        "",
        f"Memory: of the whole process, with its libraries and model ({short / 2**10:.0f} MiB at {SHORT} pixels),",
        f"and the picture written at the end. Time: the median of {len(every)} interleaved pairs (quartiles",
        f"{every[len(every) // 4]:.3f} and {every[-len(every) // 4]:.3f}).",
    ]
    path = Path(__file__).parent / "stream.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        command(int(sys.argv[1]), Path(sys.argv[2]))
    else:
        run()
