"""Checkpoints as safetensors: weights, optimiser moments, step and random state, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def write(path: Path, tensors: dict[str, Tensor], **facts: Any) -> None:
    """Replaces path in one step, so that a kill leaves the old file or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, partial, {"facts": json.dumps(facts)})
    os.replace(partial, path)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with resuming(path), safe_open(path, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (no mapping, only its methods)
        return tensors, json.loads((file.metadata() or {})["facts"])


@contextmanager
def resuming(path: Path) -> Iterator[None]:
    """ValueError, of one sentence, if the checkpoint at path is damaged or does not fit what is to be resumed."""
    try:
        yield
    except (SafetensorError, KeyError, RuntimeError, ValueError, TypeError):
        raise ValueError(
            f"{path} is damaged, or no checkpoint of this training: delete it to begin its stage again"
        ) from None


def pack(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{k}": v for k, v in state.items()}


def unpack(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(prefix + "/")}


def optimiser_state(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimiser.state_dict()["state"]
    return {f"{i}/{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}


def load_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


class Average:
    """An exponential moving average of a module's parameters, ramped up so that early steps are forgotten soon."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.values = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        now = module.state_dict()
        torch._foreach_lerp_(list(self.values.values()), [now[key] for key in self.values], weight)

    @contextmanager
    def instead_of(self, module: nn.Module) -> Iterator[None]:
        """Lends the module the averaged parameters, and gives it its own ones back."""
        own = {k: v.detach().clone() for k, v in module.state_dict().items()}
        module.load_state_dict(self.values)
        try:
            yield
        finally:
            module.load_state_dict(own)
