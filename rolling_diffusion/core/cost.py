"""What a plan costs: calls, tokens and query-key pairs, counted from the formula without running anything."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import Plan

FAINT = 1e-3  # finished blocks whose attention weight is below this are dropped from memory


@dataclass(frozen=True)
class Cost:
    """What a plan costs with a sampler that calls the model once a step.

    ticks                joint calls that move blocks, draft included
    waiting_calls        calls that store waiting blocks (one, if the lookahead covers the canvas)
    commits              calls that store a finished block (all but the last; none at persistence 0)
    tokens_per_tick      mean tokens computed in a tick, text included
    peak_moving_tokens   most image tokens in motion after the draft; a draft moves the whole canvas
    peak_visible_tokens  most tokens attended to after the draft: text, in motion, finished and waiting in memory
    token_evaluations    tokens computed in all calls, text included in each
    relative             token_evaluations against a full pass, which is `steps` calls of the whole canvas and the text
    pairs                query-key pairs that attention computes in all calls, in one head of one layer
    """

    ticks: int
    waiting_calls: int
    commits: int
    tokens_per_tick: float
    peak_moving_tokens: int
    peak_visible_tokens: int
    token_evaluations: int
    relative: float
    pairs: int


def count(plan: Plan, text_tokens: int, cap: int | None) -> Cost:
    """`Plan.cost`."""
    return _Count(plan, text_tokens, cap).cost()


class _Count:
    def __init__(self, plan: Plan, text: int, cap: int | None):
        self.plan, self.text, self.cap = plan, text, cap
        self.ends = list(accumulate(map(plan.tokens, plan.blocks), initial=0))  # ends[g]: tokens of the blocks before g

    def cost(self) -> Cost:
        plan, ends = self.plan, self.ends
        blocks = len(plan.blocks)
        arrivals = [new for new in plan.arrivals() if new]
        commits = blocks - 1 if plan.commits else 0
        moved = plan.steps * ends[-1]
        kept = sum(self.tokens(new) for new in arrivals) + ends[commits]
        evaluations = moved + kept + self.text * (plan.ticks + len(arrivals) + commits)

        peak_moving = peak_visible = 0
        for g in [0] if plan.alone else range(blocks):
            moving = plan.moving(plan.start(g))
            here = self.tokens(moving)
            peak_moving = max(peak_moving, here)
            peak_visible = max(peak_visible, self.text + here + self.stored(moving, moving))
        return Cost(
            ticks=plan.ticks,
            waiting_calls=len(arrivals),
            commits=commits,
            tokens_per_tick=moved / plan.ticks + self.text,
            peak_moving_tokens=peak_moving,
            peak_visible_tokens=peak_visible,
            token_evaluations=evaluations,
            relative=evaluations / (plan.steps * (ends[-1] + self.text)),
            pairs=self.pairs(commits),
        )

    def pairs(self, commits: int) -> int:
        plan = self.plan
        total = (plan.steps if plan.alone else plan.draft) * self.attend(range(len(plan.blocks)), 0)
        moving, here = range(0), 0
        for k in range(plan.draft, 0 if plan.alone else plan.ticks):
            if plan.moving(k) != moving:
                moving = plan.moving(k)
                here = self.attend(moving, self.stored(moving, moving))
            total += here
        known: set[int] = set()  # waiting blocks in memory
        for g, new in enumerate(plan.arrivals()):
            if new:
                finished = self.finished(new, plan.moving(plan.start(g)).start)
                others = self.near(new, plan.lookahead) & known if plan.lookahead is not None else set()
                total += self.attend(new, self.shown(finished + self.tokens(others - set(new))))
                known.update(new)
            known.discard(g)
        for g in range(commits):  # a block is committed after its last tick, before another one starts
            last = plan.moving(plan.start(g) + plan.steps - plan.draft - 1)
            total += self.attend([g], self.stored([g], last))
        return total

    def attend(self, blocks: Iterable[int], stored: int) -> int:
        """Pairs of one call on these blocks, which memory shows so many tokens."""
        own = self.tokens(blocks) + self.text
        return own * (own + stored)

    def tokens(self, blocks: Iterable[int]) -> int:
        if isinstance(blocks, range):
            return self.ends[blocks.stop] - self.ends[blocks.start]
        return sum(self.ends[i + 1] - self.ends[i] for i in blocks)

    def stored(self, blocks: Iterable[int], moving: range) -> int:
        """Tokens that memory shows to blocks while those of `moving` have started and are not finished."""
        return self.shown(self.finished(blocks, moving.start) + self.waiting(blocks, moving.stop))

    def shown(self, tokens: int) -> int:
        return tokens if self.cap is None else min(self.cap, tokens)

    def finished(self, blocks: Iterable[int], stop: int) -> int:
        """Tokens of finished blocks, those before `stop`, that `blocks` see."""
        plan = self.plan
        if not plan.commits:
            return 0
        if plan.persistence == 1:
            return self.ends[stop]
        depth = math.floor(math.log(FAINT) / math.log(plan.persistence))  # p**a >= FAINT up to this distance a
        return self.tokens(i for i in self.near(blocks, depth * plan.size) if i < stop) if depth else 0

    def waiting(self, blocks: Iterable[int], start: int) -> int:
        """Tokens of waiting blocks, those from `start` on, that `blocks` see."""
        if not self.plan.waits:
            return 0
        if self.plan.lookahead is None:
            return self.ends[-1] - self.ends[start]
        return self.tokens(i for i in self.near(blocks, self.plan.lookahead) if i >= start)

    def near(self, blocks: Iterable[int], cells: int | None) -> set[int]:
        """Blocks with fewer than so many cells between them and one of these."""
        assert cells is not None
        return {i for g in blocks for i in self.plan.blocks.near(self.plan.blocks[g], cells)}
