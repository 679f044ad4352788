"""Flux in ComfyUI with a noise level per block and with memory, through ComfyUI's own hooks.

Nothing is patched: one sampling run carries its wrappers in its own copy of the model's options. In a call

- a DIFFUSION_MODEL wrapper works out which tokens move, and puts the rest of the hooks into that call's options;
- a post_input patch keeps the tokens of moving blocks (and of reference latents), with their true positions;
- replacements of the transformer blocks, around those that other nodes put there, pass one modulation per noise level;
- optimized_attention_override, before that of other nodes, stores and appends keys and values;
- the final layer's hooks, removed at the end of the call, modulate per level and put the tokens back on the canvas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import comfy.ldm.flux.model
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key, copy_nested_dicts
from torch import Tensor

from ..core.memory import Memory
from .canvas import KEY, Canvas, plane
from .drift import drift
from .flux_call import FluxCall

if TYPE_CHECKING:
    from ..core.order import Block
    from ..core.plan import Plan
    from ..core.rollout import Moving

Branch = tuple[int, Any, int]  # which of the guider's evaluations, which conditioning, which side


def is_flux(model: Any) -> bool:
    """Is this ComfyUI's own Flux (1, 2, Kontext, Fill, …), so that its blocks take what the hooks pass?"""
    inner = getattr(model, "diffusion_model", None)
    return type(inner) is comfy.ldm.flux.model.Flux


def per_block_noise(model: Any, options: dict, dimensions: int = 4) -> tuple[bool, str]:
    """Can the model take a noise level per block? And if not, why."""
    if dimensions != 4 or not is_flux(model):
        return False, f"{type(getattr(model, 'diffusion_model', model)).__name__} takes one noise level a call"
    if "multigpu_clones" in options:
        return False, "With several GPUs memory cannot be kept"
    changed = drift(model.diffusion_model)
    if changed:
        return False, f"This ComfyUI has changed {changed}, which a noise level per block relies on"
    return True, ""


@dataclass
class Call:
    """One call of the guider: which blocks move, at which noise, and what is stored of them."""

    blocks: list[Block]
    sigmas: list[float]
    largest: float  # the noise that the guider is told
    store: str | None = None  # "finished", "waiting" or nothing
    origin: tuple[int, int] = (0, 0)  # tokens (down, across) from which positions are told
    ordinal: int = -1  # which evaluation of the guider is running
    areas: dict = field(default_factory=dict)  # (evaluation, conditioning, side): (height, width, top, left) in cells


