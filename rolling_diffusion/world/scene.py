"""What a storybook scene is, and how one is drawn at random: kinds, colours, places, relations, hours and grounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

KINDS = ("ball", "star", "house", "tree", "boat", "kite")
COLOURS = {
    "red": (214, 40, 48),
    "orange": (246, 134, 28),
    "yellow": (250, 208, 40),
    "green": (24, 138, 72),
    "blue": (40, 92, 218),
    "purple": (138, 56, 176),
}
PLACES = ("left", "right", "top", "bottom", "centre")
RELATIONS = ("left of", "right of", "above", "below")
TIMES = ("day", "evening", "night")
GROUNDS = ("grass", "sand", "snow")
# One pair per kind and per colour is never trained: what a model draws for these, it has composed.
HELD_OUT = frozenset(
    {
        ("ball", "purple"),
        ("star", "green"),
        ("house", "orange"),
        ("tree", "blue"),
        ("boat", "yellow"),
        ("kite", "red"),
    }
)
RADIUS = 26.0  # pixels from an object's centre to the edge of its box; the same on every canvas
SPACING = 80  # pixels at least between neighbouring columns, and rows, of places where a centre may stand
GRID = 16  # pixels: places are multiples of it
MARGIN = 32.0  # pixels that a centre keeps from the picture's edge
APART = 64.0  # pixels between two centres at least: objects never touch


@dataclass(frozen=True)
class Thing:
    """One object. x, y: centre in pixels; radius in pixels; place: the place the caption may name, if any."""

    kind: str
    colour: str
    x: float = 0.0
    y: float = 0.0
    radius: float = RADIUS
    place: str | None = None


@dataclass(frozen=True)
class Border:
    """What lies beyond an edge of a picture: side "left", "right", "top" or "bottom", an hour and a ground."""

    side: str
    time: str
    ground: str


@dataclass(frozen=True)
class Scene:
    """A whole picture in numbers. relation: the named relation of the first thing to the second, if any.

    x0, y0: where in the world the picture's corner lies, in pixels: pictures of one `hill` and size, side by side or
    one below the other, continue each other. border: what the picture's own hour and ground come softly out of.
    """

    width: int
    height: int
    time: str
    ground: str
    things: tuple[Thing, ...]
    relation: str | None = None
    hill: float = 0.0
    x0: int = 0
    y0: int = 0
    border: Border | None = None


def place_box(place: str | None, width: int, height: int) -> tuple[float, float, float, float]:
    """(x0, x1, y0, y1) in pixels: where a centre may stand for a place to be true beyond doubt."""
    x0, x1, y0, y1 = MARGIN, width - MARGIN, MARGIN, height - MARGIN
    # A third of the picture, less a little, yet never nothing: the smallest canvas still has a left and a right.
    near_x, near_y = max(MARGIN + 4, 0.32 * width), max(MARGIN + 4, 0.32 * height)
    if place == "left":
        x1 = near_x
    elif place == "right":
        x0 = width - near_x
    elif place == "top":
        y1 = near_y
    elif place == "bottom":
        y0 = height - near_y
    elif place == "centre":
        x0, x1, y0, y1 = 0.44 * width, 0.56 * width, 0.44 * height, 0.56 * height
    return x0, x1, y0, y1


def is_at(place: str, x: float, y: float, width: int, height: int) -> bool:
    """Whether a centre (pixels) counts as standing at a place; a tenth of the picture is forgiven."""
    x0, x1, y0, y1 = place_box(place, width, height)
    if place in ("left", "right"):
        return x <= x1 + 0.1 * width if place == "left" else x >= x0 - 0.1 * width
    if place in ("top", "bottom"):
        return y <= y1 + 0.1 * height if place == "top" else y >= y0 - 0.1 * height
    return x0 - 0.1 * width <= x <= x1 + 0.1 * width and y0 - 0.1 * height <= y <= y1 + 0.1 * height


def is_related(relation: str, a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether centre a (x, y) stands in the relation to centre b: farther along its axis than across it."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    if relation in ("left of", "right of"):
        return abs(dx) > abs(dy) and (dx < 0) == (relation == "left of")
    return abs(dy) > abs(dx) and (dy < 0) == (relation == "above")


def spread(size: int, count: int) -> list[float]:
    """Where `count` centres stand evenly along a side of so many pixels."""
    return [float(GRID * round(size * (i + 0.5) / count / GRID)) for i in range(count)]


def places_along(size: int) -> list[float]:
    """Where a centre may stand along a side of so many pixels: few places, so that no two look alike under noise."""
    return spread(size, max(2, size // SPACING))


def _place(rng: np.random.Generator, size: int, low: float, high: float) -> float:
    """A random place from low to high, or the grid's point nearest to their middle."""
    fitting = [x for x in places_along(size) if low <= x <= high]
    return fitting[int(rng.integers(len(fitting)))] if fitting else float(GRID * round((low + high) / 2 / GRID))


