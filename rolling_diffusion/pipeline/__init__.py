"""roll(pipe): pipelines of diffusers, drawing in an order."""

from .loading import load
from .roll import Rolling, roll
from .run import Frame
from .schedulers import SAMPLERS, SPACINGS

__all__ = ["SAMPLERS", "SPACINGS", "Frame", "Rolling", "load", "roll"]
