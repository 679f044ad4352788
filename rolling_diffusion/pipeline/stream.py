"""A canvas without end: stretch after stretch, each a picture of the model's own size that goes on from the one before.

A stretch is one call of the pipeline, rolled. The end of the stretch before it is given: committed to memory, and seen
by all blocks from their first step on. Its prompt's picture begins where the stretch begins, so places and sizes are
those that the model knows, wherever on the canvas it is. What is held does not grow with the canvas.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.cohort import block_seed
from ..core.order import Block, route_of, whole
from .decoding import Along, Decoder
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


class Stretch(NamedTuple):
    """Cells along the order, and what is to be seen there."""

    start: int
    length: int
    prompt: str
    last: bool


def stretches(prompts: Any, length: int | None, own: int, multiple: int) -> Iterator[Stretch]:
    """What is drawn one after the other. length: of the canvas, None if it ends with the prompts; own: the length of a
    stretch; multiple: of a token; all in cells.

    prompts: one for all; one a stretch; or (place, prompt), a place being a share of the length (a float) or cells.
    ValueError, in one sentence, for prompts that are none, or places out of order.
    """
    if isinstance(prompts, str):
        spans: Iterable[tuple[str, int | None]] = [(prompts, length)]
    elif isinstance(prompts, Sequence) and prompts and not isinstance(prompts[0], str):
        spans = _placed(prompts, length, multiple)
    else:
        spans = ((prompt, own) for prompt in prompts)
    at, waiting = 0, None
    for prompt, span in spans:
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"a prompt of the stream is {prompt!r}, and must be words")
        end = math.inf if span is None else at + span
        end = end if length is None else min(end, length)
        while at < end:
            if waiting is not None:
                yield waiting
            step = int(min(own, end - at))
            waiting = Stretch(at, step, prompt, False)
            at += step
    if waiting is None:
        raise ValueError("the stream has no prompt: it needs one, or one for each stretch")
    if length is not None and at < length:
        raise ValueError(f"the prompts end after {at} of {length} cells: say more of them, or one for all")
    yield waiting._replace(last=True)


def _placed(prompts: Sequence[Any], length: int | None, multiple: int) -> Iterator[tuple[str, int | None]]:
    """(prompt, cells that it holds for) of prompts with places."""
    places: list[int] = []
    for entry in prompts:
        if isinstance(entry, str) or not isinstance(entry, Sequence) or len(entry) != 2:
            raise ValueError(f"a prompt of the stream is {entry!r}, and must be words, or in all a place and words")
        place, prompt = entry
        if isinstance(place, float):
            if length is None:
                raise ValueError(f"the place {place:g} of {prompt!r} is a share, and the stream has no length: say one")
            if not 0 <= place < 1:
                raise ValueError(f"the place of {prompt!r} is {place:g}, and must be a share from 0 to below 1")
            place = round(place * length / multiple) * multiple
        place = whole(f"the place of {prompt!r}", place, 0, "cells")
        if place % multiple:
            raise ValueError(f"the place of {prompt!r} is {place} cells, and must be a multiple of {multiple}")
        if places and place <= places[-1]:
            raise ValueError(
                f"the place of {prompt!r} is {place} cells, and must lie beyond the one before, {places[-1]}"
            )
        if length is not None and place >= length:
            raise ValueError(
                f"the place of {prompt!r} is {place} cells, and must lie within the {length} of the canvas"
            )
        places.append(place)
    if places[0]:
        raise ValueError(f"the first prompt begins at {places[0]} cells, and must begin at 0")
    for (_, prompt), here, there in itertools.zip_longest(prompts, places, places[1:]):
        yield prompt, None if there is None else there - here


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
    route = route_of(order)
    way = Along(2 if route.axis == "rows" else 3, route.backwards)
    if state is not None:
        _check_state(state, way, across, cell)
    number, written = (0, 0) if state is None else (int(state["number"]), int(state["written"]))
    before = None if state is None else state["context"]
    decoder = Decoder(family, pipe, way, state)
    for i, part in enumerate(stretches(prompts, length, stretch, family.patch)):
        if i < number:
            continue
        seen = 0 if before is None else before.shape[way.axis]
        size = {"height": across, "width": across}
        size["height" if way.axis == 2 else "width"] = seen + part.length
        at = part.start if way.axis == 2 else 0, part.start if way.axis == 3 else 0
        generator = torch.Generator().manual_seed(block_seed(seed, Block(i, *at, 0, 0)) % 2**63)
        given = None if before is None else _source(rolling, way, before, size)
        rolling(
            prompt=part.prompt,
            order=order,
            given=given,
            generator=generator,
            output_type="latent",
            **{name: cells * cell for name, cells in size.items()},
            **options,
        )
        cells = family.cells(rolling.latents, size["height"], size["width"])
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


def _source(rolling: Any, way: Along, before: Tensor, size: Mapping[str, int]) -> Source:
    """The end of the stretch before as what is given of the next canvas."""
    height, width, seen = size["height"], size["width"], before.shape[way.axis]
    canvas = before.new_zeros(*before.shape[:2], height, width)
    mask = torch.zeros(1, 1, height, width, dtype=torch.bool)
    way.cut(canvas, 0, seen).copy_(before)
    way.cut(mask, 0, seen).fill_(True)
    origin = (0, 0) if way.backwards else (seen, 0) if way.axis == 2 else (0, seen)
    return Source(rolling.pipe, rolling.family, canvas, mask, origin)
