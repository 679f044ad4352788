"""Adaptive projected guidance: how a second prompt guides a model that is guidance-distilled already."""

from __future__ import annotations

from torch import Tensor

BOUND = 15 / 256  # of the difference's root mean square: the paper's r = 15 for SDXL's 256² latent numbers


def project(x0: Tensor, difference: Tensor, scale: float = 1.0) -> Tensor:
    """The difference of two predictions, less what lies along x0, its root mean square bounded. All (B, numbers).

    scale: what makes of the difference one of x0, such as the noise level for velocities.
    Sadat et al. 2024, section 5, with eta 0 and no momentum.
    """
    along, out = x0.float(), difference.float()
    size = scale * out.square().mean(1, keepdim=True).sqrt()
    out = out * (BOUND / size.clamp(min=1e-12)).clamp(max=1)
    power = along.square().sum(1, keepdim=True).clamp(min=1e-12)
    return (out - (out * along).sum(1, keepdim=True) / power * along).to(difference.dtype)