class FluxDenoiser(Canvas):
    """The core's denoiser over ComfyUI's Flux: x0 = x - sigma_block * v; text takes the largest noise level."""

    def __init__(
        self,
        *args: Any,
        plan: Plan,
        cap: int | None = None,
        context_noise: float = 0.0,
    ):
        super().__init__(*args)
        self.plan, self.context_noise = plan, context_noise
        self.rule = replace(plan.rule, cap=cap)
        self.memories: dict[Branch, Memory] = {}
        self.stored: dict[Branch, frozenset] = {}  # the same blocks stored: two conditionings can share a call
        self.call: Call | None = None
        self.given: list[Block] = []  # pieces that are finished from the start, and not yet in memory
        self.patch = self.guider.inner_model.diffusion_model.patch_size
        self.options = copy_nested_dicts(self.options)
        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, self._evaluation, self.options, is_model_options=True)
        add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, self._transformer, self.options, is_model_options=True)

    # --- the denoiser protocol -------------------------------------------------------------------------------------

    def denoise(self, moving: Sequence[Moving], keep: bool = False) -> Sequence[Tensor]:
        if keep and not self.rule.stores("waiting"):
            return [m.x for m in moving]
        if self.given:
            self._remember(self.given)
            self.given = []
        level = {float(m.sigma) for m in moving}
        if not keep and len(level) == 1 and not self.memories and self.covers([m.block for m in moving]):
            out = self.whole(moving)
            self.show(moving, out)
            return out
        for m in moving:
            self.paste(self.x, m.block, m.x)
        blocks = [m.block for m in moving]
        out = self._joint(blocks, [float(m.sigma) for m in moving], "waiting" if keep else None)
        parts = [self.cut(out, b).clone() for b in blocks]
        if keep:
            self.show()
        else:
            self.show(moving, parts)
        return parts

    def commit(self, block: Block, x0: Tensor) -> None:
        self.paste(self.x, block, x0)
        self.paste(self.x0, block, x0)
        if not self.rule.stores("finished"):
            return
        if block.index >= len(self.plan.blocks):  # a piece of what is given: all of them in one call
            self.given.append(block)
        else:
            self._remember([block])

    def _remember(self, blocks: list[Block]) -> None:
        """Finished blocks enter memory."""
        sigma = self.context_noise
        if sigma > 0:
            for block in blocks:
                noise, x0 = self.cut(self.noise, block), self.cut(self.x0, block)
                scale = torch.tensor(sigma, device=x0.device, dtype=x0.dtype)
                self.paste(self.x, block, self.sampling.noise_scaling(scale, noise.clone(), x0))
        self._joint(blocks, [sigma] * len(blocks), "finished")
        for block in blocks:
            self.paste(self.x, block, self.cut(self.x0, block))
        self.show()

    def start(self, block: Block) -> None:
        for branch, memory in self.memories.items():
            memory.start(block)
            self.stored[branch] -= {("waiting", block)}

    def clear(self) -> None:
        for memory in self.memories.values():
            memory.clear()
        self.memories.clear()
        self.stored.clear()
        self.given.clear()

    # --- one call ---------------------------------------------------------------------------------------------------

    def _joint(self, blocks: list[Block], sigmas: list[float], store: str | None) -> Tensor:
        # Conditionings look at the guider's sigma, and some guidance divides by it: never 0.
        largest = max(max(sigmas), float(self.sampling.sigma_min))
        self.call = Call(blocks, sigmas, largest, store, tuple(cells // self.patch for cells in self.origin))
        try:
            sigma = torch.full((self.x.shape[0],), largest, device=self.x.device, dtype=self.x.dtype)
            return self.ask(self.x.clone(), sigma, self.joint_options([] if store else blocks))
        finally:
            self.call = None

    def _evaluation(self, executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, options: dict, *a, **kw):
        """Notes each evaluation of conditionings inside a guider's call, and snaps their areas to whole tokens."""
        if self.call is None:
            return executor(model, conds, x, timestep, options, *a, **kw)
        self.call.ordinal += 1
        snapped = []
        for side, group in enumerate(conds):
            if group is not None:
                if self.call.store is None:  # what is stored, all of them will see
                    group = self.speaking(group, [(b.rows, b.columns) for b in self.call.blocks])
                group = [_snap(cond, self.patch, x.shape[-2:]) for cond in group]
                for cond in group:
                    if "area" in cond:
                        self.call.areas[self.call.ordinal, cond["uuid"], side] = tuple(cond["area"])
            snapped.append(group)
        return executor(model, snapped, x, timestep, options, *a, **kw)

    def _transformer(
        self,
        executor: Any,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
        ref_latents: list[Tensor] | None = None,
        control: dict | None = None,
        transformer_options: dict | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Runs the transformer for the moving tokens, for each group of conditionings that sees the same memory."""
        options = transformer_options or {}
        inputs = (x, timestep, context, y, guidance, ref_latents, control)
        if self.call is None:
            return executor(*inputs, options, **kwargs)
        sides, uuids = options["cond_or_uncond"], options["uuids"]
        rows = x.shape[0] // len(sides)
        groups: dict[Any, list[int]] = {}
        branches: list[Branch] = [(self.call.ordinal, u, s) for u, s in zip(uuids, sides)]
        for i, branch in enumerate(branches):
            seen = self.stored.get(self._known(branch), frozenset())
            groups.setdefault((self.call.areas.get(branch), seen), []).append(i)
        if len(groups) == 1:
            return self._run(executor, inputs, options, kwargs, branches)
        out: list[Any] = [None] * len(sides)
        for members in groups.values():
            index = torch.cat([torch.arange(i * rows, (i + 1) * rows) for i in members]).to(x.device)
            part = [_rows(value, index, x.shape[0]) for value in inputs]
            extra = {k: _rows(v, index, x.shape[0]) for k, v in kwargs.items()}
            mine = {**options, "cond_or_uncond": [sides[i] for i in members], "uuids": [uuids[i] for i in members]}
            answer = self._run(executor, part, mine, extra, [branches[i] for i in members])
            for i, o in zip(members, answer.chunk(len(members))):
                out[i] = o
        return torch.cat(out)

    def _known(self, branch: Branch) -> Branch:
        """A conditioning that comes in late (a prompt schedule) reads the memory of another of its side."""
        if branch in self.memories:
            return branch
        alike = [b for b in self.memories if b[0] == branch[0] and b[2] == branch[2]]
        return alike[0] if alike else branch

    def _run(self, executor: Any, inputs: Sequence[Any], options: dict, kwargs: dict, branches: list[Branch]) -> Tensor:
        call = self.call
        assert call is not None
        x, model = inputs[0], executor.class_obj
        area = call.areas.get(branches[0]) or (*x.shape[-2:], 0, 0)
        known = [self.memories[b] for b in map(self._known, branches) if b in self.memories]
        views = [memory.view(call.blocks, free=call.store != "waiting") for memory in known]
        memories = []
        if call.store:
            for branch in branches:
                memories.append(self.memories.setdefault(branch, Memory(self.rule)))
                self.stored[branch] = self.stored.get(branch, frozenset()) | {(call.store, b) for b in call.blocks}
        one = FluxCall(model, self.sampling, call, area, self.patch, views if any(views) else [], memories)
        if not one.tokens:
            channels = model.out_channels // self.patch**2
            return x.new_zeros((x.shape[0], channels, *x.shape[2:]))
        return one.run(executor, inputs, options, kwargs)


def _snap(cond: dict, patch: int, shape: Sequence[int]) -> dict:
    """The conditioning with its area grown to whole tokens: (height, width, top, left) in cells."""
    if "area" not in cond:
        return cond
    height, width, top, left = plane(cond["area"])
    bottom = min(math.ceil((top + height) / patch) * patch, shape[0])
    right = min(math.ceil((left + width) / patch) * patch, shape[1])
    top, left = top // patch * patch, left // patch * patch
    return {**cond, "area": (bottom - top, right - left, top, left)}


def _rows(value: Any, index: Tensor, total: int) -> Any:
    """The rows of a batched input; lists and dicts of tensors too."""
    if isinstance(value, Tensor):
        return value[index.to(value.device)] if value.ndim and value.shape[0] == total else value
    if isinstance(value, list):
        return [_rows(v, index, total) for v in value]
    if isinstance(value, dict):
        return {k: _rows(v, index, total) for k, v in value.items()}
    return value
