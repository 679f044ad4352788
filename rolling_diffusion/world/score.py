"""The prompt-following score, after GenEval's design (2310.11513): seven kinds of prompt, each picture right or wrong.

The score is the mean over six tasks; relation is reported apart, and so are compositions held out of training. A
picture's invented objects, those that its prompt does not name, are counted beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from .caption import caption
from .detect import Found, detect
from .render import render
from .scene import (
    GROUNDS,
    HELD_OUT,
    PLACES,
    RELATIONS,
    TIMES,
    TRAINED_PAIRS,
    Scene,
    Thing,
    arrange,
    is_at,
    is_related,
)

TASKS = ("single object", "two objects", "counting", "colours", "position", "colour binding")
APART = ("relation", "held-out colours", "held-out binding")


@dataclass(frozen=True)
class Prompt:
    """A prompt and what its picture must show. colours: whether it names them; wanted: things without centres."""

    task: str
    text: str
    wanted: tuple[Thing, ...]
    colours: bool
    relation: str | None = None


@dataclass(frozen=True)
class Verdict:
    """right: the picture shows what was asked. found: objects seen; invented: those among them that no word names."""

    task: str
    right: bool
    found: int
    invented: int


def make_prompt(task: str, rng: np.random.Generator) -> Prompt:
    """A random prompt of one task."""
    pairs = sorted(HELD_OUT) if task.startswith("held-out") else TRAINED_PAIRS
    two = task in ("two objects", "colour binding", "relation", "held-out binding")
    colours = task in ("colours", "colour binding", "held-out colours", "held-out binding")
    while True:
        drawn = [pairs[int(i)] for i in rng.integers(len(pairs), size=2 if two else 1)]
        if len({k for k, _ in drawn}) == len({c for _, c in drawn}) == len(drawn):
            break
    place = str(rng.choice(PLACES)) if task == "position" else None
    things = [Thing(k, c, place=place) for k, c in drawn]
    if task == "counting":
        things = things * int(rng.integers(2, 4))
    relation = str(rng.choice(RELATIONS)) if task == "relation" else None
    scene = Scene(256, 256, str(rng.choice(TIMES)), str(rng.choice(GROUNDS)), tuple(things), relation)
    told = caption(scene, rng, colour_rate=float(colours), setting_rate=0.3)
    return Prompt(task, told.text, scene.things, colours, relation)


def make_prompts(count: int, seed: int, tasks: Sequence[str] = TASKS) -> list[Prompt]:
    """count prompts in all, tasks in turn; the same for the same seed."""
    rng = np.random.default_rng([seed, 7])
    return [make_prompt(tasks[i % len(tasks)], rng) for i in range(count)]


def illustrate(prompt: Prompt, rng: np.random.Generator) -> np.ndarray:
    """The renderer's own picture (256, 256, 3), uint8, of a prompt, at a random hour, on a random ground."""
    time, ground = str(rng.choice(TIMES)), str(rng.choice(GROUNDS))
    scene = arrange(Scene(256, 256, time, ground, prompt.wanted, prompt.relation, rng.random()), rng)
    if scene is None:
        raise ValueError(f"a picture has no room for {prompt.text!r}")
    return render(scene)


def judge(prompt: Prompt, picture: np.ndarray) -> Verdict:
    """Whether a picture (H, W, 3), uint8, shows what its prompt asks."""
    return judge_objects(prompt, detect(picture), picture.shape[1], picture.shape[0])


def judge_objects(prompt: Prompt, found: Sequence[Found], width: int, height: int) -> Verdict:
    """The same from detected objects; width and height in pixels, which places refer to."""
    left, matched = list(found), []
    for thing in prompt.wanted:
        for item in left:
            if item.kind == thing.kind and (not prompt.colours or item.colour == thing.colour):
                left.remove(item)
                matched.append((thing, item))
                break
    right = len(matched) == len(prompt.wanted)
    right &= all(thing.place is None or is_at(thing.place, f.x, f.y, width, height) for thing, f in matched)
    if prompt.task == "counting":
        right &= not any(f.kind == prompt.wanted[0].kind for f in left)
    if right and prompt.relation is not None:
        (_, a), (_, b) = matched
        right = is_related(prompt.relation, (a.x, a.y), (b.x, b.y))
    return Verdict(prompt.task, right, len(found), len(left))


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    low, high = stats.binomtest(right, count).proportion_ci(method="wilson")
    return float(low), float(high)


def summary(verdicts: Sequence[Verdict]) -> dict:
    """score: the mean of the tasks present among the six; tasks: each task's share; intervals; invented objects."""
    tasks, intervals = {}, {}
    for task in (*TASKS, *APART):
        rights = [v.right for v in verdicts if v.task == task]
        if rights:
            tasks[task] = float(np.mean(rights))
            intervals[task] = interval(sum(rights), len(rights))
    main = [t for t in TASKS if t in tasks]
    score = float(np.mean([tasks[t] for t in main])) if main else None
    counts = {t: sum(v.task == t for v in verdicts) for t in main}
    # The mean of independent shares: its variance is the sum of theirs over the square of their number.
    variance = sum(max(tasks[t] * (1 - tasks[t]), 0.25 / counts[t]) / counts[t] for t in main) / max(1, len(main)) ** 2
    half = 1.96 * math.sqrt(variance)
    found = sum(v.found for v in verdicts)
    return {
        "score": score,
        "interval": None if score is None else (max(0.0, score - half), min(1.0, score + half)),
        "tasks": tasks,
        "intervals": intervals,
        "invented": sum(v.invented for v in verdicts) / max(1, found),
        "pictures": len(verdicts),
    }


def difference(a: Sequence[Verdict], b: Sequence[Verdict]) -> tuple[float, float, float]:
    """(mean, low, high) of a's share of right pictures minus b's, on the same prompts; 95 % by bootstrap."""
    gap = np.array([x.right for x in a], float) - np.array([x.right for x in b], float)
    return _bootstrap(lambda gap, axis: gap.mean(axis), gap)


def more_invented(a: Sequence[Verdict], b: Sequence[Verdict]) -> tuple[float, float, float]:
    """(difference, low, high) of a's share of invented objects minus b's, likewise."""

    def gap(*counts: np.ndarray, axis: int) -> np.ndarray:
        invented_a, found_a, invented_b, found_b = (c.sum(axis) for c in counts)
        return invented_a / np.maximum(found_a, 1) - invented_b / np.maximum(found_b, 1)

    return _bootstrap(gap, *(np.array([getattr(v, name) for v in s]) for s in (a, b) for name in ("invented", "found")))


def _bootstrap(statistic: Callable[..., np.ndarray], *samples: np.ndarray) -> tuple[float, float, float]:
    """(value, low, high), 95 %, of a statistic of samples that belong together, one entry a picture."""
    how: dict[str, Any] = {"n_resamples": 2000, "vectorized": True, "paired": True, "method": "percentile"}
    how["random_state"] = np.random.default_rng(0)  # the name that every release of scipy knows
    low, high = stats.bootstrap(samples, statistic, **how).confidence_interval
    return float(statistic(*samples, axis=0)), float(low), float(high)
