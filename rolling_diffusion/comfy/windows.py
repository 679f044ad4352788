"""Rolling diffusion for models without per-block noise: one noise level a call, a window of the canvas at a time.

A block is denoised in a window: the block and the canvas around it, all at the block's own level, since the model takes
one. What is finished, or moves ahead, is noised to that level from its newest x0. What waits is where the draft left
it, and is denoised along with the block, as in ordinary sampling: so the model sees surroundings such as it was trained
on. Only the block's own answer is kept; what it imagined around itself is forgotten when it is done.

What is given is finished from the start, so no window is drawn for it; the draft is then a window too, of what is left
and so much around it.

A window is at least the plan's window, and as much larger as costs allow (`BUDGET`).
Attention persistence p scales the unnormalised attention weight that earlier blocks, a blocks away, get by p**a.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import comfy.conds
import comfy.model_base
import comfy.model_patcher
import comfy.samplers
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key, copy_nested_dicts
from torch import Tensor

from ..core.order import rest_of
from .canvas import KEY, BlockModel, Canvas, log, masked, plane

if TYPE_CHECKING:
    from ..core.order import Block
    from ..core.plan import Plan
    from ..core.rollout import Moving

Box = tuple[int, int, int, int]  # height, width, top, left in cells, as ComfyUI writes areas

# Windows see as much of the canvas as so many times the cells of ordinary sampling allow. A model that cannot be told
# where its window lies draws sky and ground anew in a part of the canvas: it sees the whole, where this allows it.
BUDGET, UNPLACED = 1.5, 2.5
LEAST = {"PixArtMS": 66}  # cells of height and width together, below which a model's positions are not defined
CROP = 1280 + 2 * 256  # where the crop stands in what SDXL is told: after its text, and the picture's height and width
PLACED = ("Flux", "NextDiT", "WanModel", "ErnieImageModel")  # transformers whose positions ComfyUI can shift


class WindowDenoiser(Canvas):
    """The core's denoiser for every model that ComfyUI can sample."""

    def __init__(self, *args: Any, plan: Plan, persistence: float = 1.0):
        super().__init__(*args)
        self.plan, self.persistence = plan, persistence
        model = self.guider.inner_model.diffusion_model
        self.unit = side_of_token(model)  # a window is whole tokens, and lies on the canvas's own
        self.scope = scope(plan, self.noise.shape[-2:], model, persistence)
        self.shape = window_shape(plan, self.noise.shape[-2:], model, persistence)
        self.eps = self.noise.clone()  # what is noise in each cell, as the model sees it
        self.begun = torch.zeros(self.noise.shape[-2:], dtype=torch.bool)  # cells of blocks that have left the draft
        self.seen: dict[Block, tuple[Tensor, Tensor]] = {}  # x0 and eps of the canvas, as a block in motion imagines it
        self.window: Box | None = None
        self.weights: Tensor | None = None  # attention weight of each cell of the window
        self.context = -1  # tokens of the text
        self.used: bool | None = None  # has any attention taken weights, where there were any?
        self.controls: dict = {}
        self.options = copy_nested_dicts(self.options)
        for kind, wrapper in (
            (WrappersMP.CALC_COND_BATCH, self._crop),
            (WrappersMP.APPLY_MODEL, self._apply),
            (WrappersMP.DIFFUSION_MODEL, self._place),
        ):
            add_wrapper_with_key(kind, KEY, wrapper, self.options, is_model_options=True)

    # --- the denoiser protocol -------------------------------------------------------------------------------------

    def denoise(self, moving: Sequence[Moving], keep: bool = False) -> Sequence[Tensor]:
        if keep:  # waiting blocks stay where the draft left them
            return [m.x for m in moving]
        levels = {float(m.sigma) for m in moving}
        if len(levels) == 1 and self.covers([m.block for m in moving]):
            out = self.whole(moving)
            self.show(moving, out)
            if not self.plan.alone:
                self.eps = self._noise_in(self.x, self.asked[moving[0].block][0], self.x0, self.eps)
            return out
        if len(levels) == 1 and len(moving) == len(self.plan.blocks) and self.plan.pieces:
            return self._together(moving)
        out = []
        for m in moving:
            out.append(self._windowed(m))
            self.show([m], out[-1:])
        return out

    def commit(self, block: Block, x0: Tensor) -> None:
        self.paste(self.x0, block, x0)
        self.begun[block.rows, block.columns] = True
        self.seen.pop(block, None)

    def start(self, block: Block) -> None:
        pass

    def clear(self) -> None:
        self.controls.clear()
        self.seen.clear()
        if self.used is False:
            name = type(self.guider.inner_model.diffusion_model).__name__
            log.info("Rolling: attention_persistence changes nothing here: %s lets no other weigh its attention.", name)

    # --- a window ----------------------------------------------------------------------------------------------------

    def _together(self, moving: Sequence[Moving]) -> list[Tensor]:
        """All blocks at one level, amid what is given, noised to that level: one call on the part that matters."""
        blocks = [m.block for m in moving]
        sigma, _ = self.asked[blocks[0]]
        x = self.sampling.noise_scaling(self._level(sigma), self.eps.clone(), self.x0)
        for m in moving:
            self.paste(x, m.block, m.x)
        self.window = self.scope
        try:
            answer = self.ask(x, sigma, self.joint_options(blocks))
        finally:
            self.window = None
        out = [self.cut(answer, block).clone() for block in blocks]
        self.show(moving, out)
        self.eps = self._noise_in(x, sigma, self.x0, self.eps)
        return out

    def _windowed(self, m: Moving) -> Tensor:
        sigma, _ = self.asked[m.block]
        x0, eps = self.seen.setdefault(m.block, (self.x0.clone(), self.eps.clone()))
        begun = self.begun.to(x0.device)
        x0 = torch.where(begun, self.x0, x0)
        eps = torch.where(begun, self.eps, eps)
        x = self.sampling.noise_scaling(self._level(sigma), eps.clone(), x0)
        if self.mask is not None:
            x = self._kept(x, sigma)
        self.paste(x, m.block, m.x)
        self.window, self.weights = self._window(m.block)
        height, width, top, left = self.window
        inside = ..., slice(top, top + height), slice(left, left + width)
        try:
            out = self.ask(x, sigma, self.joint_options([m.block]))
            x0[inside] = out[inside]
            eps = self._noise_in(x, sigma, x0, eps)
            self.seen[m.block] = x0, eps
            self.begun[m.block.rows, m.block.columns] = True
            self.paste(self.eps, m.block, self.cut(eps, m.block))
            return self.cut(out, m.block).clone()
        finally:
            self.window = self.weights = None

    def _kept(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x with what an inpainting mask keeps as it truly is at this level, by ComfyUI's own code for it."""
        seen = [x]
        model = BlockModel(self.guider, lambda x, *_: seen.append(x) or x)
        inpaint = comfy.samplers.KSamplerX0Inpaint(model, self.sigmas)
        inpaint.noise, inpaint.latent_image = self.noise, self.latent
        inpaint(x, sigma, self.mask, self.options)
        return seen[-1]

    def _level(self, sigma: Tensor) -> Tensor:
        return sigma.reshape(-1, *[1] * (self.x.ndim - 1))

    def _noise_in(self, x: Tensor, sigma: Tensor, x0: Tensor, before: Tensor) -> Tensor:
        """What is noise in x at this level, if x0 is the rest: along it a sampler goes on."""
        level, zero = self._level(sigma), torch.zeros_like(x)
        scale = self.sampling.noise_scaling(level, torch.ones_like(x), zero.clone())
        rest = self.sampling.noise_scaling(level, zero, x0)
        return torch.where(scale > 1e-3, (x - rest) / scale.clamp(min=1e-3), before)

    def _window(self, block: Block) -> tuple[Box, Tensor]:
        """The window of a block, and the attention weight of its cells."""
        box = place(block, self.shape, self.noise.shape[-2:], self.unit)
        height, width, top, left = box
        rows = torch.arange(top, top + height)[:, None]
        columns = torch.arange(left, left + width)[None]
        gap = torch.maximum(
            torch.maximum(block.top - rows, rows - block.rows.stop + 1),
            torch.maximum(block.left - columns, columns - block.columns.stop + 1),
        ).clamp(min=0)
        weights = self.persistence ** torch.ceil(gap / self.plan.size)
        begun = self.begun[top : top + height, left : left + width]
        return box, torch.where(begun, weights, torch.ones(()))

    def _place(self, executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tells a transformer with positions where on the canvas the window lies, where ComfyUI has a way to say it."""
        given = kwargs.get("transformer_options"), *args
        options = next((each for each in given if isinstance(each, dict) and "wrappers" in each), None)
        model = executor.class_obj
        if self.window is None or options is None or not knows_places(model):
            return executor(x, *args, **kwargs)
        if tuple(x.shape[-2:]) != self.window[:2]:  # a conditioning's own area: no model is told where these lie
            return executor(x, *args, **kwargs)
        before = options.get("rope_options")
        own = dict(before or {})
        for axis, start in (("y", self.window[2] - self.origin[0]), ("x", self.window[3] - self.origin[1])):
            own[f"shift_{axis}"] = own.get(f"shift_{axis}", 0.0) + own.get(f"scale_{axis}", 1.0) * start / self.unit
        options["rope_options"] = own
        try:
            return executor(x, *args, **kwargs)
        finally:
            options.pop("rope_options")
            if before is not None:
                options["rope_options"] = before

    def _crop(self, executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, options: dict, *a, **kw):
        """Restricts every conditioning to the window: ComfyUI's areas crop latents, masks and concatenated latents."""
        if self.window is None:
            return executor(model, conds, x, timestep, options, *a, **kw)
        height, width, top, left = window = self.window
        inside = slice(top, top + height), slice(left, left + width)
        cropped = []
        for group in conds:
            if group is not None:
                group = self.speaking(group, [inside])
                group = [c for c in (self._within(c, window, x) for c in group) if c]
            cropped.append(group)
        return executor(model, cropped, x, timestep, options, *a, **kw)

    def _within(self, cond: dict, window: Box, x: Tensor) -> dict | None:
        rows, columns = x.shape[-2:]
        box, area = window, (rows, columns, 0, 0)
        if "area" in cond:
            area = height, width, top, left = plane(cond["area"])
            y, z = max(top, window[2]), max(left, window[3])
            bottom = min(top + height, window[2] + window[0])
            right = min(left + width, window[3] + window[1])
            if bottom <= y or right <= z:
                return None
            box = (bottom - y, right - z, y, z)
        out = {**cond, "area": box, "model_conds": self._told(cond, box, area)}
        if "gligen" in cond:
            raise ValueError(
                "GLIGEN boxes are placed on the whole canvas and cannot be cropped to a window: remove the node, "
                "or set rolling_window_size so that the window covers the canvas."
            )
        if cond.get("control") is not None:
            out["control"] = self._control(cond["control"], box, x)
        return out

    def _told(self, cond: dict, box: Box, area: Box) -> dict:
        """What the model is told of its picture: SDXL learnt where in it a crop begins, and is told where this does."""
        model, told = self.guider.inner_model, cond["model_conds"]
        if not isinstance(model, (comfy.model_base.SDXL, comfy.model_base.SDXLRefiner)) or "y" not in told:
            return told
        y, canvas = told["y"].cond.clone(), self.noise.shape[-2:]
        for i, (axis, side) in enumerate((("h", "height"), ("w", "width"))):
            pixels = cond.get(f"target_{side}", cond.get(side, 8 * canvas[i]))
            crop = cond.get(f"crop_{axis}", 0) + (box[2 + i] - area[2 + i]) * pixels / canvas[i]
            y[:, CROP + 256 * i : CROP + 256 * (i + 1)] = model.embedder(torch.tensor([float(crop)])).to(y)
        return {**told, "y": comfy.conds.CONDRegular(y)}

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
        self.used = bool(self.used)
        grids = _grids(weights)
        previous = options.get("optimized_attention_override")

        def attention(func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kw: Any) -> Tensor:
            bias = self._bias(grids, q, k, kw)
            if bias is not None:
                args, kw = masked(args, kw, q, lambda mask: bias if mask is None else mask + bias)
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


def side_of_token(model: Any) -> int:
    """Cells a side that a model takes as one: a transformer's patch, the last scale of a UNet."""
    if hasattr(model, "channel_mult"):
        return 2 ** (len(model.channel_mult) - 1)
    patch = getattr(model, "patch_size", 1)
    patch = patch[-1] if isinstance(patch, (tuple, list)) else patch
    return patch if isinstance(patch, int) and patch > 0 else 1


def knows_places(model: Any) -> bool:
    """Can this model be told where on the canvas its window lies?"""
    return type(model).__name__ in PLACED and hasattr(comfy.model_patcher.ModelPatcher, "set_model_rope_options")


def scope(plan: Plan, canvas: Sequence[int], model: Any = None, persistence: float = 1.0) -> Box:
    """What a call on all blocks sees: the canvas; where a part of it is given, what is left and a window around it."""
    if not plan.pieces:
        return canvas[0], canvas[1], 0, 0
    rest = rest_of(plan.given, plan.height, plan.width)
    around = plan.window if persistence > 0 else 0
    height, width = min(rest.height + around, canvas[0]), min(rest.width + around, canvas[1])
    if height + width < LEAST.get(type(model).__name__, 1):
        height, width = canvas
    return place(rest, (height, width), canvas, side_of_token(model))


def window_shape(plan: Plan, canvas: Sequence[int], model: Any = None, persistence: float = 1.0) -> tuple[int, int]:
    """Rows and columns of a window (cells): the plan's, or the most that the budget allows."""
    first, unit, rest = plan.blocks[0], side_of_token(model), rest_of(plan.given, plan.height, plan.width)
    height, width, *_ = scope(plan, canvas, model, persistence)
    if plan.alone:
        return height, width

    def grown(size: int) -> tuple[int, int]:
        """So many cells along each axis that blocks are cut along."""
        size = -(-size // unit) * unit
        down, across = (size if first.height < rest.height else height), (size if first.width < rest.width else width)
        return min(down, height), min(across, width)

    budget = BUDGET if knows_places(model) else UNPLACED
    run = plan.steps - plan.draft
    afford = (budget * plan.steps - plan.draft) * height * width / (run * len(plan.blocks))
    least = LEAST.get(type(model).__name__, 1)
    size = plan.window if persistence > 0 else 0  # without context, the block alone
    while size < max(height, width) and (
        sum(grown(size)) < least or (persistence > 0 and math.prod(grown(size + 1)) <= afford)
    ):
        size += 1
    return grown(size)


def place(block: Block, shape: tuple[int, int], canvas: Sequence[int], unit: int = 1) -> Box:
    """A window of this shape with the block in its middle, moved to where it stays on the canvas and cuts no token."""

    def along(start: int, stop: int, size: int, extent: int) -> tuple[int, int]:
        stop = min(stop, extent)
        first, last, end = start // unit * unit, -(-stop // unit) * unit, -(-extent // unit) * unit
        size = max(size, last - first)
        if size >= extent:
            return extent, 0
        begin = max(min((start + stop - size) // 2, end - size), 0)
        begin = min(max(begin // unit * unit, last - size), first)
        return min(size, extent - begin), begin

    height, top = along(block.top, block.rows.stop, shape[0], canvas[-2])
    width, left = along(block.left, block.columns.stop, shape[1], canvas[-1])
    return height, width, top, left


def plan_of_windows(plan: Plan, model: Any = None) -> str:
    """A plan's description, with the cost of windows: one call for each block and step after the draft."""
    run, canvas = plan.steps - plan.draft, (plan.height, plan.width)
    shape, unit = window_shape(plan, canvas, model, plan.persistence), side_of_token(model)
    boxes = [place(block, shape, canvas, unit) for block in plan.blocks]
    cells = plan.draft * math.prod(canvas) + run * sum(height * width for height, width, *_ in boxes)
    rows = [line for line in str(plan).splitlines() if not line.startswith(("calls", "tokens", "cost"))]
    height, width = map(max, list(zip(*boxes))[:2])
    calls = f"{plan.draft} of the whole canvas + {run * len(boxes)} of windows, up to {height} × {width} cells"
    rows.append(f"calls   {calls}")
    rows.append(f"cost    {cells} cells, {cells / (plan.steps * math.prod(canvas)):.2f} of ordinary sampling")
    return "\n".join(rows)


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
