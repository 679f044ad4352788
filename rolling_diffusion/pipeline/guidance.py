"""Guidance: what the one number cfg means for a model, and how two branches are joined.

FLUX.1-dev is guidance-distilled: it takes a guidance scale as an input. With an empty negative prompt cfg is that
input, and costs nothing. A negative prompt needs a second branch. Plain classifier-free guidance on top of the
distilled kind oversaturates, so the difference of the branches is projected and bounded (adaptive projected guidance,
Sadat et al. 2024): cfg scales it, and the embedded guidance stays at the model's own. An undistilled model gets plain
classifier-free guidance, against the empty prompt if there is no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..defaults import Card

if TYPE_CHECKING:
    from ..core.rollout import Moving

BOUND = 15 / 256  # of the difference's root mean square: the paper's r = 15 for SDXL's 256² latent numbers


@dataclass(frozen=True)
class Guidance:
    """embedded: the distilled scale. scale: of the two branches; at most 1 means one branch. projected: joined so.
    fills_in: the negative branch takes the empty prompt if there is no other."""

    embedded: float
    scale: float = 1.0
    projected: bool = False
    fills_in: bool = False

    def join(self, moving: Sequence[Moving], positive: Sequence[Tensor], negative: Sequence[Tensor]) -> list[Tensor]:
        """Velocities of the two branches, (B, C, h, w) for each block, to one."""
        if not self.projected:
            return [n + self.scale * (p - n) for p, n in zip(positive, negative)]
        levels = [float(m.sigma) for m in moving]
        joined, xs = list(positive), [m.x for m in moving]
        for level in dict.fromkeys(levels):  # blocks at one level are projected as one
            places = [i for i, each in enumerate(levels) if each == level]
            x, p, n = (torch.cat([v[i].flatten(1) for i in places], 1) for v in (xs, positive, negative))
            guided = p + (self.scale - 1) * project(x, level, p, n)
            for i, part in zip(places, guided.split([positive[i][0].numel() for i in places], 1)):
                joined[i] = part.unflatten(1, positive[i].shape[1:])
        return joined


def project(x: Tensor, sigma: float, positive: Tensor, negative: Tensor) -> Tensor:
    """The difference of two velocities, less what lies along the positive x0, its root mean square bounded in x0.

    All (B, numbers); Sadat et al. 2024, section 5, with eta 0 and no momentum.
    """
    along = (x - sigma * positive).float()  # x0
    difference = (positive - negative).float()
    size = sigma * difference.square().mean(1, keepdim=True).sqrt()
    difference = difference * (BOUND / size.clamp(min=1e-12)).clamp(max=1)
    power = along.square().sum(1, keepdim=True).clamp(min=1e-12)
    return (difference - (difference * along).sum(1, keepdim=True) / power * along).to(positive.dtype)


def decide(
    card: Card,
    distilled: bool,
    negative: bool,
    cfg: float | None,
    guidance_scale: float | None,
    true_cfg_scale: float | None,
) -> Guidance:
    """From what was given; `negative`: whether a negative prompt says anything.

    guidance_scale and true_cfg_scale are FluxPipeline's and act as there; cfg is the one number in their place.
    """
    if cfg is not None and (guidance_scale is not None or true_cfg_scale is not None):
        raise ValueError("give cfg, or guidance_scale and true_cfg_scale as FluxPipeline has them, but not both")
    for name, value in {"cfg": cfg, "guidance_scale": guidance_scale, "true_cfg_scale": true_cfg_scale}.items():
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value}, and must be a number of at least 0")
    embedded = card.guidance if guidance_scale is None else guidance_scale
    if cfg is None and guidance_scale is None and true_cfg_scale is None:
        cfg = card.cfg
    if cfg is None:
        return Guidance(embedded, 1.0 if true_cfg_scale is None else true_cfg_scale)
    if not distilled:
        return Guidance(embedded, cfg, fills_in=True)
    return Guidance(embedded, cfg, projected=True) if negative else Guidance(cfg)
