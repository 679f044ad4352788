"""Checkpoints as safetensors: weights, optimiser moments, step and random state, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

SAID = "settings.json"  # the file beside the checkpoints that tells what they were made with


def write(path: Path, tensors: dict[str, Tensor], **facts: Any) -> None:
    """A checkpoint in the place of the one before; OSError where it cannot be written, as where the disk is full."""
    tensors = {k: v.detach().contiguous().clone() for k, v in tensors.items()}
    _replace(path, save(tensors, {"facts": json.dumps(facts)}))  # save_file raises no OSError


def _replace(path: Path, content: bytes) -> None:
    """Replaces path in one step, so that a kill or a full disk leaves the old file or the new one, never a half."""
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None  # of a full disk, it names no file


def agree(work: Path, said: dict[str, Any]) -> None:
    """Notes, before the first checkpoint in work, what was said for it; ValueError where those there were made with
    something else: a stage that finds a checkpoint goes on from it or is skipped, and tells nobody.

    Checkpoints without a note, of earlier versions, are taken as they are.
    """
    note, made = work / SAID, any(work.glob("*.safetensors"))
    if note.exists():
        try:
            kept = json.loads(note.read_text(encoding="utf-8"))
            others = {name: kept[name] for name in said if kept[name] != said[name]}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(
                f"{note} cannot be read, and tells what the checkpoints beside it were made with: name another --work, "
                "or delete it"
            ) from None
        if made and others:
            shown = "; ".join(f"--{name} was {was}, and is now {said[name]}" for name, was in others.items())
            raise ValueError(
                f"{work} holds checkpoints of other settings, {shown}: say the same, name another --work, or delete it"
            )
    if not made:
        _replace(note, json.dumps(said, indent=2).encode() + b"\n")


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
