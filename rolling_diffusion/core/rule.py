"""The rule of sight: which blocks in memory a block in motion sees, and with what weight.

Memory acts on it, and a plan's cost is counted by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .order import Block, share, whole

FAINT = 1e-3  # finished blocks whose attention weight is below this are not seen

Kind = str  # of a block in memory: "finished" or "waiting"


@dataclass(frozen=True)
class Rule:
    """Who sees whom.

    persistence  a finished block's unnormalised attention weight is persistence**a, a being its distance to the nearest
                 block in motion, in blocks: for strips that is its age. Below FAINT it is not seen.
    lookahead    waiting blocks weigh 1, and are seen when fewer than so many cells (None: any number) lie between them
                 and a block in motion
    size         cells a block of distance; None: as thick as the first block that is stored
    cap          most tokens that are seen, None for all: of the first `sinks` blocks of the order, then of the nearest
    onward       the order leaves each block for good: finished blocks that are out of sight may be forgotten

    ValueError, in one sentence, for what these may not be.
    """

    persistence: float = 1.0
    lookahead: int | None = None
    size: int | None = None
    cap: int | None = None
    sinks: int = 1
    onward: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "persistence", share("persistence", self.persistence))
        for name, least in (("lookahead", 0), ("size", 1), ("cap", 0), ("sinks", 0)):
            value = getattr(self, name)
            if value is None and name != "sinks":
                continue
            unit = "" if name == "sinks" else "tokens" if name == "cap" else "cells"
            object.__setattr__(self, name, whole(name, value, least, unit))

    def stores(self, kind: Kind) -> bool:
        """Whether blocks of this kind are kept in memory at all; if not, nothing need be computed for it."""
        if kind not in ("finished", "waiting"):
            raise ValueError(f'memory knows "finished" and "waiting" blocks, not {kind!r}')
        return (self.persistence >= FAINT if kind == "finished" else self.lookahead != 0) and self.cap != 0

    def within(self, kind: Kind) -> int | None:
        """A block of this kind is seen with fewer than so many cells between it and a block in motion; None: always."""
        if kind == "waiting":
            return self.lookahead
        if self.persistence in (0, 1):
            return None if self.persistence else 0
        most = math.floor(math.log(FAINT) / math.log(self.persistence))  # the largest a with persistence**a >= FAINT
        return (most - 1) * (self.size or 1) + 1 if most else 0

    def distance(self, gap: int) -> int:
        """In blocks, of two blocks with so many cells between them."""
        return math.ceil(gap / (self.size or 1)) + 1

    def bias(self, kind: Kind, gap: int) -> float:
        """What is added to the attention logits: the logarithm of the weight."""
        return self.distance(gap) * math.log(self.persistence) if kind == "finished" else 0.0

    def rank(self, kind: Kind, block: Block, gap: int) -> tuple[bool, int, int]:
        """Under a cap the lowest are seen: sinks, then the nearest, then the latest of the order."""
        return not (kind == "finished" and block.index < self.sinks), self.distance(gap), -block.index
