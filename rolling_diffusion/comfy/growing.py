"""A canvas that grows in ComfyUI: stretch after stretch, each one run of a sampler that goes on from the one before."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ..core import growing
from ..core.cohort import block_seed
from ..core.growing import Along, Stretch
from ..core.order import Block, route_of
from .flux import per_block_noise
from .nodes import sample_latent
from .notes import Notes
from .settings import Settings, cell_pixels


def way_of(order: str) -> Along:
    route = route_of(order)
    return Along(2 if route.axis == "rows" else 3, route.backwards)


class Growing:
    """What draws one stretch. Latents are (B, C, height, width)."""

    def __init__(
        self, model: Any, settings: Settings, steps: int, cfg: float, sampler_name: str, scheduler: str, order: str
    ):
        """order: along which the canvas grows; that of the settings is one stretch's."""
        self.model, self.settings, self.cfg, self.sampler_name = model, settings, cfg, sampler_name
        self.way, self.notes = way_of(order), Notes()
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
        shape = [across, across]
        shape[way.axis - 2] = seen + part.length
        channels = self.model.model.latent_format.latent_channels
        samples = torch.zeros(batch, channels, *shape)
        latent: dict[str, Any] = {"samples": samples}
        origin = None
        if before is not None:
            mask = torch.ones(1, 1, *shape)
            way.cut(samples, 0, seen).copy_(before)
            way.cut(mask, 0, seen).zero_()
            latent["noise_mask"] = mask
            origin = (0, 0) if way.backwards else (seen, 0) if way.axis == 2 else (0, seen)
        at = (part.start, 0) if way.axis == 2 else (0, part.start)
        seed = block_seed(self.settings.seed, Block(number, *at, 0, 0))
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
