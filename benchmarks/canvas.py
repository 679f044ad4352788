"""`python -m benchmarks.canvas`: what canvases above the model's size cost, and circles; writes benchmarks/canvas.md.

Operations are predicted for FLUX.1-dev from plans; and counted, by torch's own counter, in runs of a small model of the
same structure, on canvases that are as many times larger than its own size. It is as narrow as its size is small, so
that attention has the same share of its work.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rolling_diffusion import load, roll

from .flux import CARD, CELL, FLUX, STEPS, TEXT, arithmetic, plan_of

CANVASES = {(2048, 2048): "top-to-bottom", (1024, 8192): "top-to-bottom", (4096, 4096): "top-to-bottom"}
TARGETS = {(2048, 2048): 0.8, (1024, 8192): 0.5, (4096, 4096): 0.45}  # of full sampling
EMBEDDED = Path(__file__).parent.parent / "rolling_diffusion" / "embedded"
SHRINK = 4  # the small model's canvases and its own size, against FLUX.1-dev's, a side
SMALL: dict[str, Any] = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 96}


def tiles(width: int, height: int) -> float:
    """Operations of MultiDiffusion with the same window and overlap on both axes: every tile is a call a step."""
    window, advance = CARD.window or 64, (CARD.window or 64) - CARD.overlap
    count = [max(1, -(-(side // CELL - CARD.overlap) // advance)) for side in (width, height)]
    tokens, wide = (window // 2) ** 2 + TEXT, 128 * FLUX["num_attention_heads"]
    layers = FLUX["num_layers"] + FLUX["num_single_layers"]
    return STEPS * count[0] * count[1] * layers * (24 * wide**2 * tokens + 4 * wide * tokens**2)


def small_pipeline() -> Any:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        **SMALL, in_channels=64, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(16, 40, 40)
    )
    channels: Any = (4, 4, 4, 4)
    vae = AutoencoderKL(block_out_channels=channels, latent_channels=16, norm_num_groups=1)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    empty: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer.eval(), **empty)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def counted(pipe: Any, width: int, height: int, **way: Any) -> int:
    """Operations of one picture, as the counter sees them."""
    text = TEXT // SHRINK**2
    # The counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        pipe(
            prompt_embeds=torch.zeros(1, text, 32),
            pooled_prompt_embeds=torch.zeros(1, 32),
            width=width // SHRINK,
            height=height // SHRINK,
            num_inference_steps=STEPS,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            **way,
        )
    return counter.get_total_flops()


def borders_of(images: np.ndarray) -> np.ndarray:
    """Of pictures (n, height, width, 3) whose left and right edges meet, for each border of tokens, the seam first: the
    step from one column to the next there, against that at all others. Of a column the median: what ends there in a few
    rows does not count.
    """
    steps = np.abs(images - np.roll(images, 1, 2)).mean(3)
    borders = np.median(steps, 1)[:, ::16].mean(0)
    return borders * (len(borders) - 1) / (borders.sum() - borders)


def circles() -> list[str]:
    """The embedded model's pictures with and without `wrap="x"`."""
    count, batch = 24, 6
    rolled = roll(load(EMBEDDED, None, "cpu"))
    rolled.pipe.set_progress_bar_config(disable=True)
    prompts = ["on grass by day", "on sand in the evening", "in the snow at night", "a red ball", "a tree", "two stars"]
    found = {}
    for wrap in ("x", None):
        images = []
        for first in range(0, count, batch):
            seeds = [torch.Generator().manual_seed(first + i) for i in range(batch)]
            images.append(rolled(prompt=prompts, generator=seeds, output_type="np", wrap=wrap).images)
        found[wrap] = borders_of(np.concatenate(images))
    seam, *others = found["x"]
    return [
        "",
        f"## Circles\n{count} pictures of the embedded model at its defaults. The step between two columns of pixels",
        "where the left edge meets the right one, against that at all other borders of tokens:",
        f'**{seam:.3f}** with `wrap="x"` (target: at most 1.02), {found[None][0]:.1f} without. Each of the other',
        f"borders, measured in the same way: from {min(others):.2f} to {max(others):.2f}.",
    ]


def main() -> None:
    card = replace(CARD, native_tokens=CARD.native_tokens // SHRINK**2, window=64 // SHRINK, overlap=16 // SHRINK)
    pipe = small_pipeline()
    rolled = roll(pipe, card)
    lines = [
        "# Canvases above the model's size",
        "Written by `python -m benchmarks.canvas`. Operations of the transformer against ordinary sampling of the same",
        f"canvas, {STEPS} steps. Predicted for FLUX.1-dev; counted in runs of a small model like it, with size,",
        f"window and canvas {SHRINK} times smaller a side. Tiles: the same window and overlap, along both axes.",
        "",
        "| canvas | rolling with a guide, predicted | counted | target | without a guide | tiles | guide / tiles |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (width, height), order in CANVASES.items():
        full = arithmetic(plan_of(width, height, None), FLUX)
        guided = arithmetic(plan_of(width, height, {"order": order, "guide": "auto"}), FLUX)
        plain = arithmetic(plan_of(width, height, {"order": order, "guide": False}), FLUX)
        ratio = counted(rolled, width, height, order=order) / counted(pipe, width, height)
        tiled = tiles(width, height)
        lines.append(
            f"| {width}×{height} | {guided / full:.2f} | {ratio:.2f} | at most {TARGETS[width, height]} | "
            f"{plain / full:.2f} | {tiled / full:.2f} | {guided / tiled:.2f} (at most 0.6) |"
        )
        print(lines[-1], flush=True)
    lines += circles()
    print("\n".join(lines[-4:]), flush=True)
    path = Path(__file__).parent / "canvas.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
