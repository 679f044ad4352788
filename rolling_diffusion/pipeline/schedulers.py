"""Schedulers of diffusers as samplers that the rollout can suspend: each block is stepped by a copy of its own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from torch import Tensor

from ..models.denoiser import pack, unpack

# k-diffusion's names for diffusers' flow-capable schedulers: the class and its settings.
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", _FLOW),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {**_FLOW, "algorithm_type": "sde-dpmsolver++"}),
    "uni_pc": ("UniPCMultistepScheduler", _FLOW),
    "lcm": ("FlowMatchLCMScheduler", {}),
}
ALIASES = {"unipc": "uni_pc", "normal": "simple"}
# How the noise levels lie, by the flags of FlowMatchEulerDiscreteScheduler.
SPACINGS: dict[str, str | None] = {
    "simple": None,
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
}
BELOW_ONE = 1 - 1e-6  # multistep solvers take log((1 - sigma) / sigma)


def choose(scheduler: Any, sampler: str | None, spacing: str | None) -> tuple[Any, Any]:
    """The scheduler that steps, and the one whose noise levels it takes (the same one, if None was asked for).

    Names replace the pipeline's scheduler for one call. Noise levels are always the flow-matching ones of
    FlowMatchEulerDiscreteScheduler, with the shift that the pipeline's scheduler is configured for.
    """
    if sampler is None and spacing is None:
        return scheduler, scheduler
    sampler, spacing = (ALIASES.get(n, n) if n else d for n, d in ((sampler, "euler"), (spacing, "simple")))
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing of the sigmas {spacing!r}: choose one of {', '.join(SPACINGS)}")
    config = {k: v for k, v in scheduler.config.items() if k not in SPACINGS.values()}
    if "shift" not in config and "flow_shift" in config:
        config["shift"] = config["flow_shift"]
    flag = SPACINGS[spacing]
    levels = _build(diffusers.FlowMatchEulerDiscreteScheduler, config, {flag: True} if flag else {})
    if sampler == "euler":
        return levels, levels
    name, settings = SAMPLERS[sampler]
    return _build(getattr(diffusers, name), config | {"use_dynamic_shifting": False}, settings), levels


def _build(kind: Any, config: dict[str, Any], settings: dict[str, Any]) -> Any:
    """A scheduler with those entries of config that it knows."""
    known = set(inspect.signature(kind.__init__).parameters)
    return kind(**{k: v for k, v in config.items() if k in known} | settings)


def prepare(
    scheduler: Any, levels: Any, steps: int, sigmas: Sequence[float] | None, tokens: int, device: torch.device
) -> tuple[Any, int]:
    """A scheduler ready to step `steps` steps on a canvas of so many tokens, and the steps. As FluxPipeline does it."""
    custom = sigmas
    values: Any = np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas
    if getattr(levels.config, "use_flow_sigmas", False):
        values = None
    mu = calculate_shift(
        tokens,
        levels.config.get("base_image_seq_len", 256),
        levels.config.get("max_image_seq_len", 4096),
        levels.config.get("base_shift", 0.5),
        levels.config.get("max_shift", 1.15),
    )
    accepted = inspect.signature(levels.set_timesteps).parameters
    shift = {"mu": mu} if "mu" in accepted and levels.config.get("use_dynamic_shifting") else {}
    if "sigmas" not in accepted and custom is None:
        values = None
    found: Any = retrieve_timesteps(levels, steps, device, sigmas=values, **shift)
    steps = found[1]
    if scheduler is not levels:
        _take_levels(scheduler, levels, steps, device)
    scheduler.set_begin_index(0)
    return scheduler, steps


def _take_levels(scheduler: Any, levels: Any, steps: int, device: torch.device) -> None:
    """Gives a scheduler the noise levels of another, and the resets of its own set_timesteps."""
    if getattr(scheduler.config, "use_flow_sigmas", False):
        scheduler.set_timesteps(steps, device=device)
        scheduler.sigmas = levels.sigmas.cpu().clamp(max=BELOW_ONE)
        scheduler.timesteps = levels.timesteps
    elif scheduler.order == 2:
        scheduler.set_timesteps(steps, device=device)
        inner = levels.sigmas[1:-1].repeat_interleave(2)
        scheduler.sigmas = torch.cat([levels.sigmas[:1], inner, levels.sigmas[-1:]])
        scheduler.timesteps = torch.cat([levels.timesteps[:1], levels.timesteps[1:].repeat_interleave(2)])
    else:
        scheduler.set_timesteps(steps, device=device)
        scheduler.sigmas, scheduler.timesteps = levels.sigmas, levels.timesteps


def call_levels(scheduler: Any) -> list[Tensor]:
    """The noise level of each model call, fp32 on the CPU.

    FluxPipeline tells the transformer timestep / 1000. Mostly that is sigma; where the scheduler rounds its timesteps
    otherwise, the transformer is told what FluxPipeline would tell it.
    """
    timesteps = scheduler.timesteps.float().cpu()
    sigmas = scheduler.sigmas[: len(timesteps)].float().cpu()
    return list(torch.where(sigmas * 1000 == timesteps, sigmas, timesteps / 1000))


def sample_with_scheduler(
    model: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: Any = None,
    callback: Callable[[dict], object] | None = None,
    disable: bool | None = None,
    *,
    scheduler: Any,
    levels: Sequence[Tensor],
    stepped: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """FluxPipeline's loop for one block, in the shape of k-diffusion's samplers. model answers velocities.

    x: (B, C, h, w) cells. levels: of each call. stepped: told the new x, which it may change in place.
    The scheduler sees packed tokens (B, tokens, 4C), as in FluxPipeline, so the whole canvas is stepped bit for bit.
    """
    scheduler = copy.deepcopy(scheduler)
    for i, t in enumerate(scheduler.timesteps):
        velocity = model(x, levels[i])
        if callback is not None:
            callback({"x": x, "i": i, "sigma": levels[i]})
        latents = scheduler.step(pack(velocity), t, pack(x), return_dict=False)[0]
        x = unpack(latents.to(x.dtype), *x.shape[-2:])
        if stepped is not None:
            stepped(x)
    return x
