"""A picture carried on beyond an edge: a stream whose first stretch goes on from the picture's end."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from ..core.order import route_of, whole
from .decoding import Along

ORDERS = {"right": "left-to-right", "left": "right-to-left", "bottom": "top-to-bottom", "top": "bottom-to-top"}
FADE = 32  # pixels over which the new part takes up the tone of the picture


def extend(
    rolling: Any,
    picture: Image.Image,
    side: str,
    pixels: int,
    prompt: Any,
    *,
    stretch: int | None = None,
    context: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Image.Image:
    """A picture carried on by so many pixels beyond a side of it: left, right, top or bottom.

    The picture's own pixels stay as they are. Of it, the model sees the `context` pixels next to the side: None for
    half of a stretch. prompt, stretch, seed and other arguments: as for `Rolling.stream`, along the order that leads
    away. ValueError, in one sentence, for what does not fit together.
    """
    if side not in ORDERS:
        raise ValueError(f"side is {side!r}, and must be one of {', '.join(ORDERS)}")
    pixels = whole("pixels", pixels, 1)
    order, family, pipe = ORDERS[side], rolling.family, rolling.pipe
    route = route_of(order)
    way, axis = Along(2 if route.axis == "rows" else 3, route.backwards), 0 if route.axis == "rows" else 1
    cell = pipe.vae_scale_factor
    unit = cell * family.patch
    own = rolling.card.size if stretch is None else stretch
    seen = max(unit, own // 2 // unit * unit) if context is None else whole("context", context, 1)
    known = np.asarray(picture.convert("RGB"))
    there, across = known.shape[axis], known.shape[1 - axis]
    if there < unit:
        raise ValueError(f"the picture is {there} pixels along {order}, and must be {unit} at least")
    # Beyond what is committed, the encoder sees more of the picture, as far as the model was made for.
    crop = min(max(seen, rolling.card.size), there) // unit * unit
    seen = min(seen, crop)
    part = known.take(range(crop) if route.backwards else range(there - crop, there), axis)
    missing = -across % unit
    part = np.pad(part, [(0, missing) if i == 1 - axis else (0, 0) for i in range(3)], "edge")
    x = pipe.image_processor.preprocess(Image.fromarray(part))
    with torch.no_grad():
        latents = family.encode(pipe, x)
    cells = way.last(family.cells(latents, part.shape[0] // cell, part.shape[1] // cell), seen // cell)
    # The last cell of the picture is decoded with what follows: how far it is from the picture's own pixels is seen.
    state = {"number": 0, "written": 0, "context": cells, "cells": cells, "done": cells.shape[way.axis] - 1}
    size = {"width" if axis == 0 else "height": across + missing}
    strips = rolling.stream(
        prompt,
        order=order,
        length=pixels + -pixels % unit,
        stretch=stretch,
        context=seen,
        seed=seed,
        state={name: torch.as_tensor(value) for name, value in state.items()},
        **size,
        **options,
    )
    found = [strip.pixels for strip in strips]
    new = np.concatenate(found[::-1] if route.backwards else found, axis)
    # As if it grew to the right, and without what was drawn for the sake of whole tokens.
    turned = _turned(new, axis, route.backwards)[:across, : cell + pixels]
    old = _turned(known, axis, route.backwards)
    new = _turned(_matched(turned, old[:, -cell:]), axis, route.backwards)
    return Image.fromarray(np.concatenate([new, known] if route.backwards else [known, new], axis))


def _turned(pixels: np.ndarray, axis: int, backwards: bool) -> np.ndarray:
    """To and from a picture that grows to the right."""
    pixels = pixels[:, ::-1] if backwards and axis else pixels[::-1] if backwards else pixels
    return pixels if axis else pixels.transpose(1, 0, 2)


def _matched(new: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """What follows an edge, less the tone by which the decoder missed the edge. new: (rows, columns, 3), the decoded
    edge first."""
    n = edge.shape[1]
    missed = (edge.astype(np.float32) - new[:, :n]).mean(1)
    near = np.pad(missed, [(n, n), (0, 0)], "edge")
    smooth = np.stack([near[i : i + len(missed)] for i in range(2 * n + 1)]).mean(0)
    new = new[:, n:].astype(np.float32)
    fade = np.clip(1 - (np.arange(new.shape[1]) + 0.5) / FADE, 0, 1)
    return (new + smooth[:, None] * fade[:, None]).round().clip(0, 255).astype(np.uint8)
