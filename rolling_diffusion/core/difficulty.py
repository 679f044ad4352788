"""Difficulty: how far from settled a block is, told from what the draft's calls have answered anyway."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def difficulty(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[float]:
    """For each block how far two answers, each (B, ...), lie apart: the mean square, over a batch too.

    At the end of a draft these are its last two x0 estimates: where the guessed picture has come to rest, a block is
    easy. Where the model answers with and without the prompt, these two tell more of what is still to change: where
    they agree, it is easy. The numbers order a plan by `Plan.decided`.
    """
    return torch.stack([(b - a).float().square().mean() for a, b in zip(one, other)]).tolist()
