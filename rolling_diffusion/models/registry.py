"""Which family a model belongs to. A new one is a file with a subclass of `Family`, a line here, and its tests."""

from __future__ import annotations

from typing import Any

from .call import unwrapped
from .family import Family
from .flux import Control, Flux
from .flux2 import Flux2
from .sd3 import SD3

# By the names of diffusers' classes.
FAMILIES: dict[str, type[Family]] = {
    "FluxTransformer2DModel": Flux,
    "Flux2Transformer2DModel": Flux2,
    "SD3Transformer2DModel": SD3,
}
CONTROLNETS: dict[str, type[Family]] = {"FluxControlNetModel": Control, "FluxMultiControlNetModel": Control}


def family_of(transformer: Any) -> Family:
    """The family of a transformer; ValueError, of one sentence, for one that none of them knows."""
    return _find(transformer, FAMILIES, "transformer")


def control_of(controlnet: Any) -> Family:
    """The family of a ControlNet, which is asked for residuals; ValueError as above."""
    return _find(controlnet, CONTROLNETS, "ControlNet")


def _find(model: Any, known: dict[str, type[Family]], what: str) -> Family:
    model = unwrapped(model)
    for kind in type(model).__mro__:
        if kind.__name__ in known and kind.__module__.startswith("diffusers."):
            return known[kind.__name__](model)
    raise ValueError(
        f"{type(model).__name__} takes no noise level per token in a way that is known here: the pipeline's {what} "
        f"must be one of {', '.join(known)}"
    )
