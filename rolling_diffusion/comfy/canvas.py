"""The canvas that a guider sees: blocks at their own noise, and one call of the guider for them.

ComfyUI's guiders, conditioning areas, masks, ControlNets and concatenated latents all speak of the whole canvas. So the
guider is always given the whole canvas, and what a call leaves out is left out further inside: by the Flux hooks, which
compute the tokens of the moving blocks alone, or by a window, which crops the conditioning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.patcher_extension
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..core.order import Block
    from ..core.rollout import Moving

log = logging.getLogger("rolling_diffusion")
KEY = "rolling_diffusion"  # under which this pack's wrappers stand in the options of one sampling run


class Canvas:
    """State and guider call that both denoisers share. Tensors are (B, C, H, W), or (B, C, T, H, W) for video."""

    def __init__(self, guider: Any, options: dict, seed: int | None, noise: Tensor, latent: Tensor):
        self.guider, self.options, self.seed = guider, options, seed
        self.noise, self.latent = noise, latent  # unit noise, and what is sampled from (zeros for an empty latent)
        self.x = noise  # what the guider is given; `begin` sets it
        self.x0 = latent.clone()  # the best estimate so far
        self.asked: dict[Block, tuple[Tensor, dict]] = {}  # sigma and options as a sampler gave them, by block
        self.answer: dict[str, Any] = {}  # what the guider's last call handed to post-guidance functions
        self.calls = 0  # model calls so far
        self.tick: Callable[[], None] = lambda: None  # called after each model call
        self.conds: list[dict] = []

    @property
    def sampling(self) -> Any:
        return self.guider.inner_model.model_sampling

    def begin(self, x: Tensor) -> None:
        """The canvas at the first noise level."""
        self.x = x.clone()

    def cut(self, tensor: Tensor, block: Block) -> Tensor:
        """The block's part of a canvas; at an odd edge it is a cell smaller than the block."""
        return tensor[..., block.rows, block.columns]

    def paste(self, tensor: Tensor, block: Block, part: Tensor) -> None:
        self.cut(tensor, block).copy_(part)

    def covers(self, blocks: Sequence[Block]) -> bool:
        """Do these (disjoint) blocks fill the canvas?"""
        return sum(self.cut(self.x[:1, :1], b)[0, 0].numel() for b in blocks) == self.x[0, 0].numel()

    def whole(self, moving: Sequence[Moving]) -> list[Tensor]:
        """Ordinary diffusion: all blocks at one level, in one stock call."""
        if len(moving) == 1:
            x = moving[0].x
        else:
            for m in moving:
                self.paste(self.x, m.block, m.x)
            x = self.x.clone()
        sigma, options = self.asked[moving[0].block]
        if len(moving) == 1:
            return [self.ask(x, sigma, options)]
        out = self.ask(x, sigma, self.joint_options([m.block for m in moving]))
        return [self.finish(m.block, out) for m in moving]

    def ask(self, x: Tensor, sigma: Tensor, options: dict) -> Tensor:
        """One call of the guider: x0 estimate of the whole canvas. sigma: (B,)."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        out = self.guider(x, sigma, model_options=options, seed=self.seed)
        self.calls += 1
        self.tick()
        return out

    def joint_options(self, blocks: Sequence[Block]) -> dict:
        """A private copy of the run's options that notes what guidance was made of, for samplers that look (CFG++)."""
        options = comfy.patcher_extension.copy_nested_dicts(self.options)
        if any(self.extras(block) for block in blocks):

            def note(args: dict) -> Tensor:
                self.answer = args
                return args["denoised"]

            options["sampler_post_cfg_function"] = [*options.get("sampler_post_cfg_function", []), note]
        if any(self.asked[b][1].get("disable_cfg1_optimization") for b in blocks if b in self.asked):
            options["disable_cfg1_optimization"] = True
        return options

    def extras(self, block: Block) -> list[Callable]:
        """Functions that the block's sampler wants to see guidance with, beyond the run's own."""
        if block not in self.asked:
            return []
        mine = self.options.get("sampler_post_cfg_function", [])
        return self.asked[block][1].get("sampler_post_cfg_function", [])[len(mine) :]

    def finish(self, block: Block, out: Tensor) -> Tensor:
        """The block's part of a guider's answer, passed through the functions its sampler added."""
        part = self.cut(out, block).clone()
        for function in self.extras(block):
            args = {k: self._part(v, block, out) for k, v in self.answer.items()}
            part = function({**args, "denoised": part, "model_options": self.asked[block][1]})
        return part

    def _part(self, value: Any, block: Block, like: Tensor) -> Any:
        same = isinstance(value, Tensor) and value.ndim == like.ndim and value.shape[-2:] == like.shape[-2:]
        return self.cut(value, block) if same else value
