"""Prompts that hold for parts of a canvas: where, and how a pipeline's text becomes that of all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.order import route_of
from ..models.prompts import spread

SOFT = 64  # pixels over which one prompt gives way to the next


def is_placed(prompt: Any) -> bool:
    """Is it [(place, prompt), …]?"""
    if isinstance(prompt, str) or not isinstance(prompt, Sequence) or not prompt:
        return False
    return all(not isinstance(p, str) and isinstance(p, Sequence) and len(p) == 2 for p in prompt)


class Places:
    """Prompts with places; see `Rolling.__call__`. ValueError, of one sentence, for places that cannot be."""

    def __init__(self, said: Sequence[Any], order: Any, soft: int, cell: int, patch: int):
        self.texts = [text for _, text in said]
        self.places = [place for place, _ in said]
        self.soft, self.unit, self.patch = soft, cell * patch, patch  # unit: pixels a token
        named: Any = order if isinstance(order, str) or callable(order) else None
        self.axis = "tiles" if named is None else route_of(named).axis
        self.tokens = 0  # of all texts together, once they are encoded
        self.pooled: list[list[Tensor]] = []  # pooled embeddings, of each prompt, in the order in which they are given
        for text in self.texts:
            if not isinstance(text, str):
                raise ValueError(f"a prompt with a place is {text!r}, and must be words")

    def maps(self, height: int, width: int) -> Tensor:
        """(prompts, rows, columns) of tokens on a canvas of so many cells: the weight of each prompt there."""
        rows, columns = height // self.patch, width // self.patch
        down = self.axis == "rows" or (self.axis == "tiles" and rows > columns)
        maps = torch.zeros(len(self.texts), rows, columns)
        before = -1
        for i, (place, text) in enumerate(zip(self.places, self.texts)):
            if isinstance(place, Sequence) and not isinstance(place, str):
                top, left, bottom, right = self._rectangle(place, text, rows, columns)
                maps[:, top:bottom, left:right], maps[i, top:bottom, left:right] = 0, 1
                continue
            at = self._along(place, text, rows if down else columns)
            if at <= before:
                raise ValueError(f"the place of {text!r} is {place}, and must lie beyond that of the prompt before it")
            before = at
            part = maps[:, at:] if down else maps[:, :, at:]
            part.zero_()
            part[i] = 1
        if not maps.sum(0).all():
            raise ValueError("the prompts leave a part of the canvas without one: begin with (0, …)")
        gone = next((text for text, one in zip(self.texts, maps) if not one.any()), None)
        if gone is not None:
            raise ValueError(f"no part of the canvas is left to {gone!r}: others cover it")
        return spread(maps, round(self.soft / self.unit))

    def on(self, small: tuple[int, int], canvas: tuple[int, int]) -> list[tuple[Any, str]]:
        """The prompts with places on a smaller picture of the canvas; both (height, width)."""
        self.maps(*canvas)  # refuses what cannot be
        down, across = (a / b for a, b in zip(small, canvas))
        along = down if self.axis == "rows" or (self.axis == "tiles" and canvas[0] > canvas[1]) else across
        scaled: list[tuple[Any, str]] = []
        for place, text in zip(self.places, self.texts):
            if isinstance(place, Sequence):
                left, top, right, bottom = (round(n * s) for n, s in zip(place, (across, down, across, down)))
                place = left, top, max(right, left + 1), max(bottom, top + 1)
            elif isinstance(place, int):
                place = place * along / (self.unit / self.patch * (small[0] if along is down else small[1]))
            scaled.append((place, text))
        return scaled

    def _along(self, place: Any, text: str, count: int) -> int:
        if isinstance(place, float) and 0 <= place < 1:
            return round(place * count)
        if isinstance(place, int) and not isinstance(place, bool) and 0 <= place < count * self.unit:
            return round(place / self.unit)
        raise ValueError(
            f"the place of {text!r} is {place!r}, and must be a share from 0.0 to below 1.0, pixels from 0 to "
            f"{count * self.unit - 1} along the order, or a rectangle (left, top, right, bottom) of pixels"
        )

    def _rectangle(self, place: Sequence[Any], text: str, rows: int, columns: int) -> tuple[int, int, int, int]:
        whole = len(place) == 4 and all(isinstance(n, int) and not isinstance(n, bool) and n < 2**31 for n in place)
        if whole:
            left, top, right, bottom = (n / self.unit for n in place)
            if 0 <= left < right <= columns and 0 <= top < bottom <= rows:
                return math.floor(top), math.floor(left), math.ceil(bottom), math.ceil(right)
        raise ValueError(
            f"the place of {text!r} is {tuple(place)!r}, and must be pixels (left, top, right, bottom) within the "
            f"canvas of {columns * self.unit} × {rows * self.unit}"
        )

    def join(self, encoded: Sequence[Sequence[Any]]) -> tuple:
        """What a pipeline's encode_prompt gave for each prompt, as for one: words one after the other; of the pooled
        embeddings the first prompt's, the others kept."""
        joined = []
        self.pooled = []
        for parts in zip(*encoded):
            first = parts[0]
            if first is None:
                joined.append(None)
            elif first.ndim == 3:
                joined.append(torch.cat(parts, 1))
            elif first.shape[-1] in (3, 4):  # places of words
                joined.append(torch.cat(parts, 0))
            else:
                joined.append(first)
                self.pooled.append(list(parts))
        self.tokens = joined[0].shape[1]
        return tuple(joined)

    def pooled_for(self, request: dict[str, Any]) -> list[Tensor] | None:
        """Each prompt's pooled embedding, (B, width), as the request has that of the first."""
        told = request.get("pooled_projections")
        if told is None:
            return None
        own, *others = self.pooled
        if len(told) == 2 * len(own[0]):  # what is not wanted comes first
            return [torch.cat([others[0][0], one]).to(told) for one in own]
        return [one.to(told) for one in own]
