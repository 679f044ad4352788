"""Cards: what a model should be sampled with when the caller does not say. Kept as "rolling" in model_index.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..core.plan import DRAFT, draft_steps

TEXT_LEVELS = ("max", "mean", "min")


@dataclass(frozen=True)
class Card:
    """A model's own defaults. Those here are FLUX.1-dev's: a model that never saw staggered noise.

    trained              whether it was trained for rolling
    draft                share of the steps that all blocks take together
    text_level           noise level that the text takes: "max", "mean" or "min" of the levels in the call
    context_noise        noise level of the blocks that are committed to memory
    size                 pixels a side
    steps                of the sampler
    guidance             the embedded guidance of a distilled model
    cfg                  classifier-free guidance; None: none
    max_sequence_length  tokens of the prompt
    window, overlap      cells; window None: half of the canvas, advancing in quarters
    native_tokens        image tokens up to which a block sees the whole canvas by default
    memory_tokens        most tokens that are attended to in memory
    """

    trained: bool = False
    draft: float = DRAFT
    text_level: str = "max"
    context_noise: float = 0.0
    size: int = 1024
    steps: int = 28
    guidance: float = 3.5
    cfg: float | None = None
    max_sequence_length: int = 512
    window: int | None = 64
    overlap: int = 16
    native_tokens: int = 4096
    memory_tokens: int = 8192

    def __post_init__(self) -> None:
        def need(good: bool, name: str, allowed: str) -> None:
            if not good:
                raise ValueError(f"the model's card says {name} = {getattr(self, name)!r}, and must say {allowed}")

        for name in ("size", "steps", "max_sequence_length", "native_tokens", "memory_tokens"):
            need(_is_whole(getattr(self, name)) and getattr(self, name) > 0, name, "a whole number above 0")
        need(isinstance(self.trained, bool), "trained", "true or false")
        need(self.text_level in TEXT_LEVELS, "text_level", f"one of {', '.join(TEXT_LEVELS)}")
        need(_is_share(self.draft), "draft", "a share from 0 to below 1")
        need(_is_share(self.context_noise), "context_noise", "a level from 0 to below 1")
        need(_is_number(self.guidance) and self.guidance >= 0, "guidance", "a number of at least 0")
        need(self.cfg is None or (_is_number(self.cfg) and self.cfg >= 0), "cfg", "a number of at least 0, or null")
        need(self.window is None or (_is_whole(self.window) and self.window > 0), "window", "cells, or null")
        need(_is_whole(self.overlap) and self.overlap >= 0, "overlap", "a whole number of cells")

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Card:
        """From the entries of a card; those that are missing are the defaults. ValueError for what it may not hold."""
        known = [field.name for field in fields(cls)]
        unknown = [name for name in values or () if name not in known]
        if unknown:
            raise ValueError(f"the model's card knows no {unknown[0]!r}: it may hold {', '.join(known)}")
        return cls(**(values or {}))

    def entries(self) -> dict[str, Any]:
        """What `of` reads."""
        return asdict(self)

    def draft_steps(self, steps: int) -> int:
        """Draft steps of so many steps."""
        return draft_steps(steps, self.draft)

    def window_for(self, span: int, multiple: int) -> tuple[int, int]:
        """Window and overlap (cells) for a canvas that spans so many cells along the order."""
        if self.window is not None:
            return self.window, self.overlap
        window = max(multiple, round(span / 2 / (2 * multiple)) * 2 * multiple)
        return window, window // 2 // multiple * multiple


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_share(value: object) -> bool:
    return _is_number(value) and 0 <= value < 1  # type: ignore


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
