"""One run: a pipeline's own call, whose scheduler and transformer are stood in for.

The pipeline's loop goes over ticks instead of steps. What it asks of the transformer is answered for the blocks in
motion alone, each at its noise level; what it asks of the scheduler is done to each block by a copy of that scheduler.
All else, from the prompt to the picture, is the pipeline's own code.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ..core.cohort import block_seed
from ..core.difficulty import difficulty
from ..core.guidance import project
from ..core.memory import Memory, View
from ..core.order import Block
from ..core.plan import Plan
from ..core.rule import Kind
from ..models.call import Levels, unwrapped
from ..models.call import run as rolling_call
from ..models.family import Family, Place
from ..models.prompts import Prompts
from ..models.registry import control_of
from .given import Source
from .places import Places

GOLDEN = (5**0.5 - 1) / 2  # multiples of it lie evenly on a circle, however many


@dataclass(frozen=True)
class Tick:
    """What `on_tick` is told: tick `number` of `total` (from 0, or from the draft's end where a guide takes its place),
    the blocks in motion, and the canvas as guessed.

    plan: as it stands in this tick; an order that is decided at the end of the draft is known from the next one on.
    """

    number: int
    total: int
    blocks: tuple[Block, ...]
    sigmas: tuple[float, ...]  # the noise level of each block in motion
    latents: Tensor  # the newest x0 of every block, in the pipeline's own form; noise where there is none yet
    plan: Plan
    _cells: Callable[[Tensor], Tensor]

    @property
    def canvas(self) -> Tensor:
        """The same as (B, C, height, width) cells."""
        return self._cells(self.latents)


class Timesteps:
    """What a pipeline takes for its scheduler's timesteps: a timestep for each tick, the highest of those in motion.

    Its length is asked for when the size of the canvas is known.
    """

    def __init__(self, run: Run, steps: Tensor):
        self.run, self.steps = run, steps

    def __len__(self) -> int:
        return self.run.plan.ticks - self.run.plan.first

    def __iter__(self) -> Iterator[Tensor]:
        return (self[k] for k in range(len(self)))

    def __getitem__(self, k: Any) -> Tensor:
        if isinstance(k, slice):  # such as the first one, at which a picture to start from is noised
            return self.steps[k]
        plan = self.run.plan
        if not -len(self) <= k < len(self):
            raise IndexError(f"tick {k} of {len(self)}")
        k = k % len(self) + plan.first
        return self.steps[plan.index(k, plan.moving(k)[-1])]  # of all in motion, the last block is the least far


class Scheduler:
    """What a pipeline takes for its scheduler. Where there is but one block, or one level, it is the scheduler itself.

    stepper: steps the blocks. levels: sets the noise levels; the same one, unless names were given: then `adopt` hands
    them over. limit: of the shift of the noise levels.
    """

    def __init__(self, run: Run, stepper: Any, levels: Any, adopt: Callable[[Any], None] | None, limit: Callable):
        self.run, self.stepper, self.levels = run, stepper, levels
        self.takes_generator = "generator" in inspect.signature(stepper.step).parameters
        self.takes_generator &= not stepper.config.get("stochastic_sampling", False)  # which draws past its generator
        self.timesteps: Any = None

        @functools.wraps(levels.set_timesteps)  # pipelines look which arguments it takes
        def set_timesteps(*args: Any, **options: Any) -> None:
            if options.get("mu") is not None:
                options["mu"] = limit(options["mu"])
            levels.set_timesteps(*args, **options)
            if adopt is not None:
                adopt(levels)
            self.timesteps = stepper.timesteps
            if not hasattr(run.pipe, "get_timesteps"):  # else that one leaves out what a picture to start from skips
                self.timesteps = run.take(self.timesteps)

        self.set_timesteps = set_timesteps

    def __getattr__(self, name: str) -> Any:
        return getattr(self.levels if name == "config" else self.stepper, name)

    def __len__(self) -> int:
        return len(self.stepper)

    @property
    def order(self) -> int:
        return self.stepper.order

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any) -> Any:
        return self.run.step(model_output, timestep, sample, *args, **options)

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        return self.run.scale_noise(sample, timestep, noise)


class Transformer:
    """What a pipeline takes for its transformer."""

    def __init__(self, run: Run, real: Any):
        self.run, self.real = run, real
        self.signature = inspect.signature(type(unwrapped(real)).forward)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        if args:
            options = dict(self.signature.bind(self.real, *args, **options).arguments)
            del options["self"]
        answer = self.run.answer(options)
        self.run.answers.append(answer[0])
        return answer


class ControlNet:
    """What a pipeline takes for its ControlNet. Residuals are computed when the tokens are known that they are for."""

    def __init__(self, run: Run, real: Any):
        self.run, self.real = run, real
        self.family = control_of(real)
        self.request: dict[str, Any] = {}
        self.memories: list[Memory] = []
        self.known: dict[tuple, tuple] = {}  # residuals of this tick

    @property
    def __class__(self) -> type:  # pipelines ask whether it is one, or several
        return type(self.real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __call__(self, **request: Any) -> Any:
        if self.run.stock:
            return self.real(**request)
        self.request, self.known = request, {}
        return self, self

    def each(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Each net and its own request: several pictures may go through one net. Only a union is told of a mode."""
        names = ("controlnet_cond", "controlnet_mode", "conditioning_scale")
        several = hasattr(self.real, "nets")
        nets = itertools.cycle(self.real.nets if several else [self.real])
        for net, *values in zip(nets, *(self.request[n] if several else [self.request[n]] for n in names)):
            if not net.union:
                values[1] = None
            elif values[1].ndim == 1:
                values[1] = values[1][:, None]
            yield net, self.request | dict(zip(names, values))

    def residuals(self, indices: Sequence[int], times: list[float], kind: Kind | None) -> dict[str, Any]:
        """The transformer's arguments for these blocks at these timesteps, summed over the nets."""
        question = tuple(indices), tuple(times)
        if question not in self.known:
            sums: list[Any] = [None, None]
            for i, (net, request) in enumerate(self.each()):
                request = self.run.extrapolated(request) if kind == "waiting" else request
                if i == len(self.memories):
                    self.memories.append(self.run.memory(request["hidden_states"]))
                for j, found in enumerate(
                    self.run.call(self.family, net, request, self.memories[i], indices, times, kind)
                ):
                    if found is not None:
                        sums[j] = found if sums[j] is None else [a + b for a, b in zip(sums[j], found)]
            self.known[question] = tuple(sums)
        return dict(zip(("controlnet_block_samples", "controlnet_single_block_samples"), self.known[question]))


class Run:
    """What happens in the ticks of one call."""

    def __init__(
        self,
        pipe: Any,
        family: Family,
        make_plan: Callable[[int, int, int, int], Plan],
        projected: bool,
        *,
        seeds: Sequence[int] | None,
        named: bool,
        text_level: str,
        context_noise: float,
        cap: int | None,
        place_memory: Callable[[Plan, Tensor], torch.device | None],
        on_tick: Callable[[Tick], object] | None,
        given: Source | None = None,
        start: Callable[[Plan], Tensor] | None = None,
        places: Places | None = None,
        wrap: str = "",
    ):
        """make_plan: of height, width, calls and calls a step. seeds: of the pictures, if generators were given. named:
        whether the scheduler was asked for by name. place_memory: where a plan's memory is kept, of such hidden states.
        given: what of the canvas is finished from the start. start: clean latents to begin with after the draft, where
        a guide takes its place. places: prompts that hold for parts of the canvas. wrap: axes along which it is a
        circle, of "yx".
        """
        self.pipe, self.family, self.make_plan, self.projected = pipe, family, make_plan, projected
        self.named, self.text_level, self.context_noise = named, text_level, context_noise
        self.cap, self.place_memory, self.on_tick, self.given = cap, place_memory, on_tick, given
        self.start, self.begun, self.places = start, None, places
        self.weights: Any = None  # (prompts, tokens)
        self.wrap = wrap
        self.seams: dict[Block, Tensor] = {}  # where places were told from, of the blocks in memory
        self.transformer = pipe.transformer
        net = getattr(pipe, "controlnet", None)
        self.control = None if net is None else ControlNet(self, net)
        self.generated = seeds is not None
        self.seeds: list[int] = [torch.initial_seed()] if seeds is None else list(seeds)
        self.scheduler: Any = None  # the stand-in
        self.height = self.width = 0
        self.steps: Any = None  # timesteps of the plan's steps
        self.times: list[float] = []  # the same, as numbers
        self.blocks: list[Block] = []  # those of the plan, then the pieces of what is given
        self.pieces = range(0)
        self.partly: list[int] = []  # blocks of which a part is given
        self.known: Any = None  # latents of what is given
        self.mask: Any = None  # where it is
        self.first: Any = None  # the latents that the pipeline begins with
        self.tokens: list[Tensor] = []  # of each block
        self.draft = 0  # steps in which all blocks are at one level
        self.tick = self.branch = 0  # the tick that runs, and how often the transformer has been asked in it
        self.memories: list[Memory] = []  # one for each time that the transformer is asked in a tick
        self.most_bytes = 0  # that these have held
        self.steppers: dict[int, Any] = {}  # the schedulers of the blocks in motion
        self.finished: list[int] = []  # blocks to be committed
        self.starting: tuple[int, Sequence[int]] | None = None  # a block, and those to be stored as it starts
        self.positive: Any = None  # the answer to the first branch
        self.answers: list[Tensor] = []  # to all branches of this tick
        self.latents: Any = None  # after the newest step
        self.guess: Any = None  # to be shown
        self.estimate: Any = None  # the canvas as guessed in the draft, where something hangs on it
        self.bar: Any = None
        self.like: Any = None  # a picture's latents
        self._plan: Plan | None = None
        self._layout: Any = None
        self._places: dict[int, Place] = {}
        self._draws: dict[int | None, list[torch.Generator]] = {}

    # What is known before the first tick.

    @property
    def plan(self) -> Plan:
        if self._plan is None:
            if not self.height or self.steps is None:
                raise RuntimeError("the pipeline asked how long it takes before it said how large the canvas is")
            plan = self._plan = self.make_plan(self.height, self.width, len(self.steps), self.scheduler.stepper.order)
            self.times = [float(t) for t in self.steps]
            self.arrange(plan)
            self.draft = plan.steps if plan.alone else plan.draft
            self.tick = plan.first
            if self.tick == self.draft:
                self.starting = 0, next(self.arrivals)
        return self._plan

    def arrange(self, plan: Plan) -> None:
        """The blocks, in the order of this plan."""
        self._plan, self._layout, self._places = plan, None, {}
        self.blocks = [*plan.blocks, *plan.pieces]
        self.pieces = range(len(plan.blocks), len(self.blocks))
        if plan.given:
            self.partly = [b.index for b in plan.blocks if any(map(b.common, plan.given))]
            cells = torch.zeros_like(self.family.cells(self.first[:1], plan.height, plan.width), dtype=torch.bool)
            for part in plan.given:
                cells[..., part.rows, part.columns] = True
            self.mask = self.family.latents(cells).expand_as(self.first)
        self.tokens = [self.family.tokens(block, self.width) for block in self.blocks]
        self.arrivals = plan.arrivals()

    def prepared(self, latents: Any) -> None:
        """The pipeline has made its first latents: how large is the canvas?"""
        self.height, self.width = self.family.canvas(latents)
        self.first = latents if isinstance(latents, Tensor) else latents[0]
        if self.given is not None:
            self.like = self.first[:1]
            self.known = self.given.latents(self.height, self.width).to(self.first)
            if self.known.shape[1:] != self.first.shape[1:] or len(self.known) not in (1, len(self.first)):
                raise ValueError(
                    f"given has latents of shape {tuple(self.known.shape)}, and the canvas has "
                    f"{tuple(self.first.shape)}"
                )

    def take(self, steps: Tensor) -> Timesteps:
        """The timesteps that the pipeline is going to take, as ticks."""
        self.steps = steps
        return Timesteps(self, steps)

    @property
    def stock(self) -> bool:
        """Are all tokens at one level, and is nothing remembered? Then all is done exactly as it is asked."""
        return self.tick < self.draft and not (self.pieces or self.places is not None or self.wrap)

    # What the transformer is asked.

    def answer(self, request: dict[str, Any]) -> Any:
        branch, self.branch = self.branch, self.branch + 1
        plan = self.plan
        if self.given is not None and any(self.given.origin):
            rows, columns = (cells // self.family.patch for cells in self.given.origin)
            request = self.family.shifted(request, rows, columns, self.height * self.width // self.family.patch**2)
        if plan.first and self.begun is None:
            assert self.start is not None
            clean = self.estimate = self.start(plan).to(self.first)
            self.begun = torch.lerp(clean.expand_as(self.first), self.first, self.times[plan.draft] / 1000)
            self.scheduler.stepper.set_begin_index(plan.first)  # pipelines say 0, as no step of the draft is taken
        if self.begun is not None and self.tick == plan.first:
            request = self.family.blend(request, self.begun, 1.0)
        if self.stock:
            answer = self.transformer(**request)
            if not self.projected:
                return answer
            return (self.guided(branch, request, answer[0], None),)
        if branch == len(self.memories):
            self.memories.append(self.memory(request["hidden_states"]))
            if self.pieces:
                clean = self.blended(self.family.blend(request, self.known, 1.0), *self.pieces)
                levels = [1000 * self.context_noise] * len(self.pieces)
                self.ask(clean, self.memories[branch], self.pieces, levels, "finished")
        memory = self.memories[branch]
        for g in self.finished:
            self.ask(self.blended(request, g), memory, [g], [1000 * self.context_noise], "finished")
        if self.starting is not None:
            g, new = self.starting
            if new:
                level = self.times[plan.draft] * (1 - plan.extrapolation)
                self.ask(self.extrapolated(request), memory, new, [level] * len(new), "waiting")
            for each in (memory, *(self.control.memories if self.control else ())):
                each.start(self.blocks[g])
        moving = plan.moving(self.tick)
        parts = self.ask(request, memory, moving, [self.times[plan.index(self.tick, g)] for g in moving])
        canvas = self.family.blank(parts[0], self.height, self.width)
        for g, part in zip(moving, parts):
            self.family.paste(canvas, self.blocks[g], self.place(g, canvas), part)
        return (self.guided(branch, request, canvas, moving),)

    def ask(
        self,
        request: dict[str, Any],
        memory: Memory,
        indices: Sequence[int],
        times: list[float],
        kind: Kind | None = None,
    ) -> list[Tensor]:
        """The transformer's answer for these blocks at these timesteps; kind: the memory that is to keep them."""
        more: dict[str, Any] = {}
        if any(value is self.control for value in request.values() if value is not None):
            request = {name: value for name, value in request.items() if value is not self.control}
            assert self.control is not None
            more = self.control.residuals(indices, times, kind)
        answer = self.call(self.family, self.transformer, request, memory, indices, times, kind, **more)[0]
        if kind is not None:
            self.most_bytes = max(self.most_bytes, sum(memory.nbytes for memory in self.all_memories))
        places = self.layout(tuple(indices), tuple(times), answer.device)[3]
        return self.family.parts(answer, [self.blocks[g] for g in indices], places)

    def call(
        self,
        family: Family,
        model: Any,
        request: dict[str, Any],
        memory: Memory,
        indices: Sequence[int],
        times: list[float],
        kind: Kind | None,
        **more: Any,
    ) -> tuple:
        """One rolling call of a model."""
        blocks = [self.blocks[g] for g in indices]
        device = request["hidden_states"].device
        tokens, index, levels, places = self.layout(tuple(indices), tuple(times), device)
        told = family.level(torch.tensor(levels, dtype=torch.float32, device=device), request)
        view = memory.view(blocks, free=kind != "waiting")

        def keep(layer: int, key: Tensor, value: Tensor) -> None:
            assert kind is not None
            for block, place in zip(blocks, places):
                memory.put(kind, block, layer, key[:, place], value[:, place])

        sink = keep if kind is not None and memory.rule.stores(kind) else None
        told = told.expand(len(request["hidden_states"]), -1)  # there may be but one prompt for all pictures
        size, text = (self.height, self.width), request["encoder_hidden_states"].shape[1]
        if self.wrap:
            request, more["turn"] = self.circled(request, blocks, view, kind)
        if self.places is None or text != self.places.tokens:
            rows = Levels.of(told, index, self.text_level)
            return rolling_call(family, model, request, tokens, size, rows, view, sink, **more)
        request, prompts = self.prompts(request, tokens, view)
        rows = Levels.of_prompts(told, index, self.text_level, prompts, text)
        return rolling_call(family, model, request, tokens, size, rows, view, sink, prompts, **more)

    def circled(
        self, request: dict[str, Any], blocks: Sequence[Block], view: View | None, kind: Kind | None
    ) -> tuple[dict[str, Any], Callable[[Tensor], Tensor] | None]:
        """The request with places told from the seam of this call on, modulo the canvas; and how keys in memory, which
        were stored with the seam elsewhere, are turned."""
        patch, device = self.family.patch, request["hidden_states"].device
        sides = torch.tensor([self.height // patch, self.width // patch])
        seam = torch.tensor([self.seam(axis, blocks) for axis in "yx"])
        if kind is not None:
            self.seams.update(dict.fromkeys(blocks, seam))
        canvas = torch.cartesian_prod(*(torch.arange(int(side)) for side in sides))
        request = self.family.around(request, ((canvas - seam) % sides).to(device))
        if view is None:
            return request, None
        stored = torch.cat([self.seams[block].expand(block.cells // patch**2, 2) for block in view.blocks])
        tokens = canvas[torch.cat([self.family.tokens(block, self.width) for block in view.blocks])]
        by = ((tokens - seam) % sides - (tokens - stored) % sides).to(device)
        if not by.any():
            return request, None
        model = unwrapped(self.transformer)
        return request, lambda key: self.family.turned(model, key, by)

    def seam(self, axis: str, blocks: Sequence[Block]) -> int:
        """The row, or column, of tokens from which places are told in a call: on the far side of what is in motion, and
        each time elsewhere where that is the whole circle."""
        if axis not in self.wrap:
            return 0
        rows = axis == "y"
        side = (self.height if rows else self.width) // self.family.patch
        spans = [(b.rows if rows else b.columns) for b in blocks]
        first, last = min(s.start for s in spans) // self.family.patch, max(s.stop for s in spans) // self.family.patch
        if last - first == side:
            return round(self.tick * GOLDEN * side) % side
        return ((first + last - side) // 2) % side

    def prompts(self, request: dict[str, Any], tokens: Tensor, view: View | None) -> tuple[dict[str, Any], Prompts]:
        """The request with each prompt's words where its part of the canvas begins; and the prompts of a call's tokens,
        and of those that memory shows."""
        assert self.places is not None
        if self.weights is None:
            maps = self.places.maps(self.height, self.width)
            self.weights = maps.flatten(1).to(tokens.device)
            owners = maps.argmax(0)
            own = [
                m if (m := owners == i).any() else one == one.amax() for i, one in enumerate(maps)
            ]  # thin parts own none
            owned = [m.nonzero().amin(0) for m in own]
            each = self.places.tokens // len(maps)
            self.corners = torch.stack(owned).repeat_interleave(each, 0).to(tokens.device)
        seen = None
        if view is not None:
            seen = torch.cat([self.family.tokens(block, self.width) for block in view.blocks]).to(tokens.device)
        memory = None if seen is None else self.weights[:, seen]
        prompts = Prompts(self.weights[:, tokens], memory, self.places.pooled_for(request))
        return self.family.moved(request, *self.corners.T), prompts

    def memory(self, states: Tensor) -> Memory:
        """An empty memory, for calls with hidden states like these."""
        plan = self.plan
        return Memory(replace(plan.rule, cap=self.cap), device=self.place_memory(plan, states))

    def layout(
        self, indices: tuple[int, ...], times: tuple[float, ...], device: torch.device
    ) -> tuple[Tensor, Tensor | None, list[float], list[Place]]:
        """Tokens of a call and the level of each, the levels, and where each block's tokens are among them.

        They are grouped by level, in raster order within one: so blocks at one level are, token by token, the
        pipeline's own call on their union.
        """
        levels = list(dict.fromkeys(times))
        ranks = tuple(map(levels.index, times))  # which are together stays as it is for many ticks, the times do not
        question = indices, ranks, device
        if self._layout is None or self._layout[0] != question:
            own = [self.tokens[g] for g in indices]
            counts = [len(t) for t in own]
            level = torch.tensor(ranks).repeat_interleave(torch.tensor(counts))
            tokens = torch.cat(own)
            order = (level * (self.height * self.width) + tokens).argsort()
            places = [as_slice(place, device) for place in order.argsort().split(counts)]
            index = level[order].to(device) if len(levels) > 1 else None
            self._layout = question, tokens[order].to(device), index, places
        _, tokens, index, places = self._layout
        return tokens, index, levels, places

    def place(self, g: int, latents: Tensor) -> Place:
        """Where block g is among the tokens of the canvas."""
        if g not in self._places:
            self._places[g] = as_slice(self.tokens[g], latents.device)
        return self._places[g]

    def blended(self, request: dict[str, Any], *finished: int) -> dict[str, Any]:
        """The request with finished blocks at the level of noise that memory is given."""
        if not self.context_noise:
            return request
        blank = self.family.blank(self.like.expand(len(self.seeds), *self.like.shape[1:]), self.height, self.width)
        for g in finished:
            block, place = self.blocks[g], self.place(g, blank)
            draws = [torch.Generator().manual_seed(block_seed(seed, block)) for seed in self.seeds]
            shape = (1, *self.family.cut(blank, block, place).shape[1:])
            noise = torch.cat([torch.randn(shape, generator=draw, dtype=torch.float32) for draw in draws])
            self.family.paste(blank, block, place, noise.to(blank))
        return self.family.blend(request, blank, self.context_noise)

    def extrapolated(self, request: dict[str, Any]) -> dict[str, Any]:
        """The request with the canvas moved on from the draft's end towards the draft's last guess."""
        share = self.plan.extrapolation
        return self.family.blend(request, self.estimate, share) if share and self.estimate is not None else request

    def guided(self, branch: int, request: dict[str, Any], answer: Tensor, moving: Sequence[int] | None) -> Tensor:
        """Where the two branches are to be joined in another way than the pipeline's, the second one's answer is such
        that the pipeline's formula gives what is wanted: n + s (p - n) = p + (s - 1) d for n = p - d."""
        if not self.projected:
            return answer
        if branch == 0:
            self.positive = answer
            return answer
        groups: dict[float, list[Place]] = {}  # blocks at one level are projected as one
        for g in moving or (0,):
            place = slice(None) if moving is None else self.place(g, answer)
            groups.setdefault(self.times[self.plan.index(self.tick, g)], []).append(place)
        x = request["hidden_states"][:, : answer.shape[1], : answer.shape[2]]
        joined = answer.clone()
        for time, places in groups.items():
            three = x, self.positive, answer
            px, pp, pn = (torch.cat([v[:, place].flatten(1) for place in places], 1) for v in three)
            sigma = time / 1000
            turned = pp - project(px - sigma * pp, pp - pn, sigma)
            for place, part in zip(places, turned.split([answer[0, place].numel() for place in places], 1)):
                joined[:, place] = part.unflatten(1, answer[0, place].shape)
        return joined

    def two_answers(self, pictures: int) -> Sequence[Tensor]:
        """This tick's answers to the prompt and to its negative, be it in two calls or in one; nothing without both."""
        if len(self.answers) == 1 and len(self.answers[0]) == 2 * pictures:
            return self.answers[0].chunk(2)
        return self.answers if len(self.answers) == 2 else ()

    # What the scheduler is asked.

    def step(self, output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any) -> Any:
        """A tick's end: every block in motion is stepped, by a copy of the scheduler."""
        plan, family, k = self.plan, self.family, self.tick
        self.like = sample[:1]
        if self.begun is not None and k == plan.first:
            sample = self.begun.to(sample)
        ends = k == self.draft - 1 and not plan.alone
        if (ends or k == self.draft - 2) and (plan.late or plan.extrapolation):
            before, self.estimate = self.estimate, sample - self.times[k] / 1000 * output.to(sample)
        if k < self.draft:
            moving: Sequence[int] = plan.moving(k)
            drawn = not plan.alone or self.named  # else as the pipeline draws by itself
            with self.draws(None, sample, options) if drawn else nullcontext():
                result = self.scheduler.stepper.step(output, timestep, sample, *args, **options)
            new = result[0]
        else:
            moving = plan.moving(k)
            new, options = sample.clone(), options | {"return_dict": False}
            for g in moving:
                block, place = self.blocks[g], self.place(g, sample)
                stepper = self.stepper(g, sample)
                part, guess = family.cut(sample, block, place), family.cut(output, block, place)
                with self.draws(g, part, options):
                    (part,) = stepper.step(guess, self.steps[plan.index(k, g)], part, *args, **options)[:1]
                family.paste(new, block, place, part)
            result = (new,)
        if self.given is not None:
            new = self.hold(new)
            result = (new,)
        if self.on_tick is not None:
            self.show(moving, output, sample)
        if ends and plan.late:
            both = (
                [family.cut(answer, block, self.place(g, sample)) for g, block in enumerate(self.blocks)]
                for answer in self.two_answers(len(sample)) or (before, self.estimate)
            )
            self.arrange(plan.decided(difficulty(*both)))
        self.latents = new
        if self.tick == plan.ticks - 1 and not new.isfinite().all():
            raise ValueError(
                "the picture is not finite, as it may be in float16, or where cfg is far too high: take a wider dtype, "
                "such as bfloat16, or a smaller cfg"
            )
        self.turn(moving)
        if self.bar is not None:
            type(self.bar).update(self.bar)
        if k < self.draft and self.given is None:
            return result
        return result if options.get("return_dict") is False else SchedulerOutput(prev_sample=new)

    def hold(self, latents: Tensor) -> Tensor:
        """What is given, as it is; where it lies in a block that is drawn, at that block's next level of noise."""
        plan, family, held = self.plan, self.family, latents.clone()
        known = self.known.expand_as(latents)
        for g in self.pieces:
            block, place = self.blocks[g], self.place(g, latents)
            family.paste(held, block, place, family.cut(known, block, place))
        for g in self.partly:
            block, place = self.blocks[g], self.place(g, latents)
            i = plan.index(self.tick + 1, g)
            sigma = self.times[i] / 1000 if i < plan.steps else 0.0
            x, z, noise, mask = (family.cut(v, block, place) for v in (held, known, self.first, self.mask))
            family.paste(held, block, place, torch.where(mask, (1 - sigma) * z + sigma * noise, x))
        return held

    def turn(self, moving: Sequence[int]) -> None:
        """On to the next tick: who is finished, and who starts?"""
        plan = self.plan
        self.tick += 1
        self.branch, self.starting, self.finished, self.answers = 0, None, [], []
        if plan.alone or self.tick < self.draft:
            return
        done = [g for g in moving if plan.index(self.tick, g) == plan.steps]
        for g in done:
            self.steppers.pop(g, None)
        if done and plan.commits:
            self.finished = [g for g in done if g < len(self.blocks) - 1]  # nobody comes after the last
        following = plan.moving(self.tick)
        if following and (self.tick == self.draft or following[-1] not in moving):
            self.starting = following[-1], next(self.arrivals)

    def stepper(self, g: int, sample: Tensor) -> Any:
        """Block g's own scheduler: the draft's, with what it remembers of the canvas cut to the block."""
        if g not in self.steppers:
            block, place = self.blocks[g], self.place(g, sample)

            def part(value: Any) -> Any:
                if isinstance(value, Tensor) and value.shape == sample.shape:
                    return self.family.cut(value, block, place)
                return [part(v) for v in value] if isinstance(value, list) else value

            twin = self.steppers[g] = copy.copy(self.scheduler.stepper)
            vars(twin).update({name: part(value) for name, value in vars(twin).items()})
        return self.steppers[g]

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """What is known of a picture, noised to the level at which each block stands."""
        levels, stepper = self.scheduler.levels, self.scheduler.stepper  # a multistep solver cannot, its levels can
        if self.tick <= self.draft:
            return levels.scale_noise(sample, timestep, noise)
        plan, family, noised = self.plan, self.family, sample.clone()
        for g, block in enumerate(self.blocks):
            i, place = plan.index(self.tick, g), self.place(g, sample)
            if i < plan.steps:
                noiser = self.steppers.get(g, stepper) if levels is stepper else levels
                parts = family.cut(sample, block, place), self.steps[i : i + 1], family.cut(noise, block, place)
                family.paste(noised, block, place, noiser.scale_noise(*parts))
        return noised

    @contextmanager
    def draws(self, g: int | None, part: Tensor, options: dict[str, Any]) -> Iterator[None]:
        """What a scheduler draws while it steps block g (None: the canvas) comes from the generators' seeds and the
        block alone; with no generator, from the default random state, as the pipeline's own steps do."""
        if not self.generated:
            yield
            return
        block = None if g is None else self.blocks[g]
        if g not in self._draws:
            seeds = [seed if block is None else block_seed(seed, block) for seed in self.seeds]
            self._draws[g] = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
        draws = self._draws[g]
        if self.scheduler.takes_generator:
            options["generator"] = draws[0] if len(draws) == 1 else draws
            yield
            return
        with torch.random.fork_rng(devices=[part.device] if part.device.type == "cuda" else []):
            torch.manual_seed(int(torch.randint(2**62, (), generator=draws[0])))
            yield

    # What is shown.

    def show(self, moving: Sequence[int], output: Tensor, sample: Tensor) -> None:
        plan, family = self.plan, self.family
        assert self.on_tick is not None
        if self.guess is None:
            self.guess = sample.clone()
        sigmas = [self.times[plan.index(self.tick, g)] / 1000 for g in moving]
        if self.tick < self.draft:
            self.guess = sample - sigmas[0] * output.to(sample)
        else:
            for g, sigma in zip(moving, sigmas):
                block, place = self.blocks[g], self.place(g, sample)
                x, v = family.cut(sample, block, place), family.cut(output, block, place)
                family.paste(self.guess, block, place, x - sigma * v.to(x))
        if self.given is not None:
            self.guess = torch.where(self.mask, self.known, self.guess)
        cells = functools.partial(family.cells, height=self.height, width=self.width)
        blocks = tuple(self.blocks[g] for g in moving)
        self.on_tick(Tick(self.tick, plan.ticks, blocks, tuple(sigmas), self.guess.clone(), plan, cells))

    @property
    def all_memories(self) -> list[Memory]:
        return [*self.memories, *(self.control.memories if self.control else ())]

    def clear(self) -> None:
        """Free the memory."""
        for memory in self.all_memories:
            memory.clear()


def as_slice(tokens: Tensor, device: torch.device) -> Place:
    """Token numbers as a slice where they follow one another, else on the device."""
    first, last = int(tokens[0]), int(tokens[-1])
    if last - first + 1 == len(tokens) and bool((tokens[1:] > tokens[:-1]).all()):
        return slice(first, last + 1)
    return tokens.to(device)
