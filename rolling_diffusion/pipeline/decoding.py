"""How a family's pipelines decode a canvas, and piece by piece one that grows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import growing
from ..core.growing import Along


def sight(vae: Any) -> int | None:
    """How many cells around it a pixel of an autoencoder's picture depends on; None as `growing.sight`."""
    return growing.sight(getattr(getattr(vae, "decoder", None), "layers", None))


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
        most = sight(self.vae) or 2 * growing.BLEND
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


class Decoder(growing.Decoder):
    """A pipeline's, for a canvas that grows."""

    def __init__(self, family: Any, pipe: Any, way: Along, state: Mapping[str, Tensor] | None = None):
        super().__init__(lambda cells: pixels_of(family, pipe, cells), way, sight(pipe.vae), state)
