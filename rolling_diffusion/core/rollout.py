"""The rollout: the only loop. It asks the plan, gathers the requests, calls the denoiser once, answers the cohorts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .cohort import Cohort, Sampler, block_seed, check_sampler, rehearse
from .difficulty import difficulty
from .order import Block
from .plan import Plan

Options = Mapping[str, Any]


class Moving(NamedTuple):
    """A block in motion, as the denoiser is asked for it."""

    block: Block
    x: Tensor  # (B, C, h, w), the block's cells
    sigma: Tensor  # scalar


class Denoiser(Protocol):
    """A model with memory, as the rollout sees it. One without does nothing for `keep`, `commit` and `start`."""

    def denoise(self, moving: Sequence[Moving], keep: bool = False) -> Sequence[Tensor]:
        """x0 estimates, shaped as the x's; keep stores these blocks' keys and values as waiting memory."""
        ...

    def commit(self, block: Block, x0: Tensor) -> None:
        """A finished block enters memory; before the first tick, a piece of what is given."""
        ...

    def start(self, block: Block) -> None:
        """A waiting block leaves memory, for its turn has come."""
        ...


def rollout(
    plan: Plan,
    denoiser: Denoiser,
    sampler: Sampler,
    sigmas: Tensor,
    noise: Callable[[Block], Tensor],
    *,
    seed: int | None = 0,
    options: Options | Callable[[Block], Options] | None = None,
    callback: Callable[[Frame], object] | None = None,
    calls: Sequence[int] | None = None,
    given: Callable[[Block], Tensor] | None = None,
) -> Iterator[tuple[Block, Tensor]]:
    """Yields (block, x) as each block reaches the last sigma. Holds no more than the visible blocks (a draft: all).

    sampler: any sampler(model, x, sigmas, extra_args=, callback=, disable=, **options), unmodified.
    sigmas: (S + 1,), falling. noise: a block's first x (B, C, h, w), scaled to sigmas[0]; a function of the block.
    seed: each block draws from (seed, block), and finds that seed in extra_args["seed"], where ComfyUI's samplers look.
    options: keyword arguments of the sampler, or a function of the block that gives them.
    callback: called with a Frame in each tick, when the model has answered.
    calls: the sampler's model calls before each step, and in all: range(S + 1) for one a step. If it is not given and
    a draft or a callback needs it, the sampler is run once on zeros, with the first block's options, to count them.
    given: x0 (B, C, h, w) of a piece of what the plan has as given: committed before the first tick, where memory keeps
    finished blocks at all, and neither moved nor yielded. What is given within a block is the sampler's to hold.

    One block, or lag 0, with nothing given, is the plain sampler, bit for bit: one cohort over the whole canvas, whose
    requests are split into the plan's blocks. It draws as after torch.manual_seed(seed). With seed None it draws from
    the caller's random state, as the plain sampler does, and several blocks draw their seed from there.

    ValueError for what does not fit together; FloatingPointError if the model answers NaN or infinity. However the
    rollout ends, no cohort is left alive, and grad mode and random state are as they were.
    """
    check_sampler(sampler)
    if sigmas.shape != (plan.steps + 1,):
        raise ValueError(f"sigmas has shape {tuple(sigmas.shape)}, but {plan.steps} steps need {plan.steps + 1} values")
    if not (sigmas.isfinite().all() and (sigmas[1:] <= sigmas[:-1]).all() and sigmas[-1] >= 0):
        raise ValueError(f"sigmas must be finite, never rise and end at 0 or above, unlike {sigmas.tolist()}")
    if not plan.alone and isinstance(options, Mapping) and "noise_sampler" in options:
        raise ValueError("one noise_sampler cannot serve several blocks: give options as a function of the block")
    if calls is not None and (len(calls) != plan.steps + 1 or list(calls) != sorted(calls)):
        raise ValueError(f"calls must be {plan.steps + 1} rising numbers for {plan.steps} steps, unlike {list(calls)}")
    if plan.pieces and given is None:
        raise ValueError("the plan has parts that are given: say what they hold with given, a function of a piece")
    return _Rollout(plan, denoiser, sampler, sigmas, noise, seed, options or {}, callback, calls, given).roll()


class _Rollout:
    def __init__(
        self, plan: Plan, denoiser: Denoiser, sampler: Sampler, sigmas, noise, seed, options, callback, calls, given
    ):
        self.plan, self.denoiser, self.sampler = plan, denoiser, sampler
        self.sigmas: Tensor = sigmas
        self.noise: Callable[[Block], Tensor] = noise
        self.options: Callable[[Block], Options] = (lambda _: options) if isinstance(options, Mapping) else options
        self.callback, self.calls, self.given = callback, calls, given
        self.plain = plan.alone and not plan.pieces  # one cohort over the whole canvas
        self.seed = int(torch.randint(2**62, ())) if seed is None and not self.plain else seed
        self.leftover = bool(sigmas[-1] > 0)
        self.count = 1 if self.plain else len(plan.blocks)  # cohorts in all
        self.everything = plan.blocks[:] if self.plain else ()
        self.cohorts: dict[int, Cohort] = {}  # those alive
        self.preview = _Preview(plan, given)
        self.ticks = self.total = 0

    def roll(self) -> Iterator[tuple[Block, Tensor]]:
        moving: list[int] = []
        started = since = 0
        before: Sequence[Tensor] = ()
        now: Sequence[Tensor] = ()
        try:
            for piece in self.plan.pieces if self.plan.rule.stores("finished") else ():
                self.denoiser.commit(piece, self.given(piece))
            for _ in range(self.rehearse()):  # the draft: all blocks together
                before, now = now, self.tick(range(self.count))
            if self.plan.late:
                self.decide(difficulty(before, now))
            del before, now
            plan, arrivals = self.plan, self.plan.arrivals()
            while moving or started < self.count:
                while started < self.count and plan.due(len(moving), self.ticks - since):  # at lag 0 all at once
                    self.start(started, next(arrivals))
                    moving.append(started)
                    started, since = started + 1, self.ticks
                self.tick(moving)
                for g in [g for g in moving if self.cohorts[g].request is None]:
                    moving.remove(g)
                    yield from self.finish(g)
        finally:
            with ExitStack() as ending:  # newest first, and every one, whatever another raises
                for cohort in self.cohorts.values():
                    ending.callback(cohort.close)

    def rehearse(self) -> int:
        """Model calls of the draft; counts the ticks in all, too."""
        plan, calls = self.plan, self.calls
        if self.callback is None and (plan.alone or not plan.draft):
            return 0
        if calls is None:
            x, options, _ = self.ingredients(0)
            calls = rehearse(self.sampler, x, self.sigmas, options, self.denoiser)
        draft = 0 if plan.alone else calls[plan.draft]
        run = calls[-1] - draft
        self.total = plan.start(self.count - 1, draft, run) + run
        return draft

    def decide(self, difficulty: Sequence[float]) -> None:
        """The order is known from here on; the cohorts take their places in it."""
        plan = self.plan.decided(difficulty)
        self.cohorts = {plan.blocks.at(b.top, b.left): self.cohorts[b.index] for b in self.plan.blocks}
        self.plan = plan

    def tick(self, cohorts: Sequence[int]) -> Sequence[Tensor]:
        """One joint call of the model; every cohort in it moves on to its next request. Returns the answers."""
        moving, grad = self.requests(cohorts)
        with torch.set_grad_enabled(grad):
            estimates = self.denoiser.denoise(moving)
        _check(moving, estimates, self.ticks)
        if self.callback is not None:
            self.callback(Frame(self.ticks, self.total, moving, tuple(estimates), self.preview))
        self.ticks += 1
        self.answer(cohorts, estimates)
        return estimates

    def answer(self, cohorts: Sequence[int], estimates: Sequence[Tensor]) -> None:
        answers = iter(estimates)
        for g in cohorts:
            blocks = self.blocks(g)
            x0 = _join(blocks, [next(answers) for _ in blocks])
            self.cohorts[g].resume(x0)

    def start(self, g: int, arrivals: Sequence[int]) -> None:
        """Store the waiting blocks that come within reach; then block g leaves them."""
        if arrivals:
            moving, grad = self.requests(arrivals)
            if self.plan.extrapolation:
                moving = [self.extrapolated(m) for m in moving]
            with torch.set_grad_enabled(grad):
                self.denoiser.denoise(moving, keep=True)
        if self.plan.waits:
            self.denoiser.start(self.plan.blocks[g])

    def extrapolated(self, m: Moving) -> Moving:
        """A waiting block, moved from the draft's end towards the draft's last guess, to so much less noise."""
        share, guess = self.plan.extrapolation, self.cohorts[m.block.index].answer
        assert guess is not None
        return Moving(m.block, m.x.lerp(guess.to(m.x), share), m.sigma * (1 - share))

    def finish(self, g: int) -> Iterator[tuple[Block, Tensor]]:
        cohort, blocks = self.cohorts.pop(g), self.blocks(g)
        assert cohort.result is not None and cohort.answer is not None
        for block, x in _split(blocks, cohort.result):
            if self.plan.commits and g < self.count - 1:  # nobody comes after the last
                with torch.set_grad_enabled(cohort.grad):
                    self.denoiser.commit(block, cohort.answer if self.leftover else x)
            self.preview.paint(block, x)
            yield block, x

    def requests(self, cohorts: Sequence[int]) -> tuple[tuple[Moving, ...], bool]:
        """What these cohorts ask for, and the grad mode they ask in. A cohort begins when it is first needed."""
        moving, grad = [], False
        for g in cohorts:
            if g not in self.cohorts:
                x, options, seed = self.ingredients(g)
                self.cohorts[g] = Cohort(self.sampler, x, self.sigmas, options, self.denoiser, seed)
                self.cohorts[g].begin()
            request, grad = self.cohorts[g].request, self.cohorts[g].grad
            assert request is not None
            moving += [Moving(block, x, request[1]) for block, x in _split(self.blocks(g), request[0])]
        return tuple(moving), grad

    def blocks(self, g: int) -> Sequence[Block]:
        """The blocks of cohort g: its own, or all of them."""
        return self.everything or (self.plan.blocks[g],)

    def ingredients(self, g: int) -> tuple[Tensor, Options, int | None]:
        """First x, options and seed of cohort g."""
        blocks, plan = self.blocks(g), self.plan
        block = Block(0, 0, 0, plan.height, plan.width) if self.plain else blocks[0]
        x = _join(blocks, [self.noise(block) for block in blocks])
        options = self.options(block)
        if self.plain or self.seed is None:
            return x, options, self.seed
        seed = block_seed(self.seed, block)
        extra = {**(options.get("extra_args") or {}), "seed": seed}
        return x, {**options, "extra_args": extra}, seed


def _split(blocks: Sequence[Block], x: Tensor) -> list[tuple[Block, Tensor]]:
    """A cohort's x as its blocks' parts: itself, or slices of the canvas."""
    if len(blocks) == 1:
        return [(blocks[0], x)]
    return [(block, x[..., block.rows, block.columns]) for block in blocks]


def _join(blocks: Sequence[Block], parts: Sequence[Tensor]) -> Tensor:
    """The inverse of _split."""
    if len(blocks) == 1:
        return parts[0]
    height, width = max(b.rows.stop for b in blocks), max(b.columns.stop for b in blocks)
    canvas = parts[0].new_empty(*parts[0].shape[:-2], height, width)
    for block, part in zip(blocks, parts):
        canvas[..., block.rows, block.columns] = part
    return canvas


def _check(moving: Sequence[Moving], estimates: Sequence[Tensor], tick: int) -> None:
    """The denoiser's answers fit its requests and are finite. One wait for the device, not one per block."""
    if [e.shape for e in estimates] != [m.x.shape for m in moving]:
        raise ValueError(
            f"in tick {tick} the denoiser answered {[tuple(e.shape) for e in estimates]} "
            f"to requests of {[tuple(m.x.shape) for m in moving]}"
        )
    finite = torch.stack([e.isfinite().all() for e in estimates]).tolist()
    for (block, _, sigma), fine in zip(moving, finite):
        if not fine:
            raise FloatingPointError(
                f"the model answered NaN or infinity for block {block.index} in tick {tick} "
                f"at noise level {float(sigma):.4g}: try a wider dtype, such as bfloat16 or float32"
            )