def _in_line(scene: Scene, rng: np.random.Generator) -> Scene:
    """Things whose places no word tells: evenly side by side in the order told, or as the relation has them.

    Where the picture is too narrow for them, one below the other.
    """
    narrow = scene.relation is None and scene.width < APART * len(scene.things)
    upright = narrow or scene.relation in ("above", "below")
    along, across = (scene.height, scene.width) if upright else (scene.width, scene.height)
    line = spread(along, len(scene.things))
    if scene.relation in ("right of", "below"):
        line.reverse()
    other = _place(rng, across, 0, across)
    centres = [(other, at) if upright else (at, other) for at in line]
    return replace(scene, things=tuple(replace(t, x=x, y=y) for t, (x, y) in zip(scene.things, centres)))


def arrange(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """The scene with centres drawn so that places and relation hold; None if 60 tries found no room."""
    if len(scene.things) > 1 and not any(t.place for t in scene.things):
        return _in_line(scene, rng)
    for _ in range(60):
        things: list[Thing] = []
        for thing in scene.things:
            x0, x1, y0, y1 = place_box(thing.place, scene.width, scene.height)
            x, y = _place(rng, scene.width, x0, x1), _place(rng, scene.height, y0, y1)
            if any((x - t.x) ** 2 + (y - t.y) ** 2 < APART**2 for t in things):
                break
            things.append(replace(thing, x=x, y=y))
        else:
            return replace(scene, things=tuple(things))
    return None


def random_thing(rng: np.random.Generator) -> tuple[str, str]:
    """(kind, colour), never of those that are held out."""
    return TRAINED_PAIRS[int(rng.integers(len(TRAINED_PAIRS)))]


TRAINED_PAIRS = [(k, c) for k in KINDS for c in COLOURS if (k, c) not in HELD_OUT]


SHAPES = {"one": 0.14, "two": 0.36, "count": 0.24, "relation": 0.14, "three": 0.12}  # and how often each comes


def random_scene(
    rng: np.random.Generator,
    width: int = 256,
    height: int = 256,
    shapes: Mapping[str, float] = SHAPES,
) -> Scene:
    """A scene of one of the shapes that captions can tell: one, two or three things, a count, or a relation."""
    room = (width // 64) * (height // 64)
    if room < 3:
        raise ValueError(f"a canvas of {width} × {height} pixels has no room for a scene: 128 × 128 has")
    while True:
        shape = rng.choice(list(shapes), p=list(shapes.values()))
        if shape == "one":
            n = 1
        elif shape in ("two", "relation"):
            n = 2
        else:
            n = 3 if shape == "three" else int(rng.integers(2, 4))
        if n > room - 2:
            continue
        pairs = [random_thing(rng) for _ in range(n)]
        relation = None
        if shape == "count":
            # Half the groups share one colour, so that "three red stars" can be said.
            same = rng.random() < 0.5
            kind, colour = pairs[0]
            others = [c for k, c in TRAINED_PAIRS if k == kind]
            rest = [colour if same else str(rng.choice(others)) for _ in pairs[1:]]
            pairs = [(kind, c) for c in [colour, *rest]]
            places = [None] * n
        else:
            if len({k for k, _ in pairs}) < n:
                continue
            if shape == "relation":
                relation = str(rng.choice(RELATIONS))
                places = [None] * n
            else:
                drawn = [str(p) for p in rng.permutation(PLACES)[:n]]
                places = [p if rng.random() < 0.5 else None for p in drawn]
        things = tuple(Thing(k, c, place=p) for (k, c), p in zip(pairs, places))
        scene = Scene(width, height, str(rng.choice(TIMES)), str(rng.choice(GROUNDS)), things, relation, rng.random())
        arranged = arrange(scene, rng)
        if arranged is not None:
            return arranged
