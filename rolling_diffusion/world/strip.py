"""Strips: pictures side by side, or one below the other, in a world without end, and how well they meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .detect import NAMES, Found, colour_map, detect
from .scene import GROUNDS, TIMES, Border, Scene, random_scene
from .score import Prompt, Verdict, judge_objects, make_prompt

# The side on which a picture's forerunner lies, and the step from that one's corner to its own, in pictures.
STEPS = {"left": (1, 0), "right": (-1, 0), "top": (0, 1), "bottom": (0, -1)}
CHANGES = 0.3  # share of borders at which the hour or the ground becomes another
NEAR = 6  # pixels on either side of a border that are compared
SLIP = 24  # rows at most by which the two sides are moved to fit each other


def follow(rng: np.random.Generator, last: Scene, side: str, *, change: bool, **options: Any) -> Scene:
    """A random scene of the same size that continues `last`, which lies on its `side`; options: `random_scene`'s.

    change: whether its hour, its ground or both are others, which it then comes to softly from the border on.
    """
    right, down = STEPS[side]
    scene = random_scene(rng, last.width, last.height, **options)
    time, ground = last.time, last.ground
    if change:
        what = rng.integers(3)
        time = time if what == 1 else str(rng.choice([t for t in TIMES if t != time]))
        ground = ground if what == 0 else str(rng.choice([g for g in GROUNDS if g != ground]))
    return replace(
        scene,
        time=time,
        ground=ground,
        hill=last.hill,
        x0=last.x0 + right * last.width,
        y0=last.y0 + down * last.height,
        border=Border(side, last.time, last.ground),
    )


def joined(pictures: Sequence[np.ndarray], side: str) -> np.ndarray:
    """Pictures (height, width, 3) of a strip, in the order told, as one."""
    ordered = list(pictures) if side in ("left", "top") else list(pictures)[::-1]
    return np.concatenate(ordered, 1 if side in ("left", "right") else 0)


@dataclass(frozen=True)
class Seams:
    """What is seen at the borders of a strip.

    cut: objects that lie across one. doubled: objects of the picture before, drawn again where no word tells of them.
    slips: rows (or columns) by which the land on both sides has to be moved to meet. steps: the mean difference of the
    two pixels at each border, over that of neighbours elsewhere.
    """

    cut: int
    doubled: int
    slips: tuple[int, ...]
    steps: tuple[float, ...]

    @property
    def repeats(self) -> int:
        return self.cut + self.doubled


def strip_prompts(rng: np.random.Generator, count: int, tasks: Sequence[str]) -> list[Prompt]:
    """Prompts of a strip, tasks in turn."""
    return [make_prompt(tasks[i % len(tasks)], rng) for i in range(count)]


def judge_strip(prompts: Sequence[Prompt], pictures: Sequence[np.ndarray], side: str) -> tuple[list[Verdict], Seams]:
    """The verdict on each picture as a single one, and what is seen where it meets the one before, on its `side`."""
    seen = [detect(picture) for picture in pictures]
    verdicts = [judge_objects(p, f, x.shape[1], x.shape[0]) for p, f, x in zip(prompts, seen, pictures)]
    cut, doubled, slips, steps = 0, 0, [], []
    for i in range(1, len(pictures)):
        before, after = (_across(p, side) for p in (pictures[i - 1], pictures[i]))
        cut += _cut(before, after)
        doubled += _doubled(seen[i - 1], seen[i], prompts[i])
        slips.append(_slip(before, after))
        steps.append(_step(before, after))
    return verdicts, Seams(cut, doubled, tuple(slips), tuple(steps))


def _across(picture: np.ndarray, side: str) -> np.ndarray:
    """The picture turned so that its forerunner lies on its left."""
    if side in ("top", "bottom"):
        picture = picture.swapaxes(0, 1)
    return picture if side in ("left", "top") else picture[:, ::-1]


def _cut(before: np.ndarray, after: np.ndarray) -> int:
    """Objects across the border: runs of at least 4 pixels of one object's colour on both sides of it."""
    sides = np.stack([colour_map(before[:, -3:])[:, 0], colour_map(after[:, :3])[:, 2]])
    count = 0
    for index in range(len(NAMES)):
        there = (sides == index).all(0).astype(int)
        starts, ends = (np.flatnonzero(np.diff(np.pad(there, 1)) == step) for step in (1, -1))
        count += int(((ends - starts) >= 4).sum())
    return count


def _doubled(before: Sequence[Found], after: Sequence[Found], prompt: Prompt) -> int:
    """Objects of the picture before that appear again, beyond those that the prompt names."""
    left = list(after)
    for thing in prompt.wanted:
        match = [f for f in left if f.kind == thing.kind and (f.colour == thing.colour or not prompt.colours)]
        if match:
            left.remove(match[0])
    return sum(any((f.kind, f.colour) == (b.kind, b.colour) for b in before) for f in left)


def _slip(before: np.ndarray, after: np.ndarray) -> int:
    """Rows by which the strip of land after the border has to be moved to fit the one before it best."""
    a, b = (x.astype(np.float32).mean(1) for x in (before[:, -NEAR:], after[:, :NEAR]))

    def error(shift: int) -> float:
        own = slice(max(0, shift), len(a) + min(0, shift))
        other = slice(max(0, -shift), len(a) + min(0, -shift))
        return float(np.abs(a[own] - b[other]).mean())

    return abs(min(range(-SLIP, SLIP + 1), key=lambda shift: (error(shift), abs(shift))))


def _step(before: np.ndarray, after: np.ndarray) -> float:
    """How much the pixels on both sides of the border differ, over how much neighbours elsewhere do."""
    both = np.concatenate([before, after], 1).astype(np.float32)
    change = np.abs(np.diff(both, axis=1)).mean((0, 2))
    middle = before.shape[1] - 1
    return float(change[middle] / max(1e-3, np.delete(change, middle).mean()))
