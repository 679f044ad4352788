"""The Flux-Dev node's guidance: what its one number cfg means for a model, as a ComfyUI guider.

FLUX.1-dev is guidance-distilled: it takes a guidance scale as an input. With an empty negative prompt cfg is that
input, and costs nothing. A negative prompt needs a second branch, and the embedded guidance stays at the model's own.
Plain classifier-free guidance on top of the distilled kind oversaturates, so the difference of the branches is
projected and bounded (adaptive projected guidance, Sadat et al. 2024), and cfg scales it. An undistilled model gets
plain classifier-free guidance.
"""

from __future__ import annotations

from typing import Any

import comfy.samplers
import torch
from node_helpers import conditioning_set_values
from torch import Tensor

from ..core.guidance import project
from .canvas import MOVING

OWN = 3.5  # FLUX.1-dev's own embedded guidance


def is_distilled(model: Any) -> bool:
    """Does the model take a guidance scale as an input?"""
    params = getattr(model.get_model_object("diffusion_model"), "params", None)
    return bool(getattr(params, "guidance_embed", False))


def make_guider(model: Any, positive: list, negative: list, cfg: float, refuses: bool) -> Any:
    """A CFGGuider for conditionings as CLIP gives them; refuses: whether the negative prompt says anything."""
    distilled = is_distilled(model)
    if distilled and refuses:
        model = model.clone()
        model.set_model_sampler_cfg_function(projected, disable_cfg1_optimization=False)
    if distilled:
        scale = {"guidance": OWN if refuses else cfg}
        positive, negative = (conditioning_set_values(prompt, scale) for prompt in (positive, negative))
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg if refuses or not distilled else 1.0)
    return guider


def projected(args: dict) -> Tensor:
    """ComfyUI's sampler_cfg_function: the guided prediction as x - x0. Blocks at one noise level are joined as one."""
    x, positive, negative = args["input"], args["cond_denoised"], args["uncond_denoised"]
    out = positive.clone()
    places = args["model_options"].get(MOVING) or [(0.0, [(slice(None), slice(None))])]
    for _, blocks in places:
        parts = [(positive[..., rows, columns], negative[..., rows, columns]) for rows, columns in blocks]
        p, n = (torch.cat([part.flatten(1) for part in side], 1) for side in zip(*parts))
        guided = (p + (args["cond_scale"] - 1) * project(p, p - n)).split([p[0].numel() for p, _ in parts], 1)
        for (rows, columns), part, (like, _) in zip(blocks, guided, parts):
            out[..., rows, columns] = part.reshape(like.shape)
    return x - out
