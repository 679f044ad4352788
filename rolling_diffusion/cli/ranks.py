"""Processes that torchrun has started, and that draw one picture together: each holds its own heads' part of memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..pipeline import Rolling


def count() -> int:
    """How many there are; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def first() -> bool:
    """Whether this is the one that speaks, and writes the files."""
    return count() == 1 or os.environ["RANK"] == "0"


def own(device: str) -> str:
    """The device of this process, where the user named a kind of device; ValueError where it was one of them."""
    if count() == 1 or device == "cpu":
        return device
    if device != "cuda":
        raise ValueError(f"--device {device}: each process of torchrun takes a GPU of its own: say cuda, or cpu")
    import torch

    number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= there:
        raise ValueError(
            f"torchrun started more processes than this machine's {there} GPUs: take --nproc-per-node {there}"
        )
    return f"cuda:{number}"


@contextmanager
def together(device: str) -> Iterator[None]:
    """The processes know each other, for as long as this lasts."""
    if count() == 1:
        yield
        return
    import torch
    from torch import distributed

    if device != "cpu":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # diffusers exchanges numbers of tokens on the CPU, where that is named
    else:
        backend = "cpu:gloo" if torch.cuda.is_available() else "gloo"  # torch warns of the longer name
    distributed.init_process_group(backend)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def share(pipeline: Rolling, device: str) -> None:
    """Has the processes draw each picture of the pipeline together, by Ulysses. ValueError where the model cannot."""
    if count() == 1:
        return
    import torch
    from diffusers import ContextParallelConfig

    from ..models.shares import refusal

    if not hasattr(torch, "accelerator"):
        raise ValueError(f"several processes that draw together need torch 2.6 or newer, not {torch.__version__}")
    model: Any = pipeline.pipe.transformer
    if getattr(model, "_cp_plan", None) is None:
        raise ValueError(f"diffusers has no plan of how {type(model).__name__} is shared out: leave torchrun out")
    with _cpu_counts() if device == "cpu" else nullcontext():
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=count(), ulysses_anything=True))
    refused = refusal(model)
    if refused:
        raise ValueError(refused)


def _cpu_counts() -> AbstractContextManager[None]:
    """diffusers asks torch what accelerator there is, and divides by how many. CPUs that talk over gloo do as well, but
    torch counts none of them; so for this one question, of torchrun on CPUs alone, it is told of one."""
    import torch

    from ..models.call import swapped

    cpu = torch.device("cpu")
    answers: Any = (
        (vars(torch._C), "_get_accelerator", lambda: cpu),
        (vars(torch.accelerator), "device_count", lambda: 1),
    )
    return swapped(answers)


def most(number: int) -> int:
    """The largest of the processes' numbers."""
    if count() == 1:
        return number
    from torch import distributed

    numbers: list[Any] = [None] * count()
    distributed.all_gather_object(numbers, number)
    return max(numbers)
