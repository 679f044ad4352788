"""A canvas that grows in ComfyUI: stretch after stretch, each one run of a sampler that goes on from the one before."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ..core import growing
from ..core.growing import Along, Stretch
from .flux import per_block_noise
from .nodes import sample_latent
from .notes import Notes
from .settings import Settings, cell_pixels


class Growing:
    """What draws one stretch. Latents are (B, C, height, width)."""

    def __init__(
        self, model: Any, settings: Settings, steps: int, cfg: float, sampler_name: str, scheduler: str, order: str
    ):
        """order: along which the canvas grows; that of the settings is one stretch's."""
        self.model, self.settings, self.cfg, self.sampler_name = model, settings, cfg, sampler_name
        self.way, self.notes = Along.of(order), Notes()
        self.cell = cell_pixels(model.model)
        flux, _ = per_block_noise(model.model, model.model_options)
        self.multiple = model.model.diffusion_model.patch_size if flux else 2 if self.cell <= 8 else 1
        stock = comfy.samplers.KSampler(
            model, steps, model.load_device, sampler_name, scheduler, 1.0, model_options=model.model_options
        )
        self.sigmas = stock.sigmas

    @property
    def unit(self) -> int:
        """Pixels a side of a token."""
        return self.cell * self.multiple

    def cells(self, name: str, pixels: int) -> int:
        """ValueError, one sentence, for pixels that are no whole tokens."""
        if pixels % self.unit:
            take = max(self.unit, pixels // self.unit * self.unit)
            raise ValueError(f"{name} is {pixels} pixels, and must be a multiple of {self.unit}: take {take}.")
        return pixels // self.cell

    def stretch(
        self,
        number: int,
        part: Stretch,
        across: int,
        positive: Any,
        negative: Any,
        before: Tensor | None,
        batch: int = 1,
    ) -> Tensor:
        """The cells of the stretch of this number. before: the end of what it goes on from."""
        way = self.way
        seen = 0 if before is None else before.shape[way.axis]
        height, width = way.shape(across, seen + part.length)
        channels = self.model.model.latent_format.latent_channels
        latent, origin = {"samples": torch.zeros(batch, channels, height, width)}, None
        if before is not None:
            samples, there, origin = way.given(before.expand(batch, -1, -1, -1), height, width)
            latent = {"samples": samples, "noise_mask": 1 - there.float()}
        seed = way.seed(self.settings.seed, number, part.start)
        out = sample_latent(self.model, positive, negative, latent, seed, self.cfg, self.sampler_name, self.sigmas,
                            self.settings, notes=self.notes, origin=origin)["samples"]  # fmt: skip
        out = out.squeeze(2) if out.ndim == 5 else out
        return way.last(out, part.length).to("cpu", torch.float32)


def decoder(vae: Any, way: Along, state: Any = None) -> growing.Decoder:
    """Decodes what a `Growing` draws, with ComfyUI's VAE."""
    layers = getattr(getattr(vae, "first_stage_model", None), "taesd_decoder", None)
    whole = type(layers).__name__ in ("Decoder", "Sequential")  # others put their latents together first
    return growing.Decoder(lambda cells: decoded(vae, cells), way, growing.sight(layers) if whole else None, state)


def decoded(vae: Any, cells: Tensor) -> Tensor:
    """(B, 3, height, width), from 0 to 1."""
    pixels = vae.decode(cells.unsqueeze(2) if getattr(vae, "latent_dim", 2) == 3 else cells)
    return (pixels.flatten(0, 1) if pixels.ndim == 5 else pixels)[..., :3].movedim(-1, 1).float().cpu()


def encoded(vae: Any, pixels: Tensor) -> Tensor:
    """Cells of (B, 3, height, width)."""
    cells = vae.encode(pixels.movedim(1, -1))
    return (cells.squeeze(2) if cells.ndim == 5 else cells).float().cpu()