@dataclass(frozen=True)
class Frame:
    """What a callback sees: tick `tick` (from 0) of `total`, the blocks in motion and the model's answers for them."""

    tick: int
    total: int
    moving: tuple[Moving, ...]
    estimates: tuple[Tensor, ...]  # x0, shaped as the x's
    _preview: _Preview

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(m.block for m in self.moving)

    @cached_property
    def sigmas(self) -> tuple[float, ...]:
        """The noise level of each block in motion."""
        return tuple(torch.stack([m.sigma for m in self.moving]).tolist())

    @cached_property
    def canvas(self) -> Tensor:
        """The newest x0 of every block, and what is given, (B, C, height, width); 0 where there is nothing yet.

        Rollouts keep a canvas from the first time that one is asked for: ask in every tick, or from the first.
        """
        return self._preview.look(self.moving, self.estimates)


class _Preview:
    """The canvas, if anybody looks at it. Without a look, nothing is kept."""

    def __init__(self, plan: Plan, given: Callable[[Block], Tensor] | None):
        self.plan, self.given = plan, given
        self.canvas: Tensor | None = None

    def paint(self, block: Block, x: Tensor) -> None:
        if self.canvas is not None:
            self.canvas[..., block.rows, block.columns] = x.detach()

    def look(self, moving: Sequence[Moving], estimates: Sequence[Tensor]) -> Tensor:
        if self.canvas is None:
            x = estimates[0]
            self.canvas = x.new_zeros(*x.shape[:-2], self.plan.height, self.plan.width)
            for piece in self.plan.pieces:
                assert self.given is not None
                self.paint(piece, self.given(piece))
        for (block, _, _), x in zip(moving, estimates):
            self.paint(block, x)
        return self.canvas.clone()
