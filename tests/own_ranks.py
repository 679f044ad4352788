"""What two processes of torchrun find of each pipeline that rolls: written by the first one, as JSON, to argv[1]."""

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ContextParallelConfig
from tiny_families import ROLL, apart, draw, make

from rolling_diffusion import roll
from rolling_diffusion.cli import ranks

NAMES = (
    "FluxPipeline",
    "FluxPipeline, distilled",
    "FluxImg2ImgPipeline",
    "FluxKontextPipeline",
    "Flux2Pipeline",
    "Flux2Pipeline, editing",
    "Flux2KleinPipeline",
)
# Levels that blocks share, or not; weights of memory; a cap on it.
WAYS: dict[str, dict[str, Any]] = {
    "draft": {},
    "no draft": {"draft": 0, "attention_persistence": 0.5},
    "autoregressive": {"lag": "autoregressive", "memory_tokens": 100},
    "spiral": {"order": "spiral-out", "overlap": 4},
}


def shared(pipe: Any) -> None:
    ranks.share(SimpleNamespace(pipe=pipe), "cpu")  # pyright: ignore[reportArgumentType]


def found(name: str) -> dict[str, Any]:
    """By way of rolling: how far the pictures of two processes are from those of one, and memory's bytes."""
    pipe, arguments = make(name)

    def drawn(**said: Any) -> tuple[torch.Tensor, int]:
        rolled = roll(pipe)
        return draw(rolled, arguments, **ROLL | said), rolled.memory_bytes

    alone = {way: drawn(**said) for way, said in WAYS.items()}
    stock = draw(pipe, arguments)
    shared(pipe)
    ordinary = [draw(pipe, arguments), draw(roll(pipe), arguments, lag=0)]
    told: dict[str, Any] = {"ordinary": [apart(latents, stock) for latents in ordinary]}
    for way, said in WAYS.items():
        (latents, count), (expected, count_alone) = drawn(**said), alone[way]
        told[way] = [apart(latents, expected), count_alone, count]
    return told


def refused(name: str, before=lambda pipe: None, **said: Any) -> str:
    pipe, arguments = make(name)
    try:
        shared(pipe)
        before(pipe)
        draw(roll(pipe), arguments, **ROLL | said)
    except ValueError as error:
        return str(error)
    return ""


def evenly() -> list[Any]:
    """diffusers' Ulysses for even shares alone takes what rolls unevenly, and is afterwards what it was."""
    pipe, arguments = make("FluxPipeline")
    expected = draw(roll(pipe), arguments, **ROLL | {"draft": 0, "window": 12, "overlap": 6})
    with ranks._cpu_counts():
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    got = draw(roll(pipe), arguments, **ROLL | {"draft": 0, "window": 12, "overlap": 6})
    return [apart(got, expected), pipe.transformer._parallel_config.context_parallel_config.ulysses_anything]


def ring(pipe: Any) -> None:
    config = pipe.transformer._parallel_config.context_parallel_config
    config.ulysses_degree, config.ring_degree, config.ulysses_anything = 1, 2, False


def main() -> None:
    with ranks.together("cpu"):
        told: dict[str, Any] = {name: found(name) for name in NAMES}
        told["evenly"] = evenly()
        told["refused"] = {
            "no plan": refused("StableDiffusion3Pipeline"),
            "no generator": refused("FluxPipeline", generator=None),
            "control": refused("FluxControlNetPipeline", draft=0),
            "ring": refused("FluxPipeline", ring),
            "compiled": refused("FluxPipeline", lambda pipe: pipe.transformer.compile(backend="eager"), draft=0),
            "few": refused("FluxPipeline", order="raster", window=2, overlap=0, draft=0),
        }
        if torch.distributed.get_rank() == 0:
            with open(sys.argv[1], "w") as file:
                json.dump(told, file)


if __name__ == "__main__":
    main()
