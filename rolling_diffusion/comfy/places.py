"""Prompts that hold for parts of a canvas, as they are written: one a line, with or without a place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PLACE = re.compile(r"\s*(\d+\.\d*|\.\d+|\d+)\s*:\s*(.*)")
Lines = list[tuple[Any, str]]  # place: a share of the length (float), pixels (int), or None where none is said


def read(text: str) -> Lines:
    """One for each line that is not empty. ValueError, one sentence, for places that cannot be."""
    lines: Lines = []
    for line in filter(str.strip, text.splitlines()):
        found = PLACE.fullmatch(line)
        place, prompt = (found[1], found[2].strip()) if found else (None, line.strip())
        if not prompt:
            raise ValueError(f"prompts has the place {place} without a prompt: write it behind the colon.")
        lines.append((place and (float(place) if "." in place else int(place)), prompt))
    if not lines:
        raise ValueError("prompts is empty: write one a line.")
    without = [prompt for place, prompt in lines if place is None]
    if 0 < len(without) < len(lines):
        raise ValueError(f"prompts has places, but none for {without[0]!r}: say one for each line, or for none.")
    for place, prompt in lines:
        if isinstance(place, float) and place >= 1:
            raise ValueError(f"prompts has {prompt!r} at {place:g}, and a share is below 1: pixels have no point.")
    if not without and lines[0][0] != 0:
        raise ValueError(f"prompts begins at {lines[0][0]:g}, and must begin at 0.")
    return lines


def spread(lines: Lines) -> Lines:
    """With places: those that say none share the length evenly."""
    return [(i / len(lines) if place is None else place, prompt) for i, (place, prompt) in enumerate(lines)]


def weights(lines: Lines, length: int, blend: int, pixels: int) -> Tensor:
    """(prompts, cells): how much each holds along a canvas of so many cells; together 1 everywhere.

    blend: cells over which one gives way to the next. pixels: of a cell. ValueError for places out of order, or beyond.
    """
    starts: list[float] = []
    for place, prompt in spread(lines):
        start = place * length if isinstance(place, float) else place / pixels
        if starts and not starts[-1] < start < length:
            raise ValueError(
                f"prompts has {prompt!r} at {place:g}, and must have it beyond the one before it and within the canvas "
                f"of {length * pixels} pixels."
            )
        starts.append(start)
    return _ramps(starts, length, blend)


def _ramps(starts: Sequence[float], length: int, blend: int) -> Tensor:
    at = torch.arange(length) + 0.5
    rising = [((at - start) / max(blend, 1e-6) + 0.5).clamp(0, 1) for start in starts]
    rising[0] = torch.ones(length)
    return torch.stack([here - after for here, after in zip(rising, [*rising[1:], torch.zeros(length)])])
