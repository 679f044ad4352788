"""Schedulers of diffusers by k-diffusion's names, with the noise levels of flow matching."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch

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


def take_levels(scheduler: Any, levels: Any, device: torch.device) -> None:
    """Gives a scheduler the noise levels of another, and the resets of its own set_timesteps."""
    steps = len(levels.timesteps)
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
