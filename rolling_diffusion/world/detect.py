"""Exact detectors: which objects a picture shows, of which kind and colour, and where.

Every object is one saturated colour inside a cream edge, and no ground or sky comes near those colours. So pixels are
sorted by colour, joined into islands, and each island's silhouette is compared with the renderer's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from .render import render
from .scene import COLOURS, KINDS, Scene, Thing

NEAR = 62.0  # RGB distance within which a pixel has an object's colour
SMALLEST = 200  # pixels: smaller islands are specks at the edges between colours
GRID = 20  # silhouettes are compared on GRID × GRID cells of their boxes
ALIKE = 0.62  # intersection over union that the best silhouette must reach to be named
NAMES = list(COLOURS)
PALETTE = np.array(list(COLOURS.values()), np.float32)


@dataclass(frozen=True)
class Found:
    """An object in a picture. kind None: something is drawn that is none of the kinds. x, y: centre in pixels."""

    kind: str | None
    colour: str
    x: float
    y: float


@lru_cache(maxsize=1)
def _table() -> np.ndarray:
    """(64, 64, 64): nearest palette index for each colour at 6 bits a channel, -1 where none is near."""
    grid = np.stack(np.meshgrid(*[np.arange(64) * 4.0 + 2] * 3, indexing="ij"), -1)
    distance = np.stack([((grid - c) ** 2).sum(-1) for c in PALETTE], -1)
    return np.where(distance.min(-1) < NEAR**2, distance.argmin(-1), -1).astype(np.int8)


def colour_map(picture: np.ndarray) -> np.ndarray:
    """(H, W) of indices into the palette, -1 where no object colour is near; picture (H, W, 3) uint8."""
    r, g, b = np.moveaxis(picture >> 2, -1, 0)
    return _table()[r, g, b]


def silhouette(mask: np.ndarray) -> np.ndarray:
    """(GRID, GRID): how full each cell of the mask's own box is."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
    return np.asarray(
        ndimage.zoom(box, (GRID / box.shape[0], GRID / box.shape[1]), order=1, grid_mode=True, mode="nearest")
    )


@lru_cache(maxsize=1)
def _templates() -> dict[str, list[tuple[np.ndarray, float]]]:
    """For each kind: silhouette and width over height, as drawn at three sizes."""
    templates = {}
    for kind in KINDS:
        masks = [
            _islands(render(Scene(96, 96, "day", "snow", (Thing(kind, "red", 48, 48, r),))))[0][1] for r in (24, 26, 28)
        ]
        templates[kind] = [(silhouette(m), _aspect(m)) for m in masks]
    return templates


def _aspect(mask: np.ndarray) -> float:
    return float(mask.any(0).sum() / mask.any(1).sum())


def _islands(picture: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(colour index, (H, W) mask) of each island. Parts less than 8 pixels apart belong together: a boat's sails."""
    colours, found = colour_map(picture), []
    for index in range(len(NAMES)):
        mask = colours == index
        if mask.sum() < SMALLEST:
            continue
        mask = ndimage.binary_opening(mask, np.ones((2, 2)))
        (rows, columns) = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        if not len(rows):
            continue
        top, left = max(0, rows[0] - 5), max(0, columns[0] - 5)
        near = mask[top : rows[-1] + 6, left : columns[-1] + 6]
        joined = ndimage.binary_dilation(near, iterations=4)
        labels = np.empty(near.shape, np.int32)
        count = int(ndimage.label(joined, output=labels))  # type: ignore[arg-type]
        for island in range(1, count + 1):
            part = np.zeros_like(mask)
            part[top : rows[-1] + 6, left : columns[-1] + 6] = near & (labels == island)
            if part.sum() >= SMALLEST:
                found.append((index, part))
    return found


def classify(mask: np.ndarray) -> str | None:
    """The kind whose silhouette a mask resembles most, None if none well enough."""
    shape, aspect = silhouette(mask), _aspect(mask)
    best, name = ALIKE, None
    for kind, templates in _templates().items():
        for template, expected in templates:
            overlap = np.minimum(shape, template).sum() / np.maximum(shape, template).sum()
            alike = overlap * min(aspect / expected, expected / aspect) ** 0.5
            if alike > best:
                best, name = alike, kind
    return name


def detect(picture: np.ndarray) -> list[Found]:
    """All objects in a picture (H, W, 3), uint8, sRGB."""
    found = []
    for index, mask in _islands(picture):
        ys, xs = np.nonzero(mask)
        y, x = (ys.min() + ys.max()) / 2, (xs.min() + xs.max()) / 2
        found.append(Found(classify(mask), NAMES[index], float(x), float(y)))
    return found
