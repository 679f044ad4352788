"""roll(pipe): pipelines of diffusers, drawing in an order."""

from .roll import Rolling, roll
from .run import Tick
from .schedulers import SAMPLERS, SPACINGS

__all__ = ["SAMPLERS", "SPACINGS", "Rolling", "Tick", "roll"]
