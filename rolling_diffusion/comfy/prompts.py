"""The node for prompts that change along a canvas: conditionings with masks, for any sampler."""

from __future__ import annotations

from typing import Any

from node_helpers import conditioning_set_values

from ..core.order import route_of
from . import inputs
from .places import read, weights

CELL = 8  # pixels a cell of the masks, which ComfyUI scales to the latent


class RollingPrompts(inputs.Early):
    """Prompts with places, as one CONDITIONING."""

    CATEGORY = "conditioning"
    FUNCTION = "encode"
    RETURN_TYPES = ("CONDITIONING",)
    OUTPUT_TOOLTIPS = ("The prompts, each with the mask of its part.",)
    DESCRIPTION = (
        "Prompts that change along the picture: one a line, each for its part, with soft changes. For any sampler; "
        "those of this pack compute no prompt where it does not hold."
    )
    SEARCH_ALIASES = ("regional prompts", "prompt along", "rolling", "area", "mask")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        pixels = {
            "default": 1024,
            "min": 16,
            "max": inputs.MOST_PIXELS,
            "step": 16,
            "tooltip": "Pixels of the picture.",
        }
        return {
            "required": {
                "clip": inputs.lazy("CLIP", "The text encoders."),
                "prompts": inputs.PROMPTS,
                "autoregressive_order": inputs.STRAIGHT_ORDER,
                "width": ("INT", pixels),
                "height": ("INT", pixels),
                "blend": ("INT", {"default": 64, "min": 0, "max": 1024, "step": 8,
                                  "tooltip": "Pixels over which one prompt gives way to the next."}),
            },
            "optional": {"latent": inputs.lazy("LATENT", "Takes the size from this latent, in cells of 8×8 pixels.")},
        }  # fmt: skip

    def encode(self, clip, prompts, autoregressive_order, width, height, blend, latent=None):
        lines = read(prompts)
        if latent is not None:
            height, width = (CELL * side for side in latent["samples"].shape[-2:])
        route = route_of(autoregressive_order)
        rows, columns = max(height // CELL, 1), max(width // CELL, 1)
        along = weights(lines, rows if route.axis == "rows" else columns, blend // CELL, CELL)
        out: list[Any] = []
        for (_, prompt), one in zip(lines, along.flip(1) if route.backwards else along):
            encoded = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
            if len(lines) > 1:
                mask = (one[:, None] if route.axis == "rows" else one[None]).expand(rows, columns).clone()
                values = {"mask": mask[None], "mask_strength": 1.0, "set_area_to_bounds": False}
                encoded = conditioning_set_values(encoded, values)
            out += encoded
        return (out,)
