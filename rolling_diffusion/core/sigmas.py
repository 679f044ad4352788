"""Noise levels for flow models, falling from 1 to 0, by k-diffusion's names for their spacing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SPACINGS = ("uniform", "karras", "exponential", "polyexponential")


def sigmas(name: str = "uniform", steps: int = 20, shift: float = 1.0, rho: float | None = None) -> Tensor:
    """(steps + 1,) fp32 noise levels that end in 0.

    The levels 1, (steps - 1)/steps, … 1/steps are shifted towards noise by s -> shift*s / (1 + (shift - 1)*s) (Esser et
    al. 2024, eq. 23). "uniform" takes them as they are; the others respace what lies between the first and the last of
    them: "karras" (Karras et al. 2022, eq. 5; rho 7), "exponential" (uniform in log sigma), "polyexponential"
    (polynomial in log sigma; rho 1).
    """
    if name not in SPACINGS:
        raise ValueError(f"unknown spacing {name!r}: choose one of {', '.join(SPACINGS)}")
    if steps < 1:
        raise ValueError(f"steps is {steps}, and must be at least 1")
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift is {shift}, and must be above 0")
    levels = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    levels = shift * levels / (1 + (shift - 1) * levels)
    high, low = levels[0], levels[-1]
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    if name == "karras":
        power = 1 / (7.0 if rho is None else rho)
        levels = (high**power + ramp * (low**power - high**power)) ** (1 / power)
    elif name != "uniform":
        ramp = ramp if name == "exponential" else 1 - (1 - ramp) ** (1.0 if rho is None else rho)
        levels = torch.exp(high.log() + ramp * (low.log() - high.log()))
    return torch.cat([levels, levels.new_zeros(1)]).float()


def flux_shift(tokens: int) -> float:
    """FLUX.1-dev's shift for a canvas of so many tokens: e**mu, mu on the line through (256, 0.5) and (4096, 1.15)."""
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
