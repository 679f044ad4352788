"""Rolling diffusion for models without per-block noise: one noise level a call, a window of the canvas at a time.

A block is denoised in a window that reaches `overlap` cells over what came before it. That context holds the content
known so far (finished blocks, earlier blocks in motion, a draft, or the latent that was given), noised to the block's
own level, so that the model sees one noise level, as it was trained to. Attention persistence p scales the unnormalised
attention weight that the block's tokens give to context a blocks away by p**a; what is not known yet weighs nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key, copy_nested_dicts
from torch import Tensor

from .canvas import KEY, Canvas

if TYPE_CHECKING:
    from ..core.order import Block
    from ..core.plan import Plan
    from ..core.rollout import Moving

Box = tuple[int, int, int, int]  # height, width, top, left in cells, as ComfyUI writes areas


class WindowDenoiser(Canvas):
    """The core's denoiser for every model that ComfyUI can sample."""

    def __init__(self, *args: Any, plan: Plan, persistence: float = 1.0):
        super().__init__(*args)
        self.plan, self.persistence = plan, persistence
        self.known = torch.zeros(self.noise.shape[-2:], dtype=torch.bool)
        if torch.count_nonzero(self.latent) > 0:
            self.known[:] = True
        self.window: Box | None = None
        self.weights: Tensor | None = None  # attention weight of each cell of the window
        self.context = -1  # tokens of the text
        self.used = False  # has any attention taken the weights?
        self.controls: dict = {}
        self.options = copy_nested_dicts(self.options)
        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, self._crop, self.options, is_model_options=True)
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self._apply, self.options, is_model_options=True)

    # --- the denoiser protocol -------------------------------------------------------------------------------------

    def denoise(self, moving: Sequence[Moving], keep: bool = False) -> Sequence[Tensor]:
        if keep:  # there is no memory to store waiting blocks in
            return [m.x for m in moving]
        levels = {float(m.sigma) for m in moving}
        if len(levels) == 1 and self.covers([m.block for m in moving]):
            out = self.whole(moving)
            self.show(moving, out)
            self.known[:] = True
            return out
        out = []
        for m in moving:
            out.append(self._windowed(m))
            self.show([m], out[-1:])
            self.known[m.block.rows, m.block.columns] = True
        return out

    def commit(self, block: Block, x0: Tensor) -> None:
        self.paste(self.x0, block, x0)

    def start(self, block: Block) -> None:
        pass

    def clear(self) -> None:
        self.controls.clear()

    # --- a window ----------------------------------------------------------------------------------------------------

    def _windowed(self, m: Moving) -> Tensor:
        sigma, _ = self.asked[m.block]
        self.window, self.weights = self._window(m.block)
        # The same noise as at the start: what is known is noised along its own path, not with fresh noise a call.
        level = sigma.reshape(-1, *[1] * (self.x.ndim - 1))
        x = self.sampling.noise_scaling(level, self.noise.clone(), self.x0)
        self.paste(x, m.block, m.x)
        try:
            return self.cut(self.ask(x, sigma, self.joint_options([m.block])), m.block).clone()
        finally:
            self.window = self.weights = None

    def _window(self, block: Block) -> tuple[Box, Tensor]:
        """The block and up to `overlap` cells on each side where something is known; and its cells' weights."""
        height, width, top, left = grow(block, self.known, self.plan.overlap if self.persistence > 0 else 0)
        bottom, right = top + height, left + width
        rows = torch.arange(top, bottom)[:, None]
        columns = torch.arange(left, right)[None]
        gap = torch.maximum(
            torch.maximum(block.top - rows, rows - block.rows.stop + 1),
            torch.maximum(block.left - columns, columns - block.columns.stop + 1),
        ).clamp(min=0)
        weights = self.persistence ** torch.ceil(gap / self.plan.size)
        weights = torch.where(self.known[top:bottom, left:right] | (gap == 0), weights, torch.zeros(()))
        return (bottom - top, right - left, top, left), weights

    def _crop(self, executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, options: dict, *a, **kw):
        """Restricts every conditioning to the window: ComfyUI's areas crop latents, masks and concatenated latents."""
        if self.window is None:
            return executor(model, conds, x, timestep, options, *a, **kw)
        window = self.window
        cropped = [
            group if group is None else [c for c in (self._within(c, window, x) for c in group) if c] for group in conds
        ]
        return executor(model, cropped, x, timestep, options, *a, **kw)

    def _within(self, cond: dict, window: Box, x: Tensor) -> dict | None:
        box = window
        if "area" in cond:
            height, width, top, left = _plane(cond["area"])
            y, z = max(top, window[2]), max(left, window[3])
            bottom = min(top + height, window[2] + window[0])
            right = min(left + width, window[3] + window[1])
            if bottom <= y or right <= z:
                return None
            box = (bottom - y, right - z, y, z)
        out = {**cond, "area": box}
        if "gligen" in cond:
            raise ValueError(
                "GLIGEN boxes are placed on the whole canvas and cannot be cropped to a window: remove the node, "
                "or set rolling_window_size so that the window covers the canvas."
            )
        if cond.get("control") is not None:
            out["control"] = self._control(cond["control"], box, x)
        return out

    def _control(self, control: Any, box: Box, x: Tensor) -> Any:
        """A ControlNet with the hint of this window alone. The network is shared; hint and caches are not."""
        key = (id(control), box)
        if key not in self.controls:
            window = copy.copy(control)
            window.cond_hint = window.extra_concat = None
            scale = control.compression_ratio
            if control.vae is not None:
                scale *= control.vae.spacial_compression_encode()
            height, width, top, left = (n * scale for n in box)
            size = x.shape[-1] * scale, x.shape[-2] * scale

            def crop(image: Tensor) -> Tensor:
                whole = comfy.utils.common_upscale(image, *size, control.upscale_algorithm, "center")
                return whole[..., top : top + height, left : left + width]

            if control.cond_hint_original is not None:
                window.cond_hint_original = crop(control.cond_hint_original)
            window.extra_concat_orig = [crop(image) for image in control.extra_concat_orig]
            if control.previous_controlnet is not None:
                window.previous_controlnet = self._control(control.previous_controlnet, box, x)
            self.controls[key] = window
        return self.controls[key]

    # --- attention persistence ------------------------------------------------------------------------------------

    def _apply(self, executor: Any, x: Tensor, t: Tensor, concat: Any = None, context: Any = None, control: Any = None,
               transformer_options: dict | None = None, **kwargs: Any) -> Tensor:  # fmt: skip
        """Weighs the window's context in self-attention, where there is anything to weigh."""
        options = transformer_options or {}
        weights = self.weights
        if weights is None or bool((weights == 1).all()):
            return executor(x, t, concat, context, control, options, **kwargs)
        if weights.shape != x.shape[-2:]:  # a conditioning's own area within the window
            return executor(x, t, concat, context, control, options, **kwargs)
        self.context = context.shape[1] if isinstance(context, Tensor) and context.ndim > 1 else -1
        grids = _grids(weights)
        previous = options.get("optimized_attention_override")

        def attention(func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kw: Any) -> Tensor:
            bias = self._bias(grids, q, k, kw)
            if bias is not None:
                mask = args[0] if args else kw.get("mask")
                if mask is not None and mask.dtype == torch.bool:
                    mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
                args, kw = args[1:], {**kw, "mask": bias if mask is None else mask + bias}
                self.used = True
            if previous is not None:
                return previous(func, q, k, v, heads, *args, **kw)
            return func(q, k, v, heads, *args, **kw)

        options = {**options, "optimized_attention_override": attention}
        return executor(x, t, concat, context, control, options, **kwargs)

    def _bias(self, grids: dict[int, Tensor], q: Tensor, k: Tensor, kw: dict) -> Tensor | None:
        """(1, tokens) added to the logits of a self-attention over the window; None for any other attention."""
        axis = 2 if kw.get("skip_reshape") else 1
        tokens = q.shape[axis]
        if k.shape[axis] != tokens or tokens not in grids or tokens == self.context:
            return None
        return grids[tokens].clamp(min=torch.finfo(torch.float32).tiny).log()[None].to(q)


