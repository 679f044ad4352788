"""Flux with a noise level per block and with memory, on diffusers' own modules."""

from .denoiser import FluxDenoiser
from .flux import RollingFluxTransformer2DModel

__all__ = ["FluxDenoiser", "RollingFluxTransformer2DModel"]
