"""Defaults: what a model is sampled with when the caller does not say. Every front-end asks here, and only here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .core.order import Block, Walk, check_given, rest_of, route_of, span, whole
from .core.plan import Plan, check_draft, count_steps, make_plan

DRAFT = 0.5  # share of the steps, unless a model's card says otherwise: docs/results.md has the study that decided it
CELL, TOKEN = 8, 2  # pixels a cell, cells a token: of every family that rolls
MOST_STEPS = 10_000
EMBEDDED = "embedded"  # the name of the model that ships here
SIDE = CELL * TOKEN  # pixels that a side of a picture is a multiple of
LAST_SEED = 2**64 - 1  # of torch's generators
EVERYWHERE = "all"  # a lookahead over the whole canvas; None means the same
TEXT_LEVELS = ("max", "mean", "min")


def nearest_side(pixels: int) -> int:
    """The length of a side that can be drawn, and is the nearest to this one."""
    return max(SIDE, round(pixels / SIDE) * SIDE)


@dataclass(frozen=True)
class Card:
    """A model's own defaults, kept as "rolling" in its model_index.json.

    Those here are FLUX.1-dev's: a model that never saw staggered noise.

    trained              whether it was trained for rolling
    draft                share of the steps that all blocks take together
    text_level           noise level that the text takes: "max", "mean" or "min" of the levels in the call
    context_noise        noise level of the blocks that are committed to memory
    size                 pixels a side
    steps                of the sampler
    guidance             the embedded guidance of a distilled model
    cfg                  classifier-free guidance; None: none
    max_sequence_length  tokens of the prompt
    window, overlap      cells; window None: half of the canvas, advancing by half of itself
    native_tokens        image tokens up to which a block sees the whole canvas by default
    memory_tokens        most tokens that are attended to in memory; None: native_tokens, as the model was made for
    extrapolation        share of its noise that a waiting block is remembered without: see make_plan
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
    memory_tokens: int | None = None
    extrapolation: float = 0.0

    def __post_init__(self) -> None:
        def need(good: bool, name: str, allowed: str) -> None:
            if not good:
                raise ValueError(f"the model's card says {name} = {getattr(self, name)!r}, and must say {allowed}")

        for name, most in (
            ("size", 2**20),
            ("steps", MOST_STEPS),
            ("max_sequence_length", 2**20),
            ("native_tokens", 2**31),
        ):
            value = getattr(self, name)
            need(_is_whole(value) and 0 < value <= most, name, f"a whole number from 1 to {most}")
        cap = self.memory_tokens
        need(cap is None or (_is_whole(cap) and cap > 0), "memory_tokens", "a whole number above 0, or null")
        need(isinstance(self.trained, bool), "trained", "true or false")
        need(self.text_level in TEXT_LEVELS, "text_level", f"one of {', '.join(TEXT_LEVELS)}")
        need(_is_share(self.draft), "draft", "a share from 0 to below 1")
        need(_is_share(self.context_noise), "context_noise", "a level from 0 to below 1")
        need(_is_share(self.extrapolation), "extrapolation", "a share from 0 to below 1")
        need(_is_number(self.guidance) and self.guidance >= 0, "guidance", "a number of at least 0")
        need(self.cfg is None or (_is_number(self.cfg) and self.cfg >= 0), "cfg", "a number of at least 0, or null")
        need(self.window is None or (_is_whole(self.window) and self.window > 0), "window", "cells, or null")
        need(_is_whole(self.overlap) and self.overlap >= 0, "overlap", "a whole number of cells")

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Card:
        """From the entries of a card; those that are missing are the defaults. ValueError for what it may not hold."""
        if not isinstance(values, (Mapping, type(None))):
            raise ValueError(f"the model's card is {values!r}, and must hold values by their names")
        known = [field.name for field in fields(cls)]
        unknown = [name for name in values or () if name not in known]
        if unknown:
            raise ValueError(
                f'the model\'s card knows no {unknown[0]!r}, which may be of another version: take it out of "rolling" '
                f"in its model_index.json, where there may be {', '.join(known)}"
            )
        return cls(**(values or {}))

    @classmethod
    def in_folder(cls, folder: str | Path) -> Card:
        """The card of a model folder; of anything else, which has none, FLUX.1-dev's. ValueError as `of`."""
        index = Path(folder) / "model_index.json"
        return cls.of(read_index(index).get("rolling") if index.is_file() else None)

    @property
    def reach(self) -> int:
        """Most tokens that are attended to in memory."""
        return self.native_tokens if self.memory_tokens is None else self.memory_tokens

    def draft_steps(self, steps: int) -> int:
        """Draft steps of so many steps: at least one is left to the blocks."""
        return min(round(self.draft * steps), steps - 1)


