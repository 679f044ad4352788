"""What the Flux hooks rely on in ComfyUI, looked up before they are used: where it has changed, windows do without."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import comfy.ldm.flux.layers as layers
import comfy.ldm.flux.model as flux
import comfy.ldm.modules.attention as attention

BLOCK = ("vec", "pe", "attn_mask", "transformer_options")
# What is called, with the parameters that the hooks name.
CALLED: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "DoubleStreamBlock.forward": (
        lambda: layers.DoubleStreamBlock.forward,
        ("img", "txt", "modulation_dims_img", "modulation_dims_txt", *BLOCK),
    ),
    "SingleStreamBlock.forward": (lambda: layers.SingleStreamBlock.forward, ("modulation_dims", *BLOCK)),
    "LastLayer.forward": (lambda: layers.LastLayer.forward, ("vec", "modulation_dims")),
    "Flux.forward": (
        lambda: flux.Flux.forward,
        ("x", "timestep", "context", "y", "guidance", "ref_latents", "control", "transformer_options"),
    ),
    "timestep_embedding": (lambda: layers.timestep_embedding, ("t", "dim")),
}
# What is handed over in a call's options, and must be looked for.
LOOKED_FOR: dict[str, tuple[Callable[[], Any], str]] = {
    "the patches that come after the input": (lambda: flux.Flux.forward_orig, '"post_input"'),
    "replacements of double blocks": (lambda: flux.Flux.forward_orig, '"double_block"'),
    "replacements of single blocks": (lambda: flux.Flux.forward_orig, '"single_block"'),
    "overrides of attention": (lambda: attention.wrap_attn, '"optimized_attention_override"'),
}
HAS = ("time_in", "double_blocks", "single_blocks", "final_layer", "params", "patch_size", "out_channels")


def drift(model: Any) -> str:
    """The first thing that this ComfyUI's Flux has no longer, or nothing."""
    for name in HAS:
        if not hasattr(model, name):
            return f"Flux.{name}"
    for name, (find, parameters) in CALLED.items():
        try:
            known = inspect.signature(find()).parameters
        except (AttributeError, TypeError, ValueError):
            return name
        for parameter in parameters:
            if parameter not in known:
                return f"{parameter} of {name}"
    for name, (find, word) in LOOKED_FOR.items():
        try:
            if word not in inspect.getsource(find()):
                return name
        except AttributeError:
            return name
        except (OSError, TypeError):  # no source to look at: nothing is known to have changed
            continue
    return ""
