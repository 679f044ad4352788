"""Captions: a small grammar with paraphrases. Each word knows which thing it speaks of, to teach the text encoders."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from .scene import COLOURS, GROUNDS, KINDS, PLACES, RELATIONS, TIMES, Scene

PLURAL = {k: k + "s" for k in KINDS}
COUNT_WORDS = {2: "two", 3: "three"}
OPENINGS = ("", "", "", "a picture of", "a drawing of", "an image of", "a scene with")
PLACE_WORDS = {
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "centre": ("in the centre", "in the center", "in the middle"),
}
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
TIME_WORDS = {
    "day": ("by day", "in daylight", "on a sunny day"),
    "evening": ("in the evening", "at sunset", "at dusk"),
    "night": ("at night", "by night", "under the night sky"),
}
GROUND_WORDS = {
    "grass": ("on grass", "in a meadow", "over green hills"),
    "sand": ("on sand", "on the beach", "in the desert"),
    "snow": ("in the snow", "on snow", "over snowy hills"),
}
SYNONYMS = {  # words that people type, and the word of the grammar that each is read as
    "home": "house", "homes": "houses", "cottage": "house", "cottages": "houses",
    "ship": "boat", "ships": "boats", "sailboat": "boat", "sailboats": "boats",
    "pine": "tree", "pines": "trees", "fir": "tree", "firs": "trees",
    "scarlet": "red", "crimson": "red", "golden": "yellow", "violet": "purple",
    "photo": "picture", "painting": "drawing", "sketch": "drawing", "illustration": "image",
    "sunrise": "sunset", "dawn": "dusk", "daytime": "daylight", "midnight": "night",
    "field": "meadow", "shore": "beach", "seaside": "beach", "dunes": "desert",
    "beneath": "below", "underneath": "below", "beside": "with",
}  # fmt: skip
TYPED = 0.15  # share of words said by a synonym, where they have some, when captions are typed
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ALONE = r"(?<![a-z0-9]){}(?![a-z0-9])"  # a digit that is a number by itself
JOINTS = ("and", "and", "with", "next to")


@dataclass(frozen=True)
class Tag:
    """What a word belongs to, as class numbers, 0 for none; things and counts are 1 to 3."""

    thing: int = 0
    kind: int = 0
    colour: int = 0
    place: int = 0
    count: int = 0
    relation: int = 0


TAG_SIZES = {"thing": 4, "kind": len(KINDS) + 1, "colour": len(COLOURS) + 1, "place": 6, "count": 4, "relation": 5}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Caption:
    """Words, the tag of each, and which hour and ground they name (0 for none, else 1 + index)."""

    words: tuple[str, ...]
    tags: tuple[Tag, ...]
    time: int
    ground: int

    @property
    def text(self) -> str:
        return " ".join(self.words)


def split(text: str) -> list[str]:
    """The words of a prompt as the tokenizers see them: lower case, letters only, digits that it knows as words."""
    text = text.lower()
    for digit, word in digits(vocabulary()).items():
        text = re.sub(ALONE.format(digit), word, text)
    return re.findall(r"[a-z]+", text)


def digits(words: Iterable[str]) -> dict[str, str]:
    """The digits whose names are among the words, and those names."""
    return {str(number): name for number, name in enumerate(NUMBERS) if name in words}


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


@cache
def vocabulary() -> list[str]:
    """Every word that the grammar can say, sorted."""
    phrases = [*OPENINGS, *JOINTS, *PLURAL, *PLURAL.values(), *COLOURS, *COUNT_WORDS.values(), "a", "an", "one"]
    for table in (PLACE_WORDS, RELATION_WORDS, TIME_WORDS, GROUND_WORDS):
        phrases += [p for choices in table.values() for p in choices]
    return sorted({w for p in phrases for w in p.split()})


def typed(told: Caption, rng: np.random.Generator) -> Caption:
    """The caption with some of its words said by synonyms, which the grammar itself never says."""
    words = list(told.words)
    for i, word in enumerate(words):
        others = [new for new, old in SYNONYMS.items() if old == word]
        if others and rng.random() < TYPED:
            words[i] = others[int(rng.integers(len(others)))]
    return replace(told, words=tuple(words))


def _number(options: tuple[str, ...] | dict, value: str | None) -> int:
    return 0 if value is None else list(options).index(value) + 1


def caption(
    scene: Scene,
    rng: np.random.Generator,
    colour_rate: float = 0.75,
    setting_rate: float = 0.5,
) -> Caption:
    """Tells a scene. Objects are always named and counted; colours and setting are named at the given rates.

    An hour or a ground that differs from what lies beyond the scene's border is always named.
    """

    def pick(options: tuple[str, ...]) -> str:
        return str(options[int(rng.integers(len(options)))])

    things, words, tags = scene.things, [], []

    def say(phrase: str, tag: Tag = Tag()) -> None:
        for word in phrase.split():
            words.append(word)
            tags.append(tag)

    beyond = scene.border
    time = scene.time if rng.random() < setting_rate or (beyond and beyond.time != scene.time) else None
    ground = scene.ground if rng.random() < setting_rate or (beyond and beyond.ground != scene.ground) else None
    setting = [pick(TIME_WORDS[time])] if time else []
    setting += [pick(GROUND_WORDS[ground])] if ground else []
    if len(setting) == 2 and rng.random() < 0.5:
        setting.reverse()
    say(pick(OPENINGS))
    first_setting = bool(setting) and not words and rng.random() < 0.15
    if first_setting:
        say(" ".join(setting))
    if len(things) > 1 and len({t.kind for t in things}) == 1:
        colours = {t.colour for t in things}
        colour = things[0].colour if len(colours) == 1 and rng.random() < colour_rate else None
        tag = Tag(1, _number(KINDS, things[0].kind), _number(COLOURS, colour), 0, len(things), 0)
        say(f"{COUNT_WORDS[len(things)]} {colour or ''} {PLURAL[things[0].kind]}", tag)
    else:
        relation = scene.relation
        for i, thing in enumerate(things):
            colour = thing.colour if rng.random() < colour_rate else None
            role = None if relation is None else relation if i == 0 else OPPOSITE[relation]
            tag = Tag(
                i + 1, _number(KINDS, thing.kind), _number(COLOURS, colour), _number(PLACES, thing.place), 1,
                _number(RELATIONS, role),
            )  # fmt: skip
            noun = f"{colour} {thing.kind}" if colour else thing.kind
            first = "one" if rng.random() < 0.1 else article(noun)
            where = pick(PLACE_WORDS[thing.place]) if thing.place else ""
            say(f"{first} {noun} {where}", tag)
            if i == 0 and relation is not None:
                say(pick(RELATION_WORDS[relation]), tag)
            elif i + 1 < len(things):
                say(pick(JOINTS))
    if not first_setting:
        say(" ".join(setting))
    return Caption(tuple(words), tuple(tags), _number(TIMES, time), _number(GROUNDS, ground))
