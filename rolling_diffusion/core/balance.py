"""Words keep their weight: where more image tokens are seen than a model was trained beside, its text is louder.

DESIGN.md, "words keep their weight", says why; a card's `balanced_tokens` says beside how many it was trained.
"""

from __future__ import annotations

import math

from .memory import View
from .plan import Plan


def outgrown(plan: Plan, balanced: int | None, patch: int, *, guiding: bool = False) -> bool:
    """Whether a canvas rolls and has more than the balanced tokens, each of patch × patch cells; balanced None: never.

    One block of ordinary sampling stays as it is, unless something is given, or it is `guiding` a canvas that rolls.
    """
    rolls = guiding or not plan.alone or bool(plan.pieces)
    return balanced is not None and rolls and plan.height * plan.width > balanced * patch**2


def loudness(tokens: int, view: View | None, balanced: int) -> float:
    """What is added to the attention logits of the text in a call on so many image tokens, beside what is in view: log
    n where it sees n times the balanced ones, as if each word were said n times. Memory is counted by its weight."""
    return max(0.0, math.log((tokens + (0 if view is None else view.weight)) / balanced))
