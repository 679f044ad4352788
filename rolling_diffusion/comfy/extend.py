"""The node that carries a picture on beyond an edge."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.growing import stretches
from ..core.order import AWAY
from . import inputs, nodes
from .growing import Growing, decoder, encoded
from .settings import Settings

MORE = 256  # pixels beyond what is seen, for the encoder, whose cells hang on what is around them


class RollingExtend(inputs.Early):
    """IMAGE in, a larger IMAGE out."""

    CATEGORY = nodes.CATEGORY
    FUNCTION = "extend"
    RETURN_TYPES = ("IMAGE", "LATENT")
    OUTPUT_TOOLTIPS = ("The picture and what it goes on with.", "What was drawn, after what was seen of the picture.")
    DESCRIPTION = (
        "Carries a picture on beyond one of its edges, in an order that leads away from it. The picture's own pixels "
        "stay as they are; its end is remembered, and not computed again."
    )
    SEARCH_ALIASES = ("outpaint", "extend", "rolling", "expand", "uncrop")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "image": inputs.lazy("IMAGE", "The picture to carry on."),
                "vae": inputs.lazy("VAE", "The model's autoencoder."),
                "model": nodes.SOCKETS["model"],
                "positive": inputs.lazy("CONDITIONING", "What the new part is to show."),
                "negative": inputs.lazy("CONDITIONING", "What the new part is not to show."),
                "side": (list(AWAY), {"default": "bottom", "tooltip": "The edge beyond which the picture goes on."}),
                "pixels": ("INT", {"default": 512, "min": 1, "max": inputs.MOST_PIXELS,
                                   "tooltip": "Pixels that are added."}),
                "seed": inputs.SEED,
                "steps": nodes.STEPS,
                "cfg": nodes.CFG,
                "sampler_name": nodes.SAMPLER,
                "scheduler": nodes.SCHEDULER,
                "autoregressive_order": (["away", *inputs.FIRST], {
                    "tooltip": "The direction in which the new part is generated; away leads away from the picture."}),
                **nodes.ROLLING,
                "stretch": inputs.STRETCH,
                "context": inputs.CONTEXT,
            },
            "optional": {**inputs.EXTRAS, **inputs.NEWER},
        }  # fmt: skip

    def extend(self, image, vae, model, positive, negative, side, pixels, seed, steps, cfg, sampler_name, scheduler,
               autoregressive_order, rolling_window_size, rolling_overlap, attention_persistence, stretch, context,
               draft=-1, lookahead=-1, context_noise=0.0, memory_cap=0, extrapolation=0.0):  # fmt: skip
        order = AWAY[side]
        drawn = order if autoregressive_order == "away" else autoregressive_order
        settings = Settings(drawn, rolling_window_size, rolling_overlap, attention_persistence,
                            draft, lookahead, context_noise, memory_cap, seed, extrapolation)  # fmt: skip
        grow = Growing(model, settings, steps, cfg, sampler_name, scheduler, order)
        way, unit = grow.way, grow.unit
        known = image[..., :3].movedim(-1, 1).float().cpu()
        there, across = known.shape[way.axis], known.shape[5 - way.axis]
        if there < unit:
            raise ValueError(f"The picture is {there} pixels {order}, and must be {unit} at least to go on from.")
        seen = min(grow.cells("context", context) * grow.cell, there // unit * unit)
        part = way.last(known, min(seen + MORE, there) // unit * unit)
        missing = -across % unit
        part = torch.nn.functional.pad(part, (0, missing, 0, 0) if way.axis == 2 else (0, 0, 0, missing), "replicate")
        cells = encoded(vae, part)
        before = way.last(cells, seen // grow.cell)
        # The last cell of the picture is decoded with what follows: how far it is from the picture is seen there.
        decode = decoder(vae, way, {"cells": before, "done": torch.tensor(before.shape[way.axis] - 1)})
        found: list[Tensor] = []
        length = (pixels + -pixels % unit) // grow.cell
        for i, each in enumerate(
            stretches("the positive prompt", length, grow.cells("stretch", stretch), grow.multiple)
        ):
            new = grow.stretch(i, each, cells.shape[5 - way.axis], positive, negative, before, len(known))
            cells = way.join(cells, new)
            before = way.last(way.join(before, new), seen // grow.cell)
            found.append(decode.add(new, each.last))
        grown = way.join(*found).narrow(5 - way.axis, 0, across)
        grown = way.matched(way.cut(grown, 0, grow.cell + pixels), way.last(known, grow.cell))
        return way.join(known, grown).movedim(1, -1), {"samples": cells}
