"""A canvas that grows: drawn stretch by stretch, and decoded as it is finished, in memory that does not grow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .cohort import block_seed
from .order import Block, route_of, whole

BLEND = 8  # cells over which two pieces are blended, where a decoder sees the whole canvas
FADE = 32  # pixels over which what follows a picture takes up its tone


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
        if length is not None and at >= length:
            break  # prompts may never end
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


@dataclass(frozen=True)
class Along:
    """The way in which a canvas grows: the axis of (B, C, height, width), and whether towards its near edge."""

    axis: int
    backwards: bool

    @classmethod
    def of(cls, order: str) -> Along:
        """The way of an order by rows or columns."""
        route = route_of(order)
        return cls(2 if route.axis == "rows" else 3, route.backwards)

    def shape(self, across: int, length: int) -> tuple[int, int]:
        """Height and width of a canvas so long."""
        return (length, across) if self.axis == 2 else (across, length)

    def seed(self, seed: int, number: int, start: int) -> int:
        """That of the stretch of this number, which begins so many cells along the way."""
        return block_seed(seed, Block(number, *self.shape(0, start), 0, 0))

    def given(self, before: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """A canvas that begins with `before`; where it is that, (1, 1, height, width); and the corner of what follows,
        in rows and columns, where its prompt's picture begins."""
        seen = before.shape[self.axis]
        canvas = before.new_zeros(*before.shape[:2], height, width)
        there = torch.zeros(1, 1, height, width, dtype=torch.bool)
        self.cut(canvas, 0, seen).copy_(before)
        self.cut(there, 0, seen).fill_(True)
        return canvas, there, (0, 0) if self.backwards else self.shape(0, seen)

    def join(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts[::-1] if self.backwards else parts, self.axis)

    def cut(self, x: Tensor, start: int, stop: int) -> Tensor:
        """From start to stop along the way."""
        length = x.shape[self.axis]
        start, stop = (length - stop, length - start) if self.backwards else (start, stop)
        return x.narrow(self.axis, start, stop - start)

    def last(self, x: Tensor, count: int) -> Tensor:
        length = x.shape[self.axis]
        return self.cut(x, max(0, length - count), length)

    def ramp(self, values: Tensor) -> Tensor:
        """A value for each place along the way, (length,), as a canvas."""
        return (values.flip(0) if self.backwards else values).view([-1 if i == self.axis else 1 for i in range(4)])

    def matched(self, pixels: Tensor, edge: Tensor) -> Tensor:
        """What follows the edge of a picture, in its tone. pixels: from 0 to 1, that edge as it is decoded first, which
        is left out; edge: as it is."""
        n, length = edge.shape[self.axis], pixels.shape[self.axis]
        missed = edge - self.cut(pixels, 0, n)
        tone = nn.functional.pad(missed.mean(self.axis), (n, n), "replicate")
        tone = nn.functional.avg_pool1d(tone, 2 * n + 1, 1).unsqueeze(self.axis)
        rest = self.cut(missed, n - 1, n) - tone  # of the last line, which lies against the first new one
        steps = torch.arange(length - n) + 0.5
        far, near = (self.ramp((1 - steps / reach).clamp(0)) for reach in (FADE, n))
        return (self.cut(pixels, n, length) + tone * far + rest * near).clamp(0, 1)


def sight(layers: Iterable[Any] | None) -> int | None:
    """How many cells around it a pixel of a decoder of these layers depends on; None if on all of them, or if it cannot
    be told.

    Tiny autoencoders are made of convolutions alone; others normalise over the whole picture, or attend to it.
    """
    if layers is None:
        return None
    cells, scale = 0.0, 1.0  # pixels a cell, where the layer works
    for layer in layers:
        if isinstance(layer, nn.Upsample):
            scale *= float(vars(layer)["scale_factor"])
        elif isinstance(layer, nn.Conv2d):
            cells += (layer.kernel_size[0] // 2) / scale
        elif hasattr(layer, "conv") and getattr(layer, "pool", None) is None:  # a residual block
            cells += sum(conv.kernel_size[0] // 2 for conv in layer.conv if isinstance(conv, nn.Conv2d)) / scale
        elif not isinstance(layer, (nn.ReLU, nn.Identity)) and type(layer).__name__ != "Clamp":
            return None
    return math.ceil(cells)


class Decoder:
    """Decodes a canvas that grows: takes finished cells (B, C, height, width), gives the pixels that are final.

    A decoder of convolutions is given as many cells on either side as it sees, so the pixels are those of the whole
    canvas. Others see all of it: their pieces are blended over a few cells, as tiled decoding in diffusers does.
    """

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor],
        way: Along,
        exact: int | None,
        state: Mapping[str, Tensor] | None = None,
    ):
        """decode: pixels (B, 3, h, w), from 0 to 1, of cells. exact: `sight` of its layers. state: of `state`."""
        self.decode, self.way, self.exact = decode, way, exact
        self.margin = BLEND if self.exact is None else self.exact
        self.cells: Tensor | None = None  # those that are still needed
        self.done = 0  # of them are decoded
        self.edge: Tensor | None = None  # pixels of the last piece that the next one is blended into
        if state:
            self.cells, self.edge = state["cells"], state.get("edge")
            self.done = int(state["done"])

    def state(self) -> dict[str, Tensor]:
        """What `__init__` goes on from."""
        assert self.cells is not None
        found = {"cells": self.cells.cpu(), "done": torch.tensor(self.done)}
        return found | ({} if self.edge is None else {"edge": self.edge.cpu()})

    def add(self, cells: Tensor, end: bool) -> Tensor:
        """The pixels (B, 3, h, w), from 0 to 1, that are final when these cells follow; end: that nothing follows."""
        way, known = self.way, self.cells
        cells = cells if known is None else way.join(known.to(cells), cells)
        count = cells.shape[way.axis]
        pixels = self.decode(cells)
        each = pixels.shape[way.axis] // count
        ready = count if end else max(self.done, count - self.margin)
        final = way.cut(pixels, self.done * each, ready * each)
        if self.exact is None:
            final = self.blended(final)
            self.edge = way.cut(pixels, ready * each, count * each)
        keep = max(0, ready - self.margin)
        self.cells, self.done = way.cut(cells, keep, count), ready - keep
        return final

    def blended(self, pixels: Tensor) -> Tensor:
        edge, way = self.edge, self.way
        if edge is None or not edge.shape[way.axis]:
            return pixels
        n = min(edge.shape[way.axis], pixels.shape[way.axis])
        share = way.ramp((torch.arange(n, device=pixels.device) + 0.5) / n)
        mixed = torch.lerp(way.cut(edge.to(pixels), 0, n), way.cut(pixels, 0, n), share)
        return way.join(mixed, way.cut(pixels, n, pixels.shape[way.axis]))
