"""Drawing one picture of a job, in the model's thread: partial pictures on the way, an end within one call if asked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..appearing import Veil
from ..pipeline import Rolling, Tick

if TYPE_CHECKING:
    from PIL import Image

    from ..core.plan import Plan
    from .job import Job


class Stopped(Exception):
    """Nobody waits for the picture any more."""


def draw(
    pipeline: Rolling,
    job: Job,
    number: int,
    stop: threading.Event,
    ticked: Callable[[Tick], object],
    shown: Callable[[int, Image.Image], object],
) -> Image.Image:
    """Picture `number` of a job. ticked: told each call of the model; shown: a partial picture and its number.

    Stopped if `stop` is set, within one call. ValueError, of one sentence, for what the pipeline refuses.
    """
    said = job.fields
    seed = job.seed + number
    plan = job.plan(number, _steps_left(pipeline, job))
    wanted = moments(plan, said.partial_images) if said.partial_images else even(0, plan.ticks, said.frames)
    veil, partials = Veil(), 0

    def on_tick(tick: Tick) -> None:
        nonlocal partials
        if stop.is_set():
            raise Stopped
        ticked(tick)
        veil.tell(tick)
        if tick.number in wanted:
            shown(partials, veil.over(pipeline.preview(tick)))
            partials += 1

    more: dict[str, Any] = {"image": job.image, "mask_image": job.mask}
    more |= {"strength": job.strength, "negative_prompt": said.negative_prompt or None}
    more = {name: value for name, value in more.items() if value is not None}
    for name in more:
        if name not in pipeline.parameters:
            raise ValueError(f"{name} is not for this model, whose pipeline takes none: leave it out")
    (image,) = pipeline(
        prompt=said.prompt,
        width=job.width,
        height=job.height,
        num_inference_steps=job.steps,
        cfg=said.cfg,
        order=said.order,
        window=said.window,
        overlap=said.overlap,
        attention_persistence=said.attention_persistence,
        draft=said.draft,
        lookahead=said.lookahead,
        lag=said.lag,
        extrapolation=said.extrapolation,
        generator=torch.Generator("cpu").manual_seed(seed),
        on_tick=on_tick,
        **more,
    ).images
    return image


def moments(plan: Plan, count: int) -> set[int]:
    """The ticks in which partial pictures are shown: evenly from the first block's end on, so that each has something
    finished; with one block, or all at one level, evenly over all."""
    return even(0 if plan.alone else plan.steps, plan.ticks, count)


def even(start: int, end: int, count: int) -> set[int]:
    """So many ticks from `start` on, or from before it where too few are left, and before `end`."""
    start = min(start, max(0, end - count - 1))
    return {start + (end - start) * i // (count + 1) for i in range(1, count + 1)}


def _steps_left(pipeline: Rolling, job: Job) -> int:
    """Steps that a picture to start from leaves, as diffusers counts them."""
    strength = job.strength
    if job.image is None or "strength" not in pipeline.parameters:
        return job.steps
    if strength is None:
        strength = pipeline.parameters["strength"].default
    left = min(job.steps * strength, job.steps)
    return max(1, job.steps - int(max(job.steps - left, 0)))
