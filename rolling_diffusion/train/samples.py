"""Sample grids: what the transformer draws so far, for the eye, beside the losses.

Ordinary sampling above, rolling below; decoded by the pseudo-inverse of the linear encoder, blurred but true, as the
decoder is trained last.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image
from torch import Tensor

from ..models.flux import unpack
from ..pipeline import roll
from .export import CARD, SHIFT, tokenizers
from .optimiser import autocast
from .vae import PATCH, decode, linear_encoder

PROMPTS = (
    "a red ball",
    "a yellow star at the top at night",
    "three purple kites",
    "a green tree and a red house on snow",
    "a blue boat below an orange star at sunset",
    "two green houses on the beach",
)


class Samples:
    """Calls of it draw the same prompts from the same seeds, and save a grid (PNG) of 256×256 pictures."""

    def __init__(self, transformer: Any, encoders: tuple, vae: Any) -> None:
        device = next(transformer.parameters()).device
        (tokenizer, tokenizer_2), (t5, clip) = tokenizers(), copy.deepcopy(encoders)  # training has them on the CPU
        scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
        pipe = FluxPipeline(scheduler, copy.deepcopy(vae), clip, tokenizer, t5, tokenizer_2, transformer).to(device)  # pyright: ignore[reportArgumentType]
        pipe.set_progress_bar_config(disable=True)
        self.roll, self.device = roll(pipe, CARD), device.type
        self.encoder = linear_encoder(vae)

    def __call__(self, path: Path) -> None:
        rows = [self._draw(lag=0), self._draw()]
        grid = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((grid.permute(1, 2, 0) * 255 + 0.5).byte().numpy()).save(path)

    def _draw(self, **way: Any) -> Tensor:
        """(B, 3, 256, 256) in 0 to 1."""
        generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
        with autocast(self.device):
            (tokens,) = self.roll(list(PROMPTS), generator=generators, output_type="latent", return_dict=False, **way)
        side = CARD["size"] // PATCH
        return decode(unpack(tokens.float().cpu(), side, side), *self.encoder)
