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
COMPILE = "torch.compile"  # ComfyUI's own key for it
MOVING = "rolling_diffusion_moving"  # in a call's options: [(noise level, [(rows, columns) of each block at it])]


def uncompiled(options: dict) -> dict:
    """A copy of a run's options, without torch.compile.

    A graph that ComfyUI compiles does not look again at the options of a call (its guards on them are taken off), and
    there the hooks and the memory of a call are: a graph made for one call would silently be taken for all others.
    """
    options = comfy.patcher_extension.copy_nested_dicts(options)
    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    options.get("transformer_options", {}).get("wrappers", {}).get(kind, {}).pop(COMPILE, None)
    return options


def is_compiled(options: dict) -> bool:
    """Did a node put torch.compile on this model?"""
    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    return COMPILE in options.get("transformer_options", {}).get("wrappers", {}).get(kind, {})


def plane(area: Sequence[int]) -> tuple[int, int, int, int]:
    """Height, width, top, left of an area, which for video has a time axis too."""
    half = len(area) // 2
    return area[half - 2], area[half - 1], area[-2], area[-1]


def masked(args: tuple, kw: dict, like: Tensor, change: Callable[[Tensor | None], Tensor | None]) -> tuple[tuple, dict]:
    """What ComfyUI's attention takes after (q, k, v, heads), with its mask changed, in the place where it stands.

    change: is given the mask, if there is one, as what is added to the logits; that of booleans in the dtype of like.
    """
    mask = args[0] if args else kw.get("mask")
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, torch.finfo(like.dtype).min)
    return ((change(mask), *args[1:]), kw) if args else (args, {**kw, "mask": change(mask)})


class BlockModel:
    """What a sampler takes for the guider: every attribute is the guider's, a call goes where `call` says."""

    def __init__(self, guider: Any, call: Callable[[Tensor, Tensor, dict | None], Tensor]):
        self._guider, self._call = guider, call

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict | None = None, seed: int | None = None) -> Tensor:
        return self._call(x, sigma, model_options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guider, name)


class Canvas:
    """State and guider call that both denoisers share. Tensors are (B, C, H, W), or (B, C, T, H, W) for video."""

    def __init__(
        self,
        guider: Any,
        options: dict,
        seed: int | None,
        noise: Tensor,
        latent: Tensor,
        sigmas: Tensor,
        mask: Tensor | None = None,
    ):
        self.guider, self.options, self.seed = guider, options, seed
        self.sigmas, self.mask = sigmas, mask  # noise levels; what is to be denoised, 1, and what is kept, 0
        self.noise, self.latent = noise, latent  # unit noise, and what is sampled from (zeros for an empty latent)
        self.x = noise  # what the guider is given; `begin` sets it
        self.x0 = latent.clone()  # the best estimate so far
        self.asked: dict[Block, tuple[Tensor, dict]] = {}  # sigma and options as a sampler gave them, by block
        self.answers: dict[Block, dict] = {}  # what the guider handed to post-guidance functions, by block
        self.calls = 0  # model calls so far
        self.origin = 0, 0  # cells (down, across) from which positions are told
        self.shown: Callable[[], None] = lambda: None  # called after each model call, with x0 up to date

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
        blocks = [m.block for m in moving]
        if len(moving) == 1:
            return [self.ask(moving[0].x, *self.asked[blocks[0]])]
        for m in moving:
            self.paste(self.x, m.block, m.x)
        sigma, _ = self.asked[blocks[0]]
        out = self.ask(self.x.clone(), sigma, self.joint_options(blocks))
        return [self.cut(out, block).clone() for block in blocks]

    def ask(self, x: Tensor, sigma: Tensor, options: dict) -> Tensor:
        """One call of the guider: x0 estimate of the whole canvas. sigma: (B,)."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        out = self.guider(x, sigma, model_options=options, seed=self.seed)
        self.calls += 1
        return out

    def show(self, moving: Sequence[Moving] = (), out: Sequence[Tensor] = ()) -> None:
        """Report a model call, after noting what it says about the canvas."""
        for m, o in zip(moving, out):
            if self.mask is not None:
                kept = 1 - self.cut(self.mask, m.block)
                o = o + (self.cut(self.latent, m.block) - o) * kept
            self.paste(self.x0, m.block, o)
        self.shown()

    def joint_options(self, blocks: Sequence[Block]) -> dict:
        """A private copy of the run's options that notes what guidance was made of, for samplers that look (CFG++)."""
        options = comfy.patcher_extension.copy_nested_dicts(self.options)
        levels: dict[float, list] = {}
        for block in blocks:
            levels.setdefault(float(self.asked[block][0].flatten()[0]), []).append((block.rows, block.columns))
        options[MOVING] = list(levels.items())
        asked = [self.asked[block][1] for block in blocks]
        if any(self.extras(own) for own in asked):

            def note(args: dict) -> Tensor:
                self.answers.update(dict.fromkeys(blocks, args))
                return args["denoised"]

            options["sampler_post_cfg_function"] = [*options.get("sampler_post_cfg_function", []), note]
        if any(own.get("disable_cfg1_optimization") for own in asked):
            options["disable_cfg1_optimization"] = True
        return options

    def extras(self, options: dict) -> list[Callable]:
        """Functions that a sampler wants to see guidance with, beyond the run's own."""
        mine = self.options.get("sampler_post_cfg_function", [])
        return options.get("sampler_post_cfg_function", [])[len(mine) :]

    def speaking(self, conditions: list[dict], parts: Sequence[tuple[slice, slice]]) -> list[dict]:
        """Those whose mask is not empty in all of these parts (rows, columns) of the canvas; all, if none is left."""

        def speaks(condition: dict) -> bool:
            mask = condition.get("mask")
            if mask is None or mask.shape[-2:] != self.x.shape[-2:]:
                return True
            return any(bool(mask[..., rows, columns].any()) for rows, columns in parts)

        return [condition for condition in conditions if speaks(condition)] or conditions

    def finish(self, block: Block, part: Tensor, x: Tensor, sigma: Tensor, options: dict) -> Tensor:
        """The block's x0, passed through the functions that its own sampler added for after guidance (CFG++)."""
        answer = self.answers.pop(block, {})
        for function in self.extras(options):
            args = {k: self._part(v, block, self.noise) for k, v in answer.items()}
            if not args:  # a rehearsal, in which no guider ran
                args = {"uncond_denoised": part, "cond_denoised": part, "model": self.guider.inner_model}
            part = function({**args, "denoised": part, "input": x, "sigma": sigma, "model_options": options})
        return part

    def _part(self, value: Any, block: Block, like: Tensor) -> Any:
        same = isinstance(value, Tensor) and value.ndim == like.ndim and value.shape[-2:] == like.shape[-2:]
        return self.cut(value, block) if same else value
