"""Inputs that the nodes share, and what is wrong with the values given to them."""

from __future__ import annotations

from typing import Any

from ..core.order import ORDERS

# The three orders of the samplers come first everywhere, so that a workflow reads alike in all nodes.
FIRST = ("top-to-bottom", "left-to-right", "spiral-out")

SEED: Any = ("INT", {
    "default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF, "control_after_generate": True,
    "tooltip": "The seed of the noise, as in KSampler."})  # fmt: skip
ORDER: Any = (list(FIRST), {
    "default": "top-to-bottom", "tooltip": "The direction in which the picture is generated."})  # fmt: skip
EVERY_ORDER: Any = ([*FIRST, *(name for name in ORDERS if name not in FIRST)], ORDER[1])
WINDOW: Any = ("INT", {
    "default": 64, "min": 16, "max": 512, "step": 16,
    "tooltip": "Cells (of 8×8 pixels) that are denoised at a time. A window that covers the canvas is ordinary "
    "sampling."})  # fmt: skip
OVERLAP: Any = ("INT", {
    "default": 16, "min": 0, "max": 256, "step": 8,
    "tooltip": "Cells that the window keeps when it moves on: it advances by size minus overlap. More overlap, smaller "
    "blocks and a smoother ramp of noise. Must be below the window size."})  # fmt: skip
PERSISTENCE: Any = ("FLOAT", {
    "default": 0.5, "min": 0.0, "max": 1.0, "step": 0.05,
    "tooltip": "How much weight finished blocks keep, per block of distance: 1 remembers all, 0 nothing."})  # fmt: skip
EXTRAS: dict[str, Any] = {
    "draft": ("INT", {
        "default": -1, "min": -1, "max": 9999,
        "tooltip": "Steps that the whole canvas takes together before the blocks part. More draft, more coherence. "
        "-1 is half of the steps."}),
    "lookahead": ("INT", {
        "default": -1, "min": -1, "max": 16384, "step": 1,
        "tooltip": "Cells ahead that blocks still waiting are attended to (Flux). -1 is the whole canvas, "
        "of more than a megapixel one window; 0 none."}),
    "context_noise": ("FLOAT", {
        "default": 0.0, "min": 0.0, "max": 0.5, "step": 0.01,
        "tooltip": "Noise level at which finished blocks are remembered (Flux). A little (0.01) can steady long "
        "canvases."}),
    "memory_cap": ("INT", {
        "default": 0, "min": 0, "max": 1048576, "step": 256,
        "tooltip": "Most tokens that memory holds (Flux). 0 is no cap. FLUX.1-dev needs 0.7 MB a token in bf16."}),
}  # fmt: skip


def problem(window: Any, overlap: Any, sampler: Any = None, draft: Any = None, steps: Any = None,
            most_steps: int = 10000) -> str | None:  # fmt: skip
    """One sentence about values that don't fit, or None. What is linked to other nodes comes as None.

    Naming an input in VALIDATE_INPUTS turns ComfyUI's own check of it off, so ranges are checked here.
    """
    low, high = WINDOW[1]["min"], WINDOW[1]["max"]
    if window is not None and not low <= window <= high:
        return f"rolling_window_size is {window} cells, and must be from {low} to {high}."
    if window is not None and window % 2:
        return f"rolling_window_size is {window} cells, and must be even: a token is 2×2 cells."
    if overlap is not None and not 0 <= overlap <= OVERLAP[1]["max"]:
        return f"rolling_overlap is {overlap} cells, and must be from 0 to {OVERLAP[1]['max']}."
    if overlap is not None and overlap % 2:
        return f"rolling_overlap is {overlap} cells, and must be even: a token is 2×2 cells."
    if window is not None and overlap is not None and overlap >= window:
        return (
            f"rolling_overlap ({overlap}) must be below rolling_window_size ({window}), or the window never moves on."
        )
    if steps is not None and not 1 <= steps <= most_steps:
        return f"steps is {steps}, and must be from 1 to {most_steps}."
    if draft is not None and draft < -1:
        return f"draft is {draft} steps, and must be 0 or more, or -1 for half of the steps."
    if draft is not None and steps is not None and draft >= steps:
        return f"draft ({draft}) must be below steps ({steps}): at least one step is taken block by block."
    if sampler is not None:
        return _sampler_problem(sampler)
    return None


def _sampler_problem(name: str) -> str | None:
    import comfy.samplers

    from .sampler import check_suspendable

    if name not in comfy.samplers.KSampler.SAMPLERS:
        return f"unknown sampler {name!r}: choose one of {', '.join(comfy.samplers.KSampler.SAMPLERS)}."
    try:
        check_suspendable(name)
    except ValueError as error:
        return str(error)
    return None
