"""Difficulty: how far from settled a block is, told from what the draft's calls have answered anyway."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def difficulty(before: Sequence[Tensor], now: Sequence[Tensor]) -> list[float]:
    """For each block how much its x0 estimate, (B, ...), has changed between two calls: the mean square, over a batch
    too.

    Where the guessed picture has come to rest, a block is easy. The numbers order a plan by `Plan.decided`.
    """
    return torch.stack([(b - a).float().square().mean() for a, b in zip(before, now)]).tolist()