def read_index(index: Path) -> dict[str, Any]:
    """What a model_index.json holds: the parts of a model, and perhaps its card. ValueError, of one sentence."""
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {index}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{index} is not valid JSON") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{index} must hold an object that names the parts of the model")
    if not isinstance(entries.get("rolling"), (dict, type(None))):
        raise ValueError(f'"rolling" in {index} is {entries["rolling"]!r}, and must be an object: the model\'s card')
    return entries


def context_of(stretch: int, unit: int) -> int:
    """How much of the stretch before a call sees where nothing is said: half of one, in whole units of that length."""
    return max(unit, stretch // 2 // unit * unit)


def plan_for(
    card: Card,
    height: int,
    width: int,
    steps: int | Sequence[float],
    *,
    order: str | Walk | Sequence[Block] = "top-to-bottom",
    window: int | None = None,
    overlap: int | None = None,
    persistence: float = 1.0,
    draft: int | None = None,
    lookahead: int | str | None = "auto",
    lag: int | str | None = None,
    seed: int = 0,
    multiple: int = 2,
    extrapolation: float | None = None,
    calls_per_step: int = 1,
    given: Sequence[Block] = (),
    guide: bool | str = False,
) -> Plan:
    """The plan for a height × width canvas (cells): what was said, else what the card says, fitted to the canvas.

    steps, order, persistence, lag, seed, multiple, given: as for `make_plan`. The others may be None, for the default:

    window: the card's; if it has none, half of the canvas along the order.
    overlap: the card's, at most half of the window; half of the window if the card has no window.
    draft: the card's share of the steps.
    lookahead: "auto" for the whole canvas up to the card's native_tokens, and one window beyond; None or "all" for the
        whole canvas.
    extrapolation: the card's; without a draft, 0.
    guide: whether a picture of the model's own size takes the place of the draft on a canvas that is larger than that;
        "auto" if neither draft nor lag are said, and the order needs no draft.
    calls_per_step: of a sampler that is counted by its calls, such as diffusers' Heun: 2, and one for the last step.
        Steps and draft then become ticks; lag is in ticks as ever.

    ValueError, in one sentence, for what does not fit together.
    """
    steps = count_steps(steps)
    if guide == "auto":
        late = isinstance(order, str) and route_of(order).late
        guide = draft is None and lag is None and not given and not late
    draft = card.draft_steps(steps) if draft is None else check_draft(draft, steps)
    height, width = whole("height", height, 1, "cells"), whole("width", width, 1, "cells")
    multiple = whole("multiple", multiple, 1, "cells")
    if window is None:
        rest = rest_of(check_given(given, height, width, multiple), height, width)
        window = card.window or _half(span(order, rest.height, rest.width), 2 * multiple) or multiple
    if overlap is None:
        overlap = _half(whole("window", window, unit="cells"), multiple, down=True)
        overlap = overlap if card.window is None else min(card.overlap // multiple * multiple, overlap)
    if lookahead == "auto":
        lookahead = None if height * width <= card.native_tokens * multiple**2 else window
    elif lookahead == EVERYWHERE:
        lookahead = None
    elif isinstance(lookahead, str):
        raise ValueError(f'lookahead is {lookahead!r}, and must be a number of cells, "{EVERYWHERE}" or "auto"')
    return make_plan(
        height,
        width,
        calls_per_step * (steps - 1) + 1,
        order=order,
        window=window,
        overlap=overlap,
        draft=calls_per_step * draft,
        lookahead=lookahead,
        seed=seed,
        lag=lag,
        multiple=multiple,
        persistence=persistence,
        extrapolation=(card.extrapolation if draft else 0.0) if extrapolation is None else extrapolation,
        given=given,
        guide=guide_size(card, height, width, multiple) if guide and draft else None,
    )


def guide_size(card: Card, height: int, width: int, multiple: int) -> tuple[int, int] | None:
    """Height and width (cells) of a canvas scaled down to the model's own size; None if it is no larger than that."""
    scale = (card.native_tokens * multiple**2 / (height * width)) ** 0.5
    if scale >= 1:
        return None
    down, across = (max(multiple, int(side * scale) // multiple * multiple) for side in (height, width))
    return down, across


def check_text_level(value: str) -> None:
    """ValueError unless it is one of TEXT_LEVELS."""
    if value not in TEXT_LEVELS:
        raise ValueError(f"text_level is {value!r}, and must be one of {', '.join(TEXT_LEVELS)}")


def _half(cells: int, multiple: int, down: bool = False) -> int:
    """Half of so many cells, in whole multiples: the nearest, or the one below."""
    return (cells // (2 * multiple) if down else round(cells / (2 * multiple))) * multiple


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_share(value: object) -> bool:
    return _is_number(value) and 0 <= value < 1  # type: ignore


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
