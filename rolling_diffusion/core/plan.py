"""Plans: which block stands at which step, in which tick. One formula, evaluated when asked.

With S steps, D draft steps and lag L, block g stands after k ticks at step index

    i(k, g) = k                                  for k <= D
    i(k, g) = D + clamp(k - D - g*L, 0, S - D)   for k >  D

L = 0 is ordinary diffusion of the whole canvas, L = S - D is block-autoregressive, between them the noise rolls. A
window of W cells that advances by b cells fixes the rest: blocks are b thick (strips, or b × b tiles) and

    L = max(1, round((S - D) * (b / W)**k)),     k = 1 for strips, 2 for tiles,

rounded up where rounding down would set more blocks in motion than the ceil((W / b)**k) that a window touches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

from .cost import Cost, count
from .order import (
    Block,
    Found,
    Order,
    RestOrder,
    Walk,
    check_given,
    make_order,
    numbered,
    rest_of,
    route_of,
    share,
    span,
    whole,
)
from .rule import Rule


@dataclass(frozen=True)
class Plan:
    """An immutable table of steps over ticks and blocks. Sizes are in cells; make one with `make_plan`.

    order: a name, a function from a grid to a path, or the blocks themselves; `blocks` has them in any case.
    given: parts of the canvas that are finished from the start, and seen as finished blocks are.
    guide: height and width of a smaller picture, which is drawn first, enlarged, and taken in place of the draft.
    """

    height: int
    width: int
    steps: int
    order: str | Walk | tuple[Block, ...]
    window: int
    overlap: int
    draft: int
    lookahead: int | None
    seed: int
    lag: int
    multiple: int
    persistence: float
    extrapolation: float = 0.0
    given: tuple[Block, ...] = ()
    guide: tuple[int, int] | None = None

    @property
    def first(self) -> int:
        """The first tick: that after the draft, if a guide takes its place."""
        return self.draft if self.guide and not self.alone else 0

    @property
    def blocks(self) -> Order:
        return self._blocks

    @cached_property
    def pieces(self) -> tuple[Block, ...]:
        """What is given and lies in no block, in pieces that memory can tell apart, numbered after the blocks.

        A block of which a part is given is drawn, and that part of it is held."""
        return tuple(self._blocks.pieces) if isinstance(self._blocks, RestOrder) else ()

    @cached_property
    def _blocks(self) -> Order:
        own = isinstance(self.order, tuple)  # blocks that were given lie where they lie
        rest = rest_of(() if own else self.given, self.height, self.width)
        covered = self.window >= span(self.order, rest.height, rest.width)
        size = max(rest.height, rest.width) if covered else self.window - self.overlap
        order = make_order(self.order, rest.height, rest.width, size, self.seed, self.multiple)
        return RestOrder(self.height, self.width, order, rest.top, rest.left, self.given) if self.given else order

    @property
    def size(self) -> int:
        """Thickness of a block: what the window advances by, or the whole canvas if the window covers it; of blocks
        that were given, that of the thickest."""
        return self.blocks.size

    @property
    def rule(self) -> Rule:
        """Which blocks in memory those in motion see."""
        return Rule(self.persistence, self.lookahead, self.size, onward=self.blocks.onward)

    @property
    def alone(self) -> bool:
        """True if this is ordinary diffusion: one block, or all of them at one level."""
        return self.lag == 0 or len(self.blocks) == 1

    @property
    def late(self) -> bool:
        """Is the order decided at the end of the draft? Until then `blocks` go a way that serves to count with: how
        many they are, how large, and when each place in the order has its turn, stays as it is; the cost is that of
        such a way, which for a lookahead over the whole canvas and a persistence of 1 is any way's."""
        return isinstance(self.order, str) and route_of(self.order).late and not self.alone

    def decided(self, difficulty: Sequence[float]) -> Plan:
        """The plan in its decided order: easy blocks first, and among equals as before.

        difficulty: a number for each of `blocks`. A block may have another place in the new plan, and so an index.
        """
        assert isinstance(self.order, str)
        rest = rest_of(self.given, self.height, self.width)
        across = -(-rest.width // self.size)
        ordered = [self.blocks[g] for g in sorted(range(len(self.blocks)), key=difficulty.__getitem__)]
        path = [(b.top - rest.top) // self.size * across + (b.left - rest.left) // self.size for b in ordered]
        path += sorted({*range(-(-rest.height // self.size) * across)} - {*path})  # those that are given
        return replace(self, order=Found(self.order, tuple(path)))

    @property
    def capacity(self) -> int:
        """Most blocks in motion at once, after the draft."""
        return len(self.blocks) if self.alone else min(len(self.blocks), -(-(self.steps - self.draft) // self.lag))

    @property
    def waits(self) -> bool:
        """True if waiting blocks are kept in memory."""
        return self.rule.stores("waiting") and not self.alone

    @property
    def commits(self) -> bool:
        """True if finished blocks are kept in memory."""
        return self.rule.stores("finished") and not self.alone

    def index(self, k: int, g: int) -> int:
        """The step index of block g after k ticks."""
        if k <= self.draft:
            return k
        return self.draft + min(max(k - self.draft - g * self.lag, 0), self.steps - self.draft)

    def moving(self, k: int) -> range:
        """The blocks that tick k (from 0) takes a step further."""
        if self.alone or k < self.draft:
            return range(len(self.blocks) if k < self.ticks else 0)
        after = k - self.draft
        first = max(0, (after - (self.steps - self.draft)) // self.lag + 1)
        return range(first, min(len(self.blocks), after // self.lag + 1))

    def due(self, moving: int, since: int) -> bool:
        """May the next block start, with so many blocks in motion and so many ticks since the last start?

        The same rule for every sampler, however often it calls the model: lag ticks have passed and the window has
        room. With one call a step this is the formula; with a lag of S - D it is "wait until the predecessor is done".
        """
        return moving == 0 or (since >= self.lag and moving < self.capacity)

    def start(self, g: int, draft: int | None = None, run: int | None = None) -> int:
        """The tick in which block g starts. `draft` and `run` are the model calls that the draft, and then a block,
        take; they need to be given for samplers that call the model more than once a step."""
        draft = self.draft if draft is None else draft
        run = self.steps - self.draft if run is None else run
        if self.alone:
            return 0
        turn, seat = divmod(g, self.capacity)
        return draft + turn * max(run, self.capacity * self.lag) + seat * self.lag

    @property
    def ticks(self) -> int:
        return self.steps + (len(self.blocks) - 1) * self.lag

    def arrivals(self) -> Iterator[Sequence[int]]:
        """For each block in order: the waiting blocks that come within reach as it starts, to be stored in one call.

        No block is named twice. The starting block comes along where it is not stored yet: the others see it.
        """
        return (self.arriving(g) for g in range(len(self.blocks)))

    def arriving(self, g: int) -> Sequence[int]:
        """Those that come within reach as block g starts: block g is the first whose window of sight they enter."""
        if not self.waits:
            return ()
        if self.lookahead is None:
            return () if g else range(len(self.blocks))
        near = self.blocks.near(self.blocks[g], self.lookahead)
        new = [i for i in near if i >= g and self.blocks.earliest(i, self.lookahead) == g]
        return () if new == [g] else new

    def table(self) -> tuple[tuple[int, ...], ...]:
        """Step indices, one row per tick from 0 (nothing done) to `ticks`, one column per block."""
        return tuple(tuple(self.index(k, g) for g in range(len(self.blocks))) for k in range(self.ticks + 1))

    def tokens(self, block: Block) -> int:
        return block.cells // self.multiple**2

    def cost(self, text_tokens: int = 0, cap: int | None = None) -> Cost:
        """Predicted cost; `cap` is the most tokens that memory shows. See `Cost` for what is counted."""
        return count(self, text_tokens, cap)

    def __str__(self) -> str:
        cost = self.cost()
        reach = "the whole canvas" if self.lookahead is None else f"{self.lookahead} cells"
        late = ", decided at the end of the draft" if self.late else ""
        known = f", {sum(part.cells for part in self.given) / (self.height * self.width):.0%} of it given"
        rows = {
            "canvas": f"{self.height} × {self.width} cells{known if self.given else ''}, "
            f"{len(self.blocks)} blocks {self.blocks.name}{late}",
            "window": f"{self.window} cells, advancing by {self.window - self.overlap}, looking ahead {reach}",
            "steps": f"{self.steps}, of them {self.draft} draft; lag {self.lag}, at most {self.capacity} in motion",
            "calls": f"{cost.ticks} ticks + {cost.waiting_calls} for waiting blocks + {cost.commits} commits"
            + (f" + {cost.guide} for a guide of {self.guide[0]} × {self.guide[1]} cells" if self.guide else ""),
            "tokens": f"{cost.tokens_per_tick:.0f} a tick, at most {cost.peak_moving_tokens} in motion "
            f"and {cost.peak_visible_tokens} visible",
            "cost": f"{cost.token_evaluations} token evaluations, {cost.relative:.2f} of a full pass",
        }
        return "\n".join(f"{name:<8}{text}" for name, text in rows.items())


def make_plan(
    height: int,
    width: int,
    steps: int | Sequence[float],
    order: str | Walk | Sequence[Block] = "top-to-bottom",
    window: int = 64,
    overlap: int = 16,
    draft: int = 0,
    lookahead: int | None = None,
    seed: int = 0,
    lag: int | str | None = None,
    multiple: int = 2,
    persistence: float = 1.0,
    extrapolation: float = 0.0,
    given: Sequence[Block] = (),
    guide: tuple[int, int] | None = None,
) -> Plan:
    """The plan for a height × width canvas (cells) and `steps` steps, or the sigmas themselves.

    order: a name in ORDERS; a function like those, from a grid to a path over tiles; or the blocks themselves, disjoint
    and together the whole canvas. "difficulty" is decided at the end of a draft of at least 2 steps: first the tiles
    whose guessed picture has come to rest (`Plan.late` says what is counted until then). window, overlap: in cells,
    multiples of `multiple` (the side of a token); the window advances by their difference (over given blocks: by the
    thickest). draft: steps that all blocks take together first. lookahead: cells ahead that waiting blocks are seen;
    None for the whole canvas, 0 for none. seed: for orders that draw. lag: ticks between blocks; None for the formula,
    "autoregressive" to wait for the predecessor, 0 for ordinary diffusion. persistence: attention weight that finished
    blocks keep per block of distance. extrapolation: share of its noise that a waiting block is remembered without: its
    keys are those of the draft's state moved on so far, along the draft's own velocity, towards the draft's last guess
    (the look-ahead of Patch Forcing); 0 is the draft's state. given: disjoint parts of the canvas that are
    finished from the start; the order goes over the rectangle that holds the rest. guide: height and width of a smaller
    picture that takes the place of the draft.

    ValueError, in one sentence, for what does not fit together.
    """
    steps = count_steps(steps)
    multiple = whole("multiple", multiple, 1, "cells")
    height, width, window = (
        whole(what, value, unit="cells") for what, value in {"height": height, "width": width, "window": window}.items()
    )
    for what, value in {"height": height, "width": width, "window": window}.items():
        if value < multiple or value % multiple:
            raise ValueError(f"{what} is {value} cells, and must be a positive multiple of {multiple}")
    overlap = whole("overlap", overlap, unit="cells")
    if not 0 <= overlap < window or overlap % multiple:
        raise ValueError(
            f"overlap is {overlap} cells, and must be a multiple of {multiple} from 0 to below the window of {window}"
        )
    draft, seed = check_draft(draft, steps), whole("seed", seed)
    rule = Rule(persistence, lookahead)
    if isinstance(order, str):
        route_of(order)
    elif not callable(order):
        order = numbered(order)
    run = steps - draft
    lag = whole("lag", lag, unit="ticks") if lag is not None and not isinstance(lag, str) else lag
    plan = Plan(
        height, width, steps, order, window, overlap, draft, rule.lookahead, seed, run, multiple, rule.persistence,
        share("extrapolation", extrapolation), check_given(given, height, width, multiple),
        None if guide is None else _check_guide(guide, height, width, multiple),
    )  # fmt: skip
    if callable(order):
        plan.blocks[0]  # its path is checked now
    if lag is None:
        advance = plan.size if isinstance(order, tuple) else window - overlap
        lag = _lag(run, min(Fraction(advance, window), Fraction(1)) ** (2 if plan.blocks.tiled else 1))
    elif lag == "autoregressive":
        lag = run
    if isinstance(lag, str) or not 0 <= lag <= run:
        raise ValueError(f'lag is {lag!r}, and must be from 0 to {run} (steps - draft), "autoregressive", or None')
    plan = replace(plan, lag=lag)
    if plan.late and draft < 2:
        raise ValueError(
            f"draft is {draft} steps, and the order {order!r} needs at least 2: it is decided by what changes in the "
            "guessed picture in the last of them"
        )
    if plan.extrapolation and plan.waits and not draft:
        raise ValueError(
            f"extrapolation is {extrapolation}, and needs a draft of at least 1 step, for it goes on from there"
        )
    if plan.late and plan.first:
        raise ValueError(
            f"a guide takes the place of the draft, in which the order {order!r} is decided: leave one out"
        )
    return plan


def count_steps(steps: int | Sequence[float]) -> int:
    """The number of steps, given as it is or as S + 1 sigmas; ValueError unless it is at least 1."""
    return whole("steps", len(steps) - 1 if hasattr(steps, "__len__") else steps, 1)  # type: ignore


def check_draft(draft: int, steps: int) -> int:
    """ValueError unless a draft of so many steps leaves at least one."""
    draft = whole("draft", draft, unit="steps")
    if not 0 <= draft < steps:
        raise ValueError(f"draft is {draft} steps, and must be from 0 to {steps - 1}, one less than the steps")
    return draft


def _check_guide(guide: tuple[int, int], height: int, width: int, multiple: int) -> tuple[int, int]:
    """ValueError unless it is a smaller picture of whole tokens."""
    down, across = (whole(f"the guide's {side}", n, multiple, "cells") for side, n in zip(("height", "width"), guide))
    if down % multiple or across % multiple or down * across >= height * width:
        raise ValueError(
            f"the guide is {down} × {across} cells, and must be smaller than the canvas of {height} × {width}, in "
            f"multiples of {multiple}"
        )
    return down, across


def _lag(run: int, share: Fraction) -> int:
    """Ticks between blocks that are such a share of the window, so that those in motion fill it and no more."""
    lag = max(1, round(run * share))
    return lag if -(-run // lag) <= math.ceil(1 / share) else math.ceil(run * share)
