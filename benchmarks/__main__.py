"""`make bench`: ratios on the embedded model, each pair interleaved in one run; writes benchmarks/results.md.

roll(pipe) at one block against the pipeline itself, the share of time that is not the transformer's, measured time
against the plan's predicted cost, and memory on and off.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import FluxPipeline

from rolling_diffusion import Card, plan_for, roll

from . import ratios

MODEL = Path(__file__).parent.parent / "rolling_diffusion" / "embedded"
SIDE, STEPS, TEXT = 32, 20, 32  # cells, steps, text tokens: a picture of 256×256 at the defaults
FOUR = {"window": 16, "overlap": 8, "draft": 0}  # four strips
PLANS: dict[str, dict[str, Any]] = {
    "the defaults: window 16, overlap 8, draft 10": {},
    "window 16, overlap 8": FOUR,
    "window 16, overlap 8, draft 5": FOUR | {"draft": 5},
    "window 24, overlap 16": {"window": 24, "overlap": 16, "draft": 0},
    "block-autoregressive, 4 strips": FOUR | {"lag": "autoregressive"},
    "spiral-out, window 16, overlap 0": {"window": 16, "overlap": 0, "draft": 0, "order": "spiral-out"},
}
MEMORY: dict[str, dict[str, Any]] = {
    "finished and waiting": FOUR,
    "finished only": FOUR | {"lookahead": 0},
    "waiting only": FOUR | {"attention_persistence": 0.0},
    "none": FOUR | {"lookahead": 0, "attention_persistence": 0.0},
}


class Bench:
    """One branch (no classifier-free guidance), latents as output, embeddings made beforehand."""

    def __init__(self) -> None:
        self.pipe = FluxPipeline.from_pretrained(MODEL)
        self.pipe.set_progress_bar_config(disable=True)
        self.roll, self.card = roll(self.pipe), Card.in_folder(MODEL)
        embeds, pooled, _ = self.pipe.encode_prompt("a red ball above a blue boat", max_sequence_length=TEXT)
        self.prompt = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "true_cfg_scale": 1.0}
        self.inside = 0.0  # seconds in the transformer

    def call(self, pipe: Any, **way: Any) -> None:
        size = {"height": SIDE * 8, "width": SIDE * 8, "num_inference_steps": STEPS}
        pipe(**self.prompt, **size, output_type="latent", generator=torch.Generator().manual_seed(0), **way)

    def stock(self) -> None:
        self.call(self.pipe)

    def overhead(self, repeats: int = 60) -> list[str]:
        middle, every = ratios(lambda: self.call(self.roll, lag=0), self.stock, repeats)
        return [
            "## roll(pipe) at one block",
            f"A picture of {SIDE * 8}×{SIDE * 8}, {STEPS} steps: roll(pipe) at lag 0 against the pipeline itself.",
            f"Median ratio of {len(every)} interleaved pairs: **{middle:.3f}**",
            f"(quartiles {every[len(every) // 4]:.3f} and {every[-len(every) // 4]:.3f}; target: at most 1.02).",
        ]

    def outside(self, repeats: int = 12) -> list[str]:
        kind = type(self.pipe.transformer)
        forward = kind.__call__

        def timed(model: Any, *args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return forward(model, *args, **options)
            finally:
                self.inside += time.perf_counter() - started

        def share(pipe: Any, **way: Any) -> float:
            self.inside, started = 0.0, time.perf_counter()
            self.call(pipe, **way)
            return 1 - self.inside / (time.perf_counter() - started)

        kind.__call__ = timed
        try:
            share(self.roll)
            rolling = median(share(self.roll) for _ in range(repeats))
            stock = median(share(self.pipe) for _ in range(repeats))
        finally:
            kind.__call__ = forward
        return [
            "## Time outside the transformer",
            f"Of a rolling run at the defaults: **{rolling:.1%}** (target: at most 3 %); of the pipeline itself:",
            f"{stock:.1%}. Medians of {repeats} runs.",
        ]

    def plan(self, way: dict[str, Any]) -> Any:
        way = {"persistence" if k == "attention_persistence" else k: v for k, v in way.items()}
        return plan_for(self.card, SIDE, SIDE, STEPS, **way)

    def compared(self, ways: dict[str, dict[str, Any]], repeats: int = 5) -> list[str]:
        lines = ["", "| plan | calls | predicted | measured |", "| --- | --- | --- | --- |"]
        for name, way in ways.items():
            cost = self.plan(way).cost(TEXT)
            middle, _ = ratios(lambda way=way: self.call(self.roll, **way), self.stock, repeats)
            lines.append(f"| {name} | {cost.calls} | {cost.relative:.2f} | {middle:.2f} |")
        return lines

    def cost(self) -> list[str]:
        return [
            "## Measured time against the plan's prediction",
            "Both relative to the pipeline itself on the same canvas. Predicted: token evaluations, the text's in each",
            "call included. What is measured beyond: a small call is dearer a token than a large one, which a small",
            "model on a CPU shows most, and queries that attend to memory, which are no tokens.",
            *self.compared(PLANS),
        ]

    def memory(self) -> list[str]:
        head = ["## Memory on and off", "Four strips, window 16, overlap 8, no draft; relative to the pipeline itself."]
        return [*head, *self.compared(MEMORY)]


def main() -> None:
    bench = Bench()
    where = f"torch {torch.__version__.split('+')[0]}, {torch.get_num_threads()} threads, {platform.machine()}"
    parts = [["# Benchmarks", f"Written by `make bench` ({where}). Ratios, not seconds: machines differ."]]
    for part in (bench.overhead, bench.outside, bench.cost, bench.memory):
        parts.append(part())
        print("\n".join(parts[-1]), flush=True)
    path = Path(__file__).parent / "results.md"
    path.write_text("\n\n".join("\n".join(lines) for lines in parts) + "\n", encoding="utf-8")
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
