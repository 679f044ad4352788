"""Inputs that the nodes share, and what is wrong with the values given to them."""

from __future__ import annotations

from typing import Any

from ..core.order import ORDERS, STRAIGHT
from . import places
from .notes import Notes

# The orders of the samplers come first everywhere, so that a workflow reads alike in all nodes.
FIRST = ("top-to-bottom", "left-to-right", "spiral-out", "difficulty")

MOST_PIXELS = 16384  # a side, as ComfyUI's own nodes have it

SEED: Any = ("INT", {
    "default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF, "control_after_generate": True,
    "tooltip": "The seed of the noise, as in KSampler."})  # fmt: skip
ORDER: Any = (list(FIRST), {
    "default": "top-to-bottom", "tooltip": "The direction in which the picture is generated. difficulty: easy blocks "
    "first, as the draft (of at least 2 steps) finds them."})  # fmt: skip
EVERY_ORDER: Any = ([*FIRST, *(name for name in ORDERS if name not in FIRST)], ORDER[1])
STRAIGHT_ORDER: Any = (list(STRAIGHT), {
    "default": "top-to-bottom",
    "tooltip": "The direction along which the picture grows, and prompts follow."})  # fmt: skip
PROMPTS: Any = ("STRING", {
    "multiline": True, "default": "a beach\na harbour\na town",
    "tooltip": "One a line. A line may begin with its place: '0.4: a harbour' is a share of the length, '512: a "
    "harbour' pixels. Without places the lines share the length."})  # fmt: skip
STRETCH: Any = ("INT", {
    "default": 512, "min": 16, "max": 4096, "step": 16, "tooltip": "Pixels that are drawn at a time. With the context, "
    "as much as the model was made for."})  # fmt: skip
CONTEXT: Any = ("INT", {
    "default": 512, "min": 16, "max": 4096, "step": 16,
    "tooltip": "Pixels of the end of what is there that are seen, and not computed."})  # fmt: skip
WINDOW: Any = ("INT", {
    "default": 64, "min": 16, "max": 512, "step": 16,
    "tooltip": "Cells (of 8×8 pixels, on every model) that are denoised at a time. A window that covers the canvas is "
    "ordinary sampling."})  # fmt: skip
OVERLAP: Any = ("INT", {
    "default": 16, "min": 0, "max": 256, "step": 8,
    "tooltip": "Cells that the window keeps when it moves on: it advances by size minus overlap. More overlap, smaller "
    "blocks and a smoother ramp of noise. Must be below the window size."})  # fmt: skip
PERSISTENCE: Any = ("FLOAT", {
    "default": 0.5, "min": 0.0, "max": 1.0, "step": 0.05,
    "tooltip": "How much weight finished blocks keep, per block of distance: 1 remembers all, 0 nothing."})  # fmt: skip
EXTRAS: dict[str, Any] = {
    "draft": ("INT", {
        "default": -1, "min": -1, "max": 9999, "advanced": True,
        "tooltip": "Steps that the whole canvas takes together before the blocks part. More draft, more coherence. "
        "-1 is half of the steps."}),
    "lookahead": ("INT", {
        "default": -1, "min": -1, "max": 16384, "step": 1, "advanced": True,
        "tooltip": "Cells ahead that blocks still waiting are attended to (Flux). -1 is the whole canvas, "
        "of more than a megapixel one window; 0 none."}),
    "context_noise": ("FLOAT", {
        "default": 0.0, "min": 0.0, "max": 0.5, "step": 0.01, "advanced": True,
        "tooltip": "Noise level at which finished blocks are remembered (Flux). A little (0.01) can steady long "
        "canvases."}),
    "memory_cap": ("INT", {
        "default": 0, "min": 0, "max": 1048576, "step": 256, "advanced": True,
        "tooltip": "Most tokens that memory holds (Flux). 0 is no cap. FLUX.1-dev needs 0.7 MB a token in bf16."}),
}  # fmt: skip
# Behind all other inputs of a node: widgets of saved workflows are told by their places.
NEWER: dict[str, Any] = {
    "extrapolation": ("FLOAT", {
        "default": 0.0, "min": 0.0, "max": 1.0, "step": 0.05, "advanced": True,
        "tooltip": "Share of their noise that blocks still waiting are attended to without (Flux). 0 is as the draft "
        "left them."}),
}  # fmt: skip


class Early:
    """Refuses values that don't fit together before anything runs that the node is linked to.

    ComfyUI asks a node with lazy inputs first which of them it needs, and shows an error of that as the node's. The
    page hides its sentence behind a button; so the node says it too.
    """

    @classmethod
    def VALIDATE_INPUTS(cls, sampler_name: str = "euler") -> bool | str:
        """Names one input: ComfyUI blames every one that is named here, and skips its own checks of them."""
        import comfy.samplers

        from .sampler import check_suspendable

        if sampler_name not in comfy.samplers.KSampler.SAMPLERS:
            return f"{sampler_name} is not a sampler of this ComfyUI: take one of the list, such as euler."
        try:
            check_suspendable(sampler_name)
        except ValueError as error:
            return str(error)
        return True

    def check_lazy_status(self, **values: Any) -> list[str]:
        try:
            refuse(values)
        except ValueError as error:
            Notes().warn(str(error))
            raise
        return [name for name, value in values.items() if value is None]


def lazy(kind: str, tooltip: str) -> Any:
    """A socket that is evaluated after `Early` had its look."""
    return (kind, {"lazy": True, "tooltip": tooltip})


def refuse(values: dict[str, Any]) -> None:
    """ValueError, one sentence, that begins with the name of the input at fault. ComfyUI checks ranges by itself."""
    if values.get("prompts") is not None:
        places.read(values["prompts"])
    window, overlap = values.get("rolling_window_size"), values.get("rolling_overlap")
    if window is not None and overlap is not None and overlap >= window:
        raise ValueError(f"rolling_overlap is {overlap}, and must be below rolling_window_size, which is {window}.")
    draft, steps = values.get("draft"), values.get("steps")
    if draft is not None and steps is not None and draft >= steps:
        raise ValueError(f"draft is {draft}, and must be below steps, which is {steps}: blocks take at least one.")
    start, end = values.get("start_at_step"), values.get("end_at_step")
    if draft is not None and start is not None and end is not None and steps is not None:
        taken = min(end, steps) - start
        if 0 < taken <= draft:
            raise ValueError(f"draft is {draft}, and must be below the {taken} steps that are taken from {start} on.")
