"""The diffusers pipeline: FluxPipeline with an order, a rolling window and memory."""

from ..defaults import Card
from .flux import RollingFluxPipeline
from .loading import load
from .schedulers import SAMPLERS, SPACINGS

__all__ = ["SAMPLERS", "SPACINGS", "Card", "RollingFluxPipeline", "load"]
