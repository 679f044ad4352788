"""A picture carried on beyond an edge: a stream whose first stretch goes on from the picture's end."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core.growing import Along
from ..core.order import AWAY, whole
from ..defaults import context_of


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
    if side not in AWAY:
        raise ValueError(f"side is {side!r}, and must be one of {', '.join(AWAY)}")
    pixels = whole("pixels", pixels, 1)
    order, family, pipe = AWAY[side], rolling.family, rolling.pipe
    way = Along.of(order)
    axis = way.axis - 2
    cell = pipe.vae_scale_factor
    unit = cell * family.patch
    own = rolling.card.size if stretch is None else stretch
    seen = context_of(own, unit) if context is None else whole("context", context, 1)
    known = np.asarray(picture.convert("RGB"))
    there, across = known.shape[axis], known.shape[1 - axis]
    if there < unit:
        raise ValueError(f"the picture is {there} pixels along {order}, and must be {unit} at least")
    # Beyond what is committed, the encoder sees more of the picture, as far as the model was made for.
    crop = min(max(seen, rolling.card.size), there) // unit * unit
    seen = min(seen, crop)
    part = known.take(range(crop) if way.backwards else range(there - crop, there), axis)
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
    new = way.join(*(_tensor(strip.pixels) for strip in strips))
    # Without what was drawn for the sake of whole tokens.
    new = way.cut(new.narrow(5 - way.axis, 0, across), 0, cell + pixels)
    new = way.matched(new, way.last(_tensor(known), cell))
    added = (new[0].movedim(0, -1) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(np.concatenate([added, known] if way.backwards else [known, added], axis))


def _tensor(pixels: np.ndarray) -> Tensor:
    """(1, 3, height, width) from 0 to 1."""
    return torch.tensor(pixels).movedim(-1, 0)[None] / 255
