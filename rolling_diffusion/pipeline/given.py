"""What is given of a canvas: a picture or latents, and where; as blocks of cells, and as latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core.order import Block, rectangles
from ..models.family import Family

WHITE = 128  # of 255: a mask's pixel that is at least so bright is given


class Source:
    """A picture or latents, and the mask of what is given of them; see `Rolling.__call__`.

    origin: cells (down, across) at which the prompt's picture begins; (0, 0) unless a canvas continues another one.
    """

    def __init__(self, pipe: Any, family: Family, given: Any, mask: Any, origin: tuple[int, int] = (0, 0)):
        self.pipe, self.family, self.given, self.origin = pipe, family, given, origin
        if mask is None and isinstance(given, Image.Image) and "A" in given.getbands():
            mask = given.getchannel("A")
        if mask is None:
            raise ValueError(
                "given has no mask, so all of the canvas would be given: say where it is with given_mask, white where "
                "it is given, or give a picture that is transparent elsewhere"
            )
        self.mask: Any = _as_array(mask)

    def blocks(self, height: int, width: int) -> tuple[Block, ...]:
        """The tokens that are given as a whole, as blocks, on a canvas of so many cells."""
        rows, columns, side = *self.mask.shape, self.family.patch
        cell = self.pipe.vae_scale_factor
        if (rows, columns) not in ((height, width), (height * cell, width * cell)):
            raise ValueError(
                f"given_mask is of {columns} × {rows}, and must be of the canvas's {width * cell} × {height * cell} "
                f"pixels, or {width} × {height} cells"
            )
        down, across = height // side, width // side
        tokens = self.mask.reshape(down, rows // down, across, columns // across).all((1, 3))
        if not tokens.any():
            raise ValueError(
                f"given_mask gives no whole token of {side * cell} × {side * cell} pixels: make it larger, or leave "
                "given out"
            )
        return rectangles(tokens.tolist(), side)

    def latents(self, height: int, width: int) -> Tensor:
        """In the pipeline's own form, on a canvas of so many cells."""
        given, family, cell = self.given, self.family, self.pipe.vae_scale_factor
        if isinstance(given, Tensor):
            found = family.latents(given) if given.ndim == 4 else given
            try:
                shape = family.cells(found, height, width).shape[-2:]
            except RuntimeError:
                shape = None
            if given.ndim not in (3, 4) or shape != (height, width):
                raise ValueError(
                    f"given has latents of shape {tuple(given.shape)}, and must be cells (pictures, channels, "
                    f"{height}, {width}), or what the pipeline gives as output_type='latent' on this canvas"
                )
            return found
        picture = given.convert("RGB") if isinstance(given, Image.Image) else np.asarray(given)
        if isinstance(picture, np.ndarray):
            if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype.kind not in "uf":
                raise ValueError(
                    f"given is {type(given).__name__} of shape {picture.shape}, and must be a picture, "
                    "(height, width, 3), or latents"
                )
            picture = Image.fromarray(picture) if picture.dtype == np.uint8 else picture  # others are from 0 to 1
        size = picture.size if isinstance(picture, Image.Image) else picture.shape[1::-1]
        if size != (width * cell, height * cell):
            raise ValueError(
                f"given is a picture of {size[0]} × {size[1]} pixels, and must be of the canvas's {width * cell} × "
                f"{height * cell}: paste it where it belongs"
            )
        pixels = self.pipe.image_processor.preprocess(picture)
        with torch.no_grad():
            return family.encode(self.pipe, pixels)


def _as_array(mask: Any) -> np.ndarray:
    """(rows, columns), true where it is given."""
    if isinstance(mask, Image.Image):
        return np.asarray(mask.convert("L")) >= WHITE
    array = np.squeeze(mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask))
    if array.ndim != 2:
        raise ValueError(f"given_mask has the shape {array.shape}, and must be a picture, or rows of true and false")
    return array if array.dtype == bool else array >= (WHITE if array.dtype == np.uint8 else 0.5)
