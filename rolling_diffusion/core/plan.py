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
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from .cost import Cost, count
from .order import ORDERS, TILE_ORDERS, Block, Order, make_order, span


@dataclass(frozen=True)
class Plan:
    """An immutable table of steps over ticks and blocks. Sizes are in cells; make one with `make_plan`."""

    height: int
    width: int
    steps: int
    order: str
    window: int
    overlap: int
    draft: int
    lookahead: int | None
    seed: int
    lag: int
    multiple: int
    persistence: float

    @cached_property
    def blocks(self) -> Order:
        return make_order(self.order, self.height, self.width, self.size, self.seed)

    @property
    def size(self) -> int:
        """Thickness of a block: what the window advances by, or the whole canvas if the window covers it."""
        whole = self.window >= span(self.order, self.height, self.width)
        return max(self.height, self.width) if whole else self.window - self.overlap

    @property
    def alone(self) -> bool:
        """True if this is ordinary diffusion: one block, or all of them at one level."""
        return self.lag == 0 or len(self.blocks) == 1

    @property
    def capacity(self) -> int:
        """Most blocks in motion at once, after the draft."""
        return len(self.blocks) if self.alone else min(len(self.blocks), -(-(self.steps - self.draft) // self.lag))

    @property
    def waits(self) -> bool:
        """True if waiting blocks are kept in memory."""
        return self.lookahead != 0 and not self.alone

    @property
    def commits(self) -> bool:
        """True if finished blocks are kept in memory."""
        return self.persistence > 0 and not self.alone

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
        reached: set[int] = set()
        for block in self.blocks:
            new: Sequence[int] = ()
            if self.waits and self.lookahead is None:
                new = range(len(self.blocks)) if block.index == 0 else ()
            elif self.waits and self.lookahead is not None:
                near = self.blocks.near(block, self.lookahead)
                new = [i for i in near if i >= block.index and i not in reached]
                new = () if new == [block.index] else new
                reached.update(new)
                reached.discard(block.index)
            yield new

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
        rows = {
            "canvas": f"{self.height} × {self.width} cells, {len(self.blocks)} blocks {self.order}",
            "window": f"{self.window} cells, advancing by {self.window - self.overlap}, looking ahead {reach}",
            "steps": f"{self.steps}, of them {self.draft} draft; lag {self.lag}, at most {self.capacity} in motion",
            "calls": f"{cost.ticks} ticks + {cost.waiting_calls} for waiting blocks + {cost.commits} commits",
            "tokens": f"{cost.tokens_per_tick:.0f} a tick, at most {cost.peak_moving_tokens} in motion "
            f"and {cost.peak_visible_tokens} visible",
            "cost": f"{cost.token_evaluations} token evaluations, {cost.relative:.2f} of a full pass",
        }
        return "\n".join(f"{name:<8}{text}" for name, text in rows.items())


def make_plan(
    height: int,
    width: int,
    steps: int | Sequence[float],
    order: str = "top-to-bottom",
    window: int = 64,
    overlap: int = 16,
    draft: int = 0,
    lookahead: int | None = None,
    seed: int = 0,
    lag: int | str | None = None,
    multiple: int = 2,
    persistence: float = 1.0,
) -> Plan:
    """The plan for a height × width canvas (cells) and `steps` steps, or the sigmas themselves.

    window, overlap: in cells, multiples of `multiple` (the side of a token); the window advances by their difference.
    draft: steps that all blocks take together first. lookahead: cells ahead that waiting blocks are seen; None for the
    whole canvas, 0 for none. seed: for the order "random". lag: ticks between blocks; None for the formula,
    "autoregressive" to wait for the predecessor, 0 for ordinary diffusion. persistence: attention weight that finished
    blocks keep per block of distance.
    """
    steps = steps if isinstance(steps, int) else len(steps) - 1
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}: choose one of {', '.join(ORDERS)}")
    if multiple < 1:
        raise ValueError(f"multiple is {multiple} cells, and must be at least 1")
    for what, value in {"height": height, "width": width, "window": window}.items():
        if value < multiple or value % multiple:
            raise ValueError(f"{what} is {value} cells, and must be a positive multiple of {multiple}")
    if not 0 <= overlap < window or overlap % multiple:
        raise ValueError(
            f"overlap is {overlap} cells, and must be a multiple of {multiple} from 0 to below the window of {window}"
        )
    if steps < 1:
        raise ValueError(f"steps is {steps}, and must be at least 1")
    if not 0 <= draft < steps:
        raise ValueError(f"draft is {draft} steps, and must be from 0 to {steps - 1}, one less than the steps")
    if lookahead is not None and lookahead < 0:
        raise ValueError(f"lookahead is {lookahead} cells, and must be 0 or more, or None for the whole canvas")
    if not 0 <= persistence <= 1:
        raise ValueError(f"persistence is {persistence}, and must be from 0 to 1")
    run = steps - draft
    if lag is None:
        lag = _lag(run, window, overlap, 2 if order in TILE_ORDERS else 1)
    elif lag == "autoregressive":
        lag = run
    if not isinstance(lag, int) or not 0 <= lag <= run:
        raise ValueError(f'lag is {lag!r}, and must be from 0 to {run} (steps - draft), "autoregressive", or None')
    return Plan(height, width, steps, order, window, overlap, draft, lookahead, seed, lag, multiple, persistence)


def _lag(run: int, window: int, overlap: int, axes: int) -> int:
    """Ticks between blocks, so that the blocks in motion fill the window and no more."""
    share = Fraction(window - overlap, window) ** axes
    lag = max(1, round(run * share))
    return lag if -(-run // lag) <= math.ceil(1 / share) else math.ceil(run * share)
