"""A canvas without end: stretch after stretch, each a picture of the model's own size that goes on from the one before.

A stretch is one call of the pipeline, rolled. The end of the stretch before it is given: committed to memory, and seen
by all blocks from their first step on. Its prompt's picture begins where the stretch begins, so places and sizes are
those that the model knows, wherever on the canvas it is. What is held does not grow with the canvas.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.growing import Along, stretches
from .decoding import Decoder
from .given import Source


@dataclass(frozen=True)
class Strip:
    """Finished pixels of a canvas that grows.

    pixels: (height, width, 3), uint8. start: pixels along the order that come before them. prompt: that of the stretch
    that was drawn last. state: tensors from which `stream` goes on after this strip; none after the last one.
    """

    pixels: np.ndarray
    start: int
    prompt: str
    state: dict[str, Tensor] | None


def stream(
    rolling: Any,
    prompts: Any,
    *,
    order: str,
    across: int,
    length: int | None,
    stretch: int,
    context: int,
    seed: int,
    state: Mapping[str, Tensor] | None,
    options: Mapping[str, Any],
) -> Iterator[Strip]:
    """`Rolling.stream`, in cells, all of it checked."""
    family, pipe = rolling.family, rolling.pipe
    cell = pipe.vae_scale_factor
    way = Along.of(order)
    if state is not None:
        _check_state(state, way, across, cell)
    number, written = (0, 0) if state is None else (int(state["number"]), int(state["written"]))
    before = None if state is None else state["context"]
    decoder = Decoder(family, pipe, way, state)
    for i, part in enumerate(stretches(prompts, length, stretch, family.patch)):
        if i < number:
            continue
        seen = 0 if before is None else before.shape[way.axis]
        height, width = way.shape(across, seen + part.length)
        generator = torch.Generator().manual_seed(way.seed(seed, i, part.start) % 2**63)
        given = Source(pipe, family, *way.given(before, height, width)) if before is not None and seen else None
        rolling(
            prompt=part.prompt,
            order=order,
            given=given,
            generator=generator,
            output_type="latent",
            height=height * cell,
            width=width * cell,
            **options,
        )
        cells = family.cells(rolling.latents, height, width)
        new = way.last(cells, part.length)
        before = way.last(cells, context)
        pixels = decoder.add(new, part.last)
        if not pixels.numel():
            continue
        array = (255 * pixels[0].permute(1, 2, 0)).round().byte().cpu().numpy()
        start, written = written, written + pixels.shape[way.axis]
        after = {"number": torch.tensor(i + 1), "written": torch.tensor(written), "context": before.cpu()}
        yield Strip(array, start, part.prompt, None if part.last else decoder.state() | after)


def _check_state(state: Mapping[str, Tensor], way: Along, across: int, cell: int) -> None:
    """ValueError for a state that no strip of such a canvas has."""
    missing = {"number", "written", "context", "cells", "done"} - state.keys()
    if missing:
        raise ValueError(f"the state has no {', '.join(sorted(missing))}: take that of a Strip")
    seen = state["context"].shape[5 - way.axis]
    if seen != across:
        raise ValueError(
            f"the state is of a canvas {seen * cell} pixels across, and this one has {across * cell}: say the same"
        )
