"""What the transformer is trained with on any processor: Muon, and 16 bits where they are faster than 32."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

QUINTIC = 3.4445, -4.7750, 2.0315  # of the Newton-Schulz iteration
ROUNDS = 4


@cache
def halves(device: str) -> bool:
    """Whether products in bfloat16 are faster on this device (its type) than in float32: measured, in a moment.

    Processors without units for it compute in it too, many times slower.
    """
    if device != "cpu":
        return device != "cuda" or torch.cuda.is_bf16_supported()

    def seconds(dtype: torch.dtype) -> float:
        a, times = torch.ones(512, 512, dtype=dtype), []
        for _ in range(6):
            started = time.perf_counter()
            torch.mm(a, a)
            times.append(time.perf_counter() - started)
        return min(times)

    return seconds(torch.bfloat16) < seconds(torch.float32)


def autocast(device: str) -> torch.autocast:
    """Computes in bfloat16 where that is faster."""
    return torch.autocast(device, torch.bfloat16, enabled=halves(device))


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is made orthogonal (K. Jordan and others, 2024), scaled to AdamW's size of step.

    As torch's own, of torch 2.9, except that matrices of a shape are worked on together, and in float32 where bfloat16
    is slow.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum_buffer"], group["momentum"])
                alike.setdefault(tuple(p.shape), []).append((p, update))
            for shape, pairs in alike.items():
                updates = orthogonal(torch.stack([update for _, update in pairs]))
                for (p, _), update in zip(pairs, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-0.2 * max(shape) ** 0.5 * group["lr"])


def orthogonal(x: Tensor) -> Tensor:
    """(n, rows, columns) matrices with all singular values near 1: between 0.5 and 1.5."""
    tall = x.shape[1] > x.shape[2]
    y = (x.mT if tall else x).to(torch.bfloat16 if halves(x.device.type) else torch.float32)
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).to(x.dtype)


def optimisers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for all else."""
    hidden, other = [], []
    for name, p in model.named_parameters():
        matrix = p.ndim == 2 and "blocks" in name and "norm" not in name
        (hidden if matrix else other).append(p)
    return [
        Muon(hidden, lr=1.0, weight_decay=0.02),
        torch.optim.AdamW(other, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0),
    ]
