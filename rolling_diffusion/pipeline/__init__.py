"""roll(pipe): pipelines of diffusers, drawing in an order."""

from .roll import Rolling, roll
from .run import Tick
from .schedulers import SAMPLERS, SPACINGS
from .stream import Strip

__all__ = ["SAMPLERS", "SPACINGS", "Rolling", "Strip", "Tick", "roll"]
