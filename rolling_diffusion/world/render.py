"""Draws a scene: paper cut-outs with a cream edge on two hills under a sky. Anti-aliased by signed distances."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .scene import COLOURS, Scene, Thing

SKY = {  # top and bottom of the sky
    "day": ((138, 200, 242), (226, 242, 250)),
    "evening": ((206, 150, 190), (254, 216, 186)),
    "night": ((18, 22, 58), (58, 62, 116)),
}
HILLS = {  # far and near hill
    "grass": ((186, 214, 158), (158, 196, 128)),
    "sand": ((244, 230, 196), (234, 214, 170)),
    "snow": ((246, 250, 253), (226, 236, 246)),
}
SHADE = {  # the light that falls on the hills
    "day": (1.0, 1.0, 1.0),
    "evening": (0.95, 0.86, 0.9),
    "night": (0.36, 0.42, 0.6),
}
CREAM = np.array((255, 249, 232), np.float32)
INK = np.array((58, 44, 52), np.float32)
EDGE = 3.0  # pixels of cream paper around every object
SWELL, PERIOD = 9, 300  # pixels by which a hill's line rises and falls, and in which it does so once
PALE, MIST = np.array((228, 230, 234), np.float32), 0.6  # the mist, and how thick it is half-way
SOFT = 128  # pixels over which one hour, or ground, becomes another

Field = np.ndarray  # signed distance in pixels, below 0 inside


def polygon(x: Field, y: Field, points: list[tuple[float, float]]) -> Field:
    """Signed distance to a polygon (after I. Quilez, 'distance to a polygon'); x, y and points in the same units."""
    distance = np.full(x.shape, np.inf, np.float32)
    inside = np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1]):
        ex, ey, wx, wy = x1 - x0, y1 - y0, x - x0, y - y0
        t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        np.minimum(distance, (wx - ex * t) ** 2 + (wy - ey * t) ** 2, out=distance)
        if y0 != y1:
            inside ^= ((y0 <= y) != (y1 <= y)) & (wx < ex * wy / ey)
    return np.where(inside, -1, 1).astype(np.float32) * np.sqrt(distance)


def _box(x: Field, y: Field, x0: float, x1: float, y0: float, y1: float) -> Field:
    return polygon(x, y, [(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def _star() -> list[tuple[float, float]]:
    turn = np.pi / 5
    return [
        (float(np.sin(i * turn)) * r, -float(np.cos(i * turn)) * r)
        for i in range(10)
        for r in [1.04 if i % 2 == 0 else 0.5]
    ]


# Each kind: its coloured parts, its ink parts and its cream parts, in units of the radius, y downwards.
def _shapes(kind: str, x: Field, y: Field) -> tuple[Field, list[tuple[Field, np.ndarray]]]:
    if kind == "ball":
        band = np.abs(np.hypot(x + 1.1, y + 1.0) - 1.32) - 0.1
        return np.hypot(x, y) - 0.95, [(np.maximum(band, np.hypot(x, y) - 0.95), CREAM)]
    if kind == "star":
        return polygon(x, y, _star()), []
    if kind == "house":
        body = polygon(
            x, y, [(-0.72, -0.12), (-0.98, -0.12), (0, -1.0), (0.98, -0.12), (0.72, -0.12), (0.72, 0.95), (-0.72, 0.95)]
        )
        return body, [(_box(x, y, -0.22, 0.22, 0.3, 0.95), INK), (np.hypot(x, y + 0.28) - 0.2, CREAM)]
    if kind == "tree":
        crown = polygon(
            x, y, [(0, -1.0), (0.62, -0.2), (0.36, -0.2), (0.86, 0.55), (-0.86, 0.55), (-0.36, -0.2), (-0.62, -0.2)]
        )
        return crown, [(_box(x, y, -0.17, 0.17, 0.55, 1.0), INK)]
    if kind == "boat":
        hull = polygon(x, y, [(-1.0, 0.35), (1.0, 0.35), (0.6, 0.95), (-0.6, 0.95)])
        sail = polygon(x, y, [(0.08, -1.0), (0.85, 0.1), (0.08, 0.1)])
        jib = polygon(x, y, [(-0.12, -0.8), (-0.12, 0.1), (-0.72, 0.1)])
        mast = _box(x, y, -0.09, 0.05, -1.0, 0.4)
        return np.minimum(np.minimum(hull, sail), jib), [(mast, INK)]
    if kind == "kite":
        body = polygon(x, y, [(0, -1.0), (0.68, -0.3), (0, 0.62), (-0.68, -0.3)])
        tail = np.maximum(np.abs(x - 0.16 * np.sin(y * 9.0)) - 0.06, np.abs(y - 0.8) - 0.22)
        return body, [(tail, INK)]
    raise ValueError(f"unknown kind {kind!r}")


def _cover(distance: Field) -> Field:
    """Share of a pixel that lies inside, from its signed distance in pixels."""
    return np.clip(0.5 - distance, 0, 1)[..., None]


def _ridge(depth: int) -> float:
    """Where a hill's line lies, in heights of a picture: a picture's own two, then two for each height below it."""
    return (0.66, 0.78)[depth] if depth < 2 else 1.18 + 0.5 * (depth - 2)


@lru_cache(maxsize=512)
def _background(width: int, height: int, time: str, ground: str, hill: int, x0: int, y0: int) -> np.ndarray:
    """Sky and hills of the world without end, from its point x0, y0 on; x0 less than a PERIOD, which it repeats in."""
    y, x = (np.arange(at, at + size, dtype=np.float32) for at, size in ((y0, height), (x0, width)))
    top, low = (np.array(c, np.float32) for c in SKY[time])
    sky = top + (low - top) * np.clip(y / (0.66 * height), 0, 1)[:, None]
    picture = np.repeat(sky[:, None], width, 1)
    depth = max(0, int(2 * (y0 / height - 1.18)))  # hills above it are hidden, but for the last
    while _ridge(depth) * height < y0 + height + 2 * SWELL:
        near = min(depth, 1)
        line = _ridge(depth) * height + SWELL * np.sin(2 * np.pi * (x / PERIOD + hill / 16 + 0.4 * depth)) * (
            1 + 0.4 * near
        )
        colour = np.array(HILLS[ground][depth % 2], np.float32) * np.array(SHADE[time], np.float32)
        # Above the line nothing changes, and below it all is hill: only rows that it crosses are blended.
        first, last = np.searchsorted(y, (line.min() - 1, line.max() + 1))
        cover = _cover(line - y[first:last, None])
        picture[first:last] = picture[first:last] * (1 - cover) + colour * cover
        picture[last:] = colour
        depth += 1
    picture.setflags(write=False)
    return picture


def _land(scene: Scene) -> np.ndarray:
    """The scene without its things; over SOFT pixels it comes out of what lies beyond its border, through mist.

    Without the mist, colours between two hours would be those of things: between dusk and night lies purple.
    """

    def view(time: str, ground: str) -> np.ndarray:
        hill = int(scene.hill * 16)
        return _background(scene.width, scene.height, time, ground, hill, scene.x0 % PERIOD, scene.y0)

    own, border = view(scene.time, scene.ground), scene.border
    if border is None or (border.time, border.ground) == (scene.time, scene.ground):
        return own
    along = scene.width if border.side in ("left", "right") else scene.height
    share = np.clip((np.arange(along, dtype=np.float32) + 0.5) / SOFT, 0, 1)
    share = share * share * (3 - 2 * share)
    share = share[::-1] if border.side in ("right", "bottom") else share
    share = share[None, :, None] if border.side in ("left", "right") else share[:, None, None]
    beyond = view(border.time, border.ground)
    mist = 4 * MIST * share * (1 - share)
    return (beyond + (own - beyond) * share) * (1 - mist) + PALE * mist


def _draw(picture: np.ndarray, thing: Thing) -> None:
    r = thing.radius
    reach = int(r + EDGE + 3)
    x0, x1 = max(0, int(thing.x) - reach), min(picture.shape[1], int(thing.x) + reach + 2)
    y0, y1 = max(0, int(thing.y) - reach), min(picture.shape[0], int(thing.y) + reach + 2)
    y, x = np.mgrid[y0:y1, x0:x1].astype(np.float32)
    x, y = (x + 0.5 - thing.x) / r, (y + 0.5 - thing.y) / r
    body, details = _shapes(thing.kind, x, y)
    whole = body
    for part, _ in details:
        whole = np.minimum(whole, part)
    patch = picture[y0:y1, x0:x1]
    colour = np.array(COLOURS[thing.colour], np.float32)
    for distance, ink in [(whole * r - EDGE, CREAM), (body * r, colour), *((d * r, c) for d, c in details)]:
        cover = _cover(distance)
        patch *= 1 - cover
        patch += ink * cover


def render(scene: Scene) -> np.ndarray:
    """The scene as pixels (height, width, 3), uint8, sRGB."""
    picture = _land(scene).copy()
    for thing in scene.things:
        _draw(picture, thing)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)
