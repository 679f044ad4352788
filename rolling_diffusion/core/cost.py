"""What a plan costs: calls, tokens and query-key pairs, counted from the formula without running anything."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import sub
from typing import Protocol

from .order import Block, Order, whole
from .rule import Kind, Rule

WORK = 2**21  # neighbours looked at in a count, about; a second or two
FEWEST, MOST = 32, 8192  # turns that are counted, however much or little there is to look at in each
MANY = 2**20  # blocks that are not even gone through one by one


@dataclass(frozen=True)
class Cost:
    """What a plan costs with a sampler that calls the model once a step.

    ticks                joint calls that move blocks, draft included
    waiting_calls        calls that store waiting blocks (one, if the lookahead covers the canvas)
    commits              calls that store a finished block (all but the last; none at persistence 0), and one that
                         stores what is given
    tokens_per_tick      mean tokens computed in a tick, text included
    peak_moving_tokens   most image tokens in motion after the draft; a draft moves the whole canvas
    peak_visible_tokens  most tokens attended to after the draft: text, in motion, finished and waiting in memory
    token_evaluations    tokens computed in all calls, text included in each
    relative             token_evaluations against a full pass, which is `steps` calls of the whole canvas and the text
    pairs                query-key pairs that attention computes in all calls, in one head of one layer
    guide                calls for the guide, on its own small canvas

    A plan of more than 8192 blocks, or of hundreds of tiles that see hundreds each, is counted by a sample: turns of
    the first and the last blocks, and pairs of turns evenly strewn between. For strips that is exact, but for a bend
    where memory fills up to its cap. For tiles, pairs and peak_visible_tokens are then estimates, and beyond a million
    blocks waiting_calls, token_evaluations and relative too.
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
    guide: int = 0

    @property
    def calls(self) -> int:
        """Calls of the model, whatever for."""
        return self.ticks + self.waiting_calls + self.commits + self.guide


