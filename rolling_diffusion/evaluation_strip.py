"""Evaluation of strips: pictures that go on from one another, stretch by stretch as if each were a single one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .evaluation import FAR
from .world.score import TASKS, Prompt, Verdict, difference, more_invented, summary
from .world.strip import Seams, joined, judge_strip, strip_prompts

Way = Callable[[Any, Sequence[Prompt], int, Mapping[str, Any]], list[np.ndarray]]


def pictures(rolling: Any, prompts: Sequence[Prompt], seed: int, common: Mapping[str, Any]) -> list[np.ndarray]:
    """Each prompt's own picture, at the model's defaults: what strips are measured against."""
    found = []
    for i, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed + i)
        image = rolling(prompt=prompt.text, generator=generator, output_type="np", **common).images[0]
        found.append(np.round(image * 255).astype(np.uint8))
    return found


def at_once(rolling: Any, prompts: Sequence[Prompt], seed: int, common: Mapping[str, Any]) -> list[np.ndarray]:
    """Ordinary sampling of the whole canvas in one call, each part of it with its own prompt."""
    side = rolling.card.size
    places = [(side * i, prompt.text) for i, prompt in enumerate(prompts)]
    size = {"height": side, "width": side * len(prompts)}
    way = {**size, "order": "left-to-right", "lag": 0, "output_type": "np"}
    image = rolling(places, generator=torch.Generator().manual_seed(seed), **way, **common).images[0]
    return np.split(np.round(image * 255).astype(np.uint8), len(prompts), 1)


def streamed(context: int | None) -> Way:
    """`Rolling.stream`, remembering so many pixels of the stretch before; None for the default, 0 for nothing."""

    def draw(rolling: Any, prompts: Sequence[Prompt], seed: int, common: Mapping[str, Any]) -> list[np.ndarray]:
        texts = [prompt.text for prompt in prompts]
        strips = rolling.stream(texts, order="left-to-right", context=context, seed=seed, **common)
        return np.split(np.concatenate([strip.pixels for strip in strips], 1), len(prompts), 1)

    return draw


@torch.no_grad()
def tiled(rolling: Any, prompts: Sequence[Prompt], seed: int, common: Mapping[str, Any]) -> list[np.ndarray]:
    """MultiDiffusion (Bar-Tal et al. 2023, arXiv 2302.08113): windows of the model's own size that overlap by half,
    each with the prompt of the stretch that it is in, their velocities averaged in each step. For FLUX.1's pipelines.
    """
    pipe, card, family = rolling.pipe, rolling.card, rolling.family
    model, scheduler = pipe.transformer, pipe.scheduler
    side, steps = card.size // pipe.vae_scale_factor, common.get("num_inference_steps", card.steps)
    cfg = common.get("cfg", card.cfg) or 1.0
    starts = range(0, side * (len(prompts) - 1) + 1, side // 2)
    texts = [prompts[min(len(prompts) - 1, (start + side // 4) // side)].text for start in starts]
    length = {"max_sequence_length": card.max_sequence_length}
    told = [pipe.encode_prompt(prompt=t, prompt_2=None, **length) for t in (texts, [""] * len(texts))]
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=pipe.device)
    rows = torch.cartesian_prod(*[torch.arange(side // family.patch, device=pipe.device)] * 2)
    ids = torch.cat([torch.zeros_like(rows[:, :1]), rows], 1).float()
    generator = torch.Generator().manual_seed(seed)
    shape = 1, model.config.in_channels // family.patch**2, side, side * len(prompts)
    canvas = torch.randn(shape, generator=generator).to(pipe.device)
    for time in scheduler.timesteps:
        windows = family.latents(torch.cat([canvas[..., s : s + side] for s in starts]))
        answers: list[Tensor] = []
        for words, pooled, text_ids in told if cfg != 1 else told[:1]:
            answers.append(
                model(
                    hidden_states=windows,
                    timestep=(time / 1000).expand(len(windows)),
                    encoder_hidden_states=words,
                    pooled_projections=pooled,
                    img_ids=ids,
                    txt_ids=text_ids,
                    return_dict=False,
                )[0]
            )
        velocity = answers[0] if cfg == 1 else answers[1] + cfg * (answers[0] - answers[1])
        mean, count = torch.zeros_like(canvas), torch.zeros_like(canvas)
        for s, part in zip(starts, family.cells(velocity, side, side)):
            mean[..., s : s + side] += part
            count[..., s : s + side] += 1
        canvas = scheduler.step(mean / count, time, canvas, return_dict=False)[0]
    pixels = family.decode(pipe, family.latents(canvas), side, side * len(prompts))[0].permute(1, 2, 0)
    image = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().cpu().numpy()
    return np.split(image, len(prompts), 1)


WAYS: dict[str, Way] = {
    "pictures": pictures,
    "stream": streamed(None),
    "no memory": streamed(0),
    "tiles": tiled,
    "at once": at_once,
}


def check_kind(kind: str) -> None:
    """ValueError unless a pipeline of this class can be drawn in each of the ways."""
    if kind != "FluxPipeline":
        raise ValueError(
            f"strips are compared for FluxPipeline, and this is {kind}: name another model, or stream with it"
        )


def evaluate_strips(
    rolling: Any,
    count: int,
    seed: int = 0,
    *,
    stretches: int = 16,
    common: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], object] | None = None,
    keep: Callable[[str, int, np.ndarray], object] | None = None,
) -> dict[str, dict[str, Any]]:
    """For each way of drawing: `summary` of the verdicts on `count` stretches, in strips of so many; how far it lies
    above single pictures of the same prompts, and the stream above it; what is seen at borders.

    common: keyword arguments of every call. keep: takes each strip. ValueError for a model whose windows cannot be
    averaged as FLUX.1's are.
    """
    check_kind(type(rolling.pipe).__name__)
    rng = np.random.default_rng([seed, 9])
    strips = [strip_prompts(rng, min(stretches, count - i), TASKS) for i in range(0, count, stretches)]
    report: dict[str, dict[str, Any]] = {}
    found: dict[str, list[Verdict]] = {}
    for name, way in WAYS.items():
        verdicts = found[name] = []
        seams: list[Seams] = []
        for i, prompts in enumerate(strips):
            drawn = way(rolling, prompts, FAR + 1000 * i, common or {})
            judged, borders = judge_strip(prompts, drawn, "left")
            verdicts += judged
            seams.append(borders)
            if keep is not None:
                keep(name, i, joined(drawn, "left"))
            if progress is not None:
                progress(name, len(verdicts), count)
        report[name] = summary(verdicts) | {
            "against pictures": difference(verdicts, found["pictures"]),
            "invented against pictures": more_invented(verdicts, found["pictures"]),
            "borders": sum(len(s.slips) for s in seams),
            "repeats": sum(s.repeats for s in seams),
            "slip": float(np.mean([slip for s in seams for slip in s.slips] or [0])),
            "step": float(np.median([step for s in seams for step in s.steps] or [1])),
        }
    for name, row in report.items():
        row["stream against it"] = difference(found["stream"], found[name])
    return report


def strip_table(report: Mapping[str, Mapping[str, Any]]) -> str:
    """The report as a Markdown table."""
    lines = [
        "| drawn as | score | against pictures | stream against it | invented | repeats at borders | land slips by | "
        "step at borders |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in report.items():
        gaps = ["{:+.3f} ({:+.3f} to {:+.3f})".format(*row[of]) for of in ("against pictures", "stream against it")]
        more = "{:+.3f}".format(row["invented against pictures"][0])
        lines.append(
            f"| {name} | {row['score']:.3f} | {gaps[0]} | {gaps[1]} | {row['invented']:.3f}, {more} | "
            f"{row['repeats']} at {row['borders']} | {row['slip']:.1f} pixels | {row['step']:.2f} |"
        )
    return "\n".join(lines)