def grow(block: Block, known: Tensor, reach: int) -> Box:
    """The block and up to `reach` cells on each side, as far as anything is known there."""
    height, width = known.shape
    top, left = block.top, block.left
    bottom, right = min(block.rows.stop, height), min(block.columns.stop, width)
    while top > 0 and block.top - top < reach and known[top - 1, left:right].any():
        top -= 1
    while bottom < height and bottom - block.rows.stop < reach and known[bottom, left:right].any():
        bottom += 1
    while left > 0 and block.left - left < reach and known[top:bottom, left - 1].any():
        left -= 1
    while right < width and right - block.columns.stop < reach and known[top:bottom, right].any():
        right += 1
    return bottom - top, right - left, top, left


def plan_of_windows(plan: Plan) -> str:
    """A plan's description, with the cost of windows: one call for each block and tick, of the window's area."""
    known = torch.zeros(plan.height, plan.width, dtype=torch.bool)
    known[:] = plan.draft > 0
    calls, cells, canvas = plan.draft, plan.draft * known.numel(), plan.height * plan.width
    reach = plan.overlap if plan.persistence > 0 else 0
    for tick in range(plan.draft, plan.ticks):
        for index in plan.moving(tick):
            block = plan.blocks[index]
            height, width, *_ = grow(block, known, reach)
            known[block.rows, block.columns] = True
            calls, cells = calls + 1, cells + height * width
    rows = [line for line in str(plan).splitlines() if not line.startswith(("calls", "tokens", "cost"))]
    rows.append(f"calls   {plan.draft} of the whole canvas + {calls - plan.draft} of windows")
    rows.append(f"cost    {cells} cells, {cells / (plan.steps * canvas):.2f} of ordinary sampling")
    return "\n".join(rows)


def _plane(area: Sequence[int]) -> Box:
    """Height, width, top, left of an area, which for video has a time axis too."""
    half = len(area) // 2
    return area[half - 2], area[half - 1], area[-2], area[-1]


def _grids(weights: Tensor) -> dict[int, Tensor]:
    """The weights at each scale that a network may attend at, by token count: each halving rounds up."""
    grids = {}
    height, width = weights.shape
    for _ in range(int(math.log2(max(height, width, 2))) + 1):
        pooled = torch.nn.functional.adaptive_avg_pool2d(weights[None], (height, width))
        grids.setdefault(height * width, pooled.flatten())
        if height == width == 1:
            break
        height, width = -(-height // 2), -(-width // 2)
    return grids
