"""One run: the rollout's denoiser over FluxPipeline's own calls, and what happens between two ticks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..core.order import Block
from ..core.plan import Plan
from ..core.rollout import Frame, Moving, rollout
from ..models.denoiser import FluxDenoiser, pack, unpack
from .guidance import Guidance
from .schedulers import call_levels, sample_with_scheduler


class Interrupted(Exception):
    """Ends a rollout when the pipeline is interrupted; never leaves `Run.latents`."""


class Branch:
    """The transformer as FluxPipeline calls it for one prompt: in a cache context, with embeddings that may change."""

    def __init__(self, transformer: Any, context: str):
        self.transformer, self.context = transformer, context
        self.embeds: Tensor | None = None  # in place of the prompt's, once a callback has changed them

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transformer, name)

    def __call__(self, encoder_hidden_states: Tensor, joint_attention_kwargs: dict[str, Any], **arguments: Any) -> Any:
        with self.transformer.cache_context(self.context):
            return self.transformer(
                encoder_hidden_states=encoder_hidden_states if self.embeds is None else self.embeds,
                joint_attention_kwargs=dict(joint_attention_kwargs),  # the stock forward takes entries out of it
                **arguments,
            )


class Run:
    """The denoiser of one rollout. It answers velocities: schedulers step those; x0 on the way would be a rounding.

    canvas: (B, C, height, width) noise. bar: a progress bar. callback, inputs: FluxPipeline's callback_on_step_end and
    the names of what it is told.
    """

    def __init__(
        self,
        pipe: Any,
        plan: Plan,
        scheduler: Any,
        guidance: Guidance,
        branches: Sequence[FluxDenoiser],
        embeds: Tensor,
        canvas: Tensor,
        bar: Any,
        callback: Callable[..., Any] | None,
        inputs: Sequence[str],
    ):
        self.pipe, self.plan, self.scheduler, self.guidance, self.branches = pipe, plan, scheduler, guidance, branches
        self.embeds, self.canvas, self.bar, self.callback, self.inputs = embeds, canvas, bar, callback, inputs
        self.levels = call_levels(scheduler)
        self.live: dict[Block, Tensor] = {}  # x of the blocks that have begun, as their samplers hold it
        self.tick, self.stepped = -1, False

    def latents(self, on_frame: Callable[[Frame], object] | None) -> Tensor:
        """Rolls, and returns the canvas: finished, or as it stands when interrupted."""
        callback = None if on_frame is None else lambda frame: on_frame(self.clean(frame))
        blocks = rollout(
            self.plan,
            self,
            sample_with_scheduler,
            self.scheduler.sigmas.float().cpu(),
            lambda block: self.canvas[..., block.rows, block.columns],
            seed=None,
            options=self.options,
            callback=callback,
            calls=range(self.plan.steps + 1),  # one a step; no rehearsal, which would fire `stepped`
        )
        try:
            for _ in blocks:
                self.settle()
        except Interrupted:
            pass
        return self.gather()

    def options(self, block: Block) -> dict[str, Any]:
        return {
            "scheduler": self.scheduler,
            "levels": self.levels,
            "stepped": lambda x: self.step(block, x),
        }

    def denoise(self, moving: Sequence[Moving], keep: bool = False) -> Sequence[Tensor]:
        """Velocities of the blocks in motion."""
        self.settle()
        if not keep:
            highest = max(float(m.sigma) for m in moving)
            self.tick += 1
            self.pipe._current_timestep = next(t for t, s in zip(self.scheduler.timesteps, self.levels) if s == highest)
        answers = [branch.velocity(moving, keep) for branch in self.branches]
        return answers[0] if len(answers) == 1 else self.guidance.join(moving, *answers)

    def commit(self, block: Block, x0: Tensor) -> None:
        self.settle()
        for branch in self.branches:
            branch.commit(block, x0)

    def start(self, block: Block) -> None:
        self.settle()
        for branch in self.branches:
            branch.start(block)

    def step(self, block: Block, x: Tensor) -> None:
        """A sampler has stepped its block."""
        self.live[block], self.stepped = x, True

    def settle(self) -> None:
        """Once between two ticks, outside of the samplers: every block in motion has been stepped."""
        if not self.stepped:
            return
        self.stepped = False
        if self.callback is not None:
            self.call_back(self.callback)
        warmup = max(0, len(self.levels) - self.bar.total * self.scheduler.order)
        last = self.tick == self.plan.ticks - 1
        if not self.plan.alone or last or (self.tick >= warmup and (self.tick + 1) % self.scheduler.order == 0):
            self.bar.update()
        if self.pipe.interrupt:
            raise Interrupted

    def call_back(self, callback: Callable[..., Any]) -> None:
        """FluxPipeline's callback, told the whole canvas; what it changes acts from the next call on."""
        latents = pack(self.gather())
        known = {"latents": latents, "prompt_embeds": self.embeds}
        told = {name: known[name] for name in self.inputs}
        answer = callback(self.pipe, self.tick, self.pipe._current_timestep, told)
        changed = answer.pop("latents", latents)
        if changed is not latents or "latents" in self.inputs:  # it may have been changed in place
            self.canvas = unpack(changed.to(self.canvas), *self.canvas.shape[-2:])
            for block, x in self.live.items():
                x.copy_(self.canvas[..., block.rows, block.columns])
        embeds = answer.pop("prompt_embeds", self.embeds)
        if embeds is not self.embeds:
            self.embeds = self.branches[0].transformer.embeds = embeds

    def gather(self) -> Tensor:
        """The canvas as it stands, (B, C, height, width)."""
        canvas = self.canvas.clone()
        for block, x in self.live.items():
            canvas[..., block.rows, block.columns] = x
        return canvas

    def clean(self, frame: Frame) -> Frame:
        """The frame with x0 in place of velocities."""
        pairs = zip(frame.moving, frame.estimates)
        return replace(frame, estimates=tuple(m.x - m.sigma.to(m.x) * v for m, v in pairs))

    def clear(self) -> None:
        """Free the memory."""
        for branch in self.branches:
            branch.clear()