class Schedule(Protocol):
    """What is counted of a plan; `Plan` says what its parts mean."""

    @property
    def steps(self) -> int: ...
    @property
    def draft(self) -> int: ...
    @property
    def lag(self) -> int: ...
    @property
    def multiple(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def blocks(self) -> Order: ...
    @property
    def pieces(self) -> Sequence[Block]: ...
    @property
    def rule(self) -> Rule: ...
    @property
    def alone(self) -> bool: ...
    @property
    def waits(self) -> bool: ...
    @property
    def commits(self) -> bool: ...
    @property
    def capacity(self) -> int: ...
    @property
    def ticks(self) -> int: ...
    @property
    def first(self) -> int: ...
    @property
    def guide(self) -> tuple[int, int] | None: ...
    def moving(self, k: int) -> range: ...
    def arriving(self, g: int) -> Sequence[int]: ...


@lru_cache(8)
def count(plan: Schedule, text_tokens: int, cap: int | None) -> Cost:
    """`Plan.cost`."""
    return _Count(plan, whole("text_tokens", text_tokens, 0), replace(plan.rule, cap=cap)).cost()


class _Count:
    def __init__(self, plan: Schedule, text: int, rule: Rule):
        self.plan, self.text, self.rule, self.blocks = plan, text, rule, plan.blocks
        self.kinds: list[Kind] = [*(["finished"] if plan.commits else []), *(["waiting"] if plan.waits else [])]
        ends = list(map(self.before, range(len(self.blocks) + 1))) if len(self.blocks) <= MANY else []
        sizes = list(map(sub, ends[1:], ends))
        self.size = sizes.__getitem__ if sizes else lambda g: self.before(g + 1) - self.before(g)
        reaches = [reach for reach in map(rule.within, self.kinds) if reach]
        middle = self.blocks[len(self.blocks) // 2]
        around = 1 + sum(len(self.blocks.near(middle, reach)) for reach in reaches)
        self.most = min(MOST, max(FEWEST, WORK // (around * plan.capacity)))
        self.count = -(-(plan.ticks - plan.draft) // (plan.lag or 1))  # turns
        self.near = lru_cache(max(64, WORK // (8 * around)))(lambda g, cells: self.blocks.near(self.blocks[g], cells))
        stored = rule.stores("finished")
        self.given = {piece: piece.cells // plan.multiple**2 for piece in (plan.pieces if stored else ())}

    def cost(self) -> Cost:
        plan, drawn = self.plan, self.before(len(self.blocks))
        commits = len(self.blocks) - 1 if plan.commits else 0
        given = sum(self.given.values())
        seen = self.capped(self.seen_given(range(len(self.blocks))))  # by all that is drawn, together
        if plan.alone:
            turns = _Turn(pairs=plan.steps * self.attend(drawn, seen), moving=drawn, visible=self.text + drawn + seen)
        else:
            turns = self.turns(commits)
            turns.pairs += (plan.draft - plan.first) * self.attend(drawn, seen)
        small = plan.guide[0] * plan.guide[1] // plan.multiple**2 if plan.guide and plan.first else 0
        guiding = plan.steps if small else 0
        turns.pairs += guiding * self.attend(small, 0)
        turns.pairs += self.attend(given, 0) if given else 0
        moved, ticks = (plan.steps - plan.first) * drawn, plan.ticks - plan.first
        kept = turns.stored + self.before(commits) + given
        stores = commits + bool(given)
        evaluations = moved + guiding * small + kept + self.text * (ticks + guiding + turns.calls + stores)
        canvas = plan.height * plan.width // plan.multiple**2
        return Cost(
            ticks=ticks,
            waiting_calls=turns.calls,
            commits=stores,
            tokens_per_tick=moved / ticks + self.text,
            peak_moving_tokens=turns.moving,
            peak_visible_tokens=turns.visible,
            token_evaluations=evaluations,
            relative=evaluations / (plan.steps * (canvas + self.text)),
            pairs=turns.pairs,
            guide=guiding,
        )

    def turns(self, commits: int) -> _Turn:
        """All turns: sums, and the greatest peaks."""
        calls = stored = pairs = 0
        moving = visible = 0
        for g, weight in _sample(self.count, self.most):
            turn = self.turn(g, g < commits)
            calls += weight * turn.calls
            stored += weight * turn.stored
            pairs += weight * turn.pairs
            moving, visible = max(moving, turn.moving), max(visible, turn.visible)
        if len(self.blocks) <= MANY:
            calls, stored = self.arrivals()
            return _Turn(calls, stored, pairs // 2, moving, visible)
        return _Turn(calls // 2, stored // 2, pairs // 2, moving, visible)

    def arrivals(self) -> tuple[int, int]:
        """Calls that store waiting blocks, and tokens in them: exact."""
        blocks, reach = self.blocks, self.rule.within("waiting")
        if "waiting" not in self.kinds or reach is None:
            return self.kinds.count("waiting"), self.before(len(blocks)) * self.kinds.count("waiting")
        first = [blocks.earliest(i, reach) for i in range(len(blocks))]
        calls = {g for i, g in enumerate(first) if g < i}
        return len(calls), self.tokens(i for i, g in enumerate(first) if g < i or i in calls)

    def turn(self, g: int, commits: bool) -> _Turn:
        """From the start of block g, or a lag after the last turn, to the next turn; and g's commit."""
        plan, turn = self.plan, _Turn()
        start = plan.draft + g * plan.lag
        moving, here = range(0), 0
        for k in range(start, min(start + plan.lag, plan.ticks)):
            if plan.moving(k) != moving:
                moving = plan.moving(k)
                seen = self.seen(moving, moving.start, moving.stop)
                here = self.attend(self.tokens(moving), seen)
                if k == start:
                    turn.moving = self.tokens(moving)
                    turn.visible = self.text + turn.moving + seen
            turn.pairs += here
        new = plan.arriving(g) if g < len(self.blocks) else ()
        if new:
            turn.calls, turn.stored = 1, self.tokens(new)
            turn.pairs += self.attend(turn.stored, self.seen_on_arrival(new, g, plan.moving(start).start))
        if commits:  # after its last tick, before another one starts
            end = plan.moving(start + plan.steps - plan.draft - 1)
            turn.pairs += self.attend(self.before(g + 1) - self.before(g), self.seen([g], end.start, end.stop))
        return turn

    def attend(self, tokens: int, seen: int) -> int:
        """Pairs of one call on so many tokens of the image, which memory shows so many others."""
        own = tokens + self.text
        return own * (own + seen)

    def seen(self, blocks: Sequence[int], finished: int, waiting: int) -> int:
        """Tokens that memory shows to blocks: of those before `finished` and of those from `waiting` on."""
        total = 0
        for kind in self.kinds:
            reach = self.rule.within(kind)
            ahead = kind == "waiting"
            if reach is None:
                total += self.before(len(self.blocks)) - self.before(waiting) if ahead else self.before(finished)
            elif reach:
                total += self.tokens(self.around(blocks, reach, waiting if ahead else finished, ahead))
        return self.capped(total + self.seen_given(blocks))

    def seen_given(self, blocks: Sequence[int]) -> int:
        """Tokens of what is given that memory shows to blocks."""
        if not self.given:
            return 0
        reach = self.rule.within("finished")
        if reach is None:
            return sum(self.given.values())
        own = [self.blocks[g] for g in blocks]
        return sum(n for piece, n in self.given.items() if any(block.gap(piece) < reach for block in own))

    def seen_on_arrival(self, new: Sequence[int], g: int, finished: int) -> int:
        """Tokens that memory shows to waiting blocks that are stored as block g starts: also of those stored before."""
        reach = self.rule.within("finished") if "finished" in self.kinds else 0
        total = self.before(finished)
        if reach is not None:
            total = self.tokens(self.around(new, reach, finished, False)) if reach else 0
        ahead = self.rule.within("waiting")
        if ahead is not None:
            total += self.tokens(i for i in self.around(new, ahead, g, True) if self.blocks.earliest(i, ahead) < g)
        return self.capped(total + self.seen_given(new))

    def around(self, blocks: Sequence[int], reach: int, bound: int, ahead: bool) -> set[int]:
        """Blocks near any of these, of those from `bound` on, or before it.

        In a sample, of very many that see very many only some are asked: they see nearly the same.
        """
        found: set[int] = set()
        most = len(blocks) if self.count <= self.most else 1 + 2**17 // len(self.near(blocks[0], reach))
        for g in blocks[:: -(-len(blocks) // most)]:
            near = self.near(g, reach)
            at = bisect_left(near, bound)
            found.update(near[at:] if ahead else near[:at])
        return found

    def tokens(self, blocks: Iterable[int]) -> int:
        if isinstance(blocks, range):
            return self.before(blocks.stop) - self.before(blocks.start)
        return sum(map(self.size, blocks))

    def before(self, g: int) -> int:
        """Tokens of all blocks before g."""
        return self.blocks.cells_before(g) // self.plan.multiple**2

    def capped(self, tokens: int) -> int:
        return tokens if self.rule.cap is None else min(self.rule.cap, tokens)


@dataclass
class _Turn:
    """What happens from the start of a block to that of the next one."""

    calls: int = 0  # that store waiting blocks
    stored: int = 0  # tokens in them
    pairs: int = 0
    moving: int = 0  # tokens, at the start
    visible: int = 0


def _sample(blocks: int, most: int) -> Iterator[tuple[int, int]]:
    """Indices of at most so many blocks, and twice the number of blocks that each of them stands for.

    All of them, or a quarter at either end, and between them pairs that lie evenly about the middle of a stretch: sums
    of what is even, or grows evenly, are exact, and what repeats is not met in step.
    """
    if blocks <= most:
        yield from ((g, 2) for g in range(blocks))
        return
    edge, draw = most // 4, random.Random(0)
    yield from ((g, 2) for g in (*range(edge), *range(blocks - edge, blocks)))
    cuts = [edge + (blocks - 2 * edge) * i // edge for i in range(edge + 1)]
    for low, high in zip(cuts, cuts[1:]):
        aside = draw.randrange(high - low)
        yield from ((low + aside, high - low), (high - 1 - aside, high - low))
