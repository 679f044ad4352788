"""Decoding a canvas piece by piece, as its latents are finished, in memory that does not grow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLEND = 8  # cells over which two pieces are blended, where a decoder sees the whole canvas


def sight(vae: Any) -> int | None:
    """How many cells around it a pixel of a decoder depends on; None if on all of them, or if it cannot be told.

    An `AutoencoderTiny` is made of convolutions alone; others normalise over the whole picture, or attend to it.
    """
    layers: Any = getattr(getattr(vae, "decoder", None), "layers", None)
    if layers is None:
        return None
    cells, scale = 0.0, 1.0  # pixels a cell, where the layer works
    for layer in layers:
        if isinstance(layer, nn.Upsample):
            scale *= float(vars(layer)["scale_factor"])
        elif isinstance(layer, nn.Conv2d):
            cells += (layer.kernel_size[0] // 2) / scale
        elif hasattr(layer, "conv"):  # a residual block
            cells += sum(conv.kernel_size[0] // 2 for conv in layer.conv if isinstance(conv, nn.Conv2d)) / scale
        elif not isinstance(layer, (nn.ReLU, nn.Identity)):
            return None
    return math.ceil(cells)


def pixels_of(family: Any, pipe: Any, cells: Tensor) -> Tensor:
    """Pixels (B, 3, height, width), from 0 to 1, of cells (B, C, height, width), as the family's pipelines decode."""
    with torch.no_grad():
        pixels = family.decode(pipe, family.latents(cells), *cells.shape[-2:])
    return (pixels.float() / 2 + 0.5).clamp(0, 1)


class CircleDecoder:
    """What a pipeline takes for its VAE where the canvas is a circle: decoding sees what lies beyond an edge."""

    def __init__(self, vae: Any, wrap: str):
        self.vae, self.wrap = vae, wrap

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vae, name)

    def decode(self, z: Tensor, *args: Any, **options: Any) -> Any:
        """As the VAE's own; z is (B, C, height, width)."""
        most = sight(self.vae) or 2 * BLEND
        beyond = [min(most, side) if axis in self.wrap else 0 for axis, side in zip("yx", z.shape[-2:])]
        padded = F.pad(z, (beyond[1], beyond[1], beyond[0], beyond[0]), mode="circular")
        found = self.vae.decode(padded, *args, **options)
        pixels = found[0] if isinstance(found, tuple) else found.sample
        each = pixels.shape[-1] // padded.shape[-1]
        top, left = (n * each for n in beyond)
        cut = pixels[..., top : top + z.shape[-2] * each, left : left + z.shape[-1] * each]
        if isinstance(found, tuple):
            return (cut, *found[1:])
        found.sample = cut
        return found


@dataclass(frozen=True)
class Along:
    """The way in which a canvas grows: the axis of (B, C, height, width), and whether towards its near edge."""

    axis: int
    backwards: bool

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


class Decoder:
    """Decodes a canvas that grows: takes finished cells (1, C, height, width), gives the pixels that are final.

    A decoder of convolutions is given as many cells on either side as it sees, so the pixels are those of the whole
    canvas. Others see all of it: their pieces are blended over a few cells, as tiled decoding in diffusers does.
    """

    def __init__(self, family: Any, pipe: Any, way: Along, state: Mapping[str, Tensor] | None = None):
        self.family, self.pipe, self.way = family, pipe, way
        self.exact = sight(pipe.vae)
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
        """The pixels (1, 3, h, w), from 0 to 1, that are final when these cells follow; end: that nothing follows."""
        way, known = self.way, self.cells
        cells = cells if known is None else way.join(known.to(cells), cells)
        count = cells.shape[way.axis]
        pixels = pixels_of(self.family, self.pipe, cells)
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
        share = (torch.arange(n, device=pixels.device) + 0.5) / n
        share = (share.flip(0) if way.backwards else share).view([-1 if i == way.axis else 1 for i in range(4)])
        mixed = torch.lerp(way.cut(edge.to(pixels), 0, n), way.cut(pixels, 0, n), share)
        return way.join(mixed, way.cut(pixels, n, pixels.shape[way.axis]))
