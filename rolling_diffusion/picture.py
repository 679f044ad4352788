"""The picture of a plan: noise over ticks and blocks on the left, the order on the canvas on the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from .core.plan import Plan

PAPER, INK, MUTED, RULE = (252, 251, 248), (32, 34, 42), (118, 121, 130), (226, 223, 215)
# Clean is light, noise is dark; the order runs from dark to light. Both stay apart in grey and for the colour-blind.
NOISE = ((253, 242, 205), (254, 190, 122), (246, 122, 94), (200, 62, 113), (129, 37, 129), (66, 15, 117), (24, 16, 68))
ORDER = ((58, 30, 105), (61, 78, 138), (45, 112, 142), (33, 144, 141), (53, 183, 121), (144, 215, 67), (244, 228, 90))
UNDECIDED = (140, 146, 158)  # blocks whose place in the order is not known yet
WIDTH, HEIGHT, FINE = 1600, 880, 2  # pixels of the picture; drawn FINE times as large, then averaged down
CHART = (120, 190, 980, 650)  # left, top, right, bottom of the noise chart
CANVAS = (1080, 190, 1540, 650)  # the box that the canvas is fitted into
ROWS, COLUMNS = 230, 430  # most blocks and ticks drawn; a longer plan is sampled evenly


def ramp(anchors: Sequence[tuple[int, int, int]], value: np.ndarray) -> np.ndarray:
    """Colours (..., 3) uint8 for values in 0 to 1, linear between the anchors."""
    stops = np.linspace(0, 1, len(anchors))
    table = np.asarray(anchors, dtype=np.float64)
    return np.stack([np.interp(value, stops, table[:, c]) for c in range(3)], -1).round().astype(np.uint8)


def noise_table(plan: Plan, sigmas: Sequence[float] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ticks (K,), blocks (G,) and the noise (G, K) left after each tick, 1 for full and 0 for clean; where a guide
    takes the draft's place, from its end on.

    sigmas: the plan's S+1 noise levels; without them noise falls evenly with the steps.
    """
    count = min(plan.ticks - plan.first + 1, COLUMNS)
    ticks = np.unique(np.linspace(plan.first, plan.ticks, count).round().astype(int))
    blocks = np.unique(np.linspace(0, len(plan.blocks) - 1, min(len(plan.blocks), ROWS)).round().astype(int))
    levels = np.linspace(1, 0, plan.steps + 1) if sigmas is None else np.asarray(sigmas, dtype=np.float64) / sigmas[0]
    return ticks, blocks, levels[[[plan.index(int(k), int(g)) for k in ticks] for g in blocks]]


def plan_picture(plan: Plan, sigmas: Sequence[float] | None = None, text_tokens: int = 0) -> Image.Image:
    """An RGB picture of the plan, 1600×880 pixels; text_tokens of the prompt count in the cost."""
    page = _Page()
    cells = f"{plan.width} x {plan.height} cells"
    page.text((60, 52), f"Rolling plan, {plan.blocks.name}", 34, INK)
    page.text((60, 104), f"{plan.width * 8} x {plan.height * 8} pixels = {cells}, {_shape(plan)}", 20, MUTED)
    _chart(page, plan, sigmas)
    _canvas(page, plan)
    if not plan.late:
        _legend(page, (CANVAS[0], 712), ORDER, "first", "last")
    cost, draft = plan.cost(text_tokens), "by a guide" if plan.first else "of them draft"
    facts = (
        (f"{cost.calls:,}", "model calls" + (f", {cost.ticks:,} of them ticks" if cost.calls > cost.ticks else "")),
        (f"{plan.steps}", "steps per block" + (f", {plan.draft} {draft}" if plan.draft else "")),
        (f"{plan.lag}", "lag, in ticks"),
        (f"{cost.peak_moving_tokens:,}", "tokens in motion, at most"),
        (f"{cost.peak_visible_tokens:,}", "tokens attended to, at most"),
        (f"{cost.relative:.2f} x", "token evaluations of full sampling"),
    )
    for i, (number, name) in enumerate(facts):
        left = 60 + i * 250
        page.line([(left, 772), (left + 222, 772)], RULE, 2)
        page.text((left, 786), number, 30, INK)
        page.text((left, 828), name, 15, MUTED)
    return page.finished()


def _shape(plan: Plan) -> str:
    blocks, first = plan.blocks, plan.blocks[0]
    if len(blocks) == 1:
        return "one block: ordinary sampling"
    return f"{len(blocks):,} blocks of {first.width} x {first.height}, window {plan.window}, overlap {plan.overlap}"


def _chart(page: _Page, plan: Plan, sigmas: Sequence[float] | None) -> None:
    left, top, right, bottom = CHART
    ticks, blocks, noise = noise_table(plan, sigmas)
    colours = ramp(NOISE, noise)
    page.text((left, top - 38), "Noise of each block after each tick", 20, INK)
    xs, ys = np.linspace(left, right, len(ticks) + 1), np.linspace(top, bottom, len(blocks) + 1)
    gap = 1 if ys[1] - ys[0] > 9 else 0
    for row in range(len(blocks)):
        for column in range(len(ticks)):
            page.box((xs[column], ys[row], xs[column + 1], ys[row + 1] - gap), tuple(colours[row, column]))
    middle_x, middle_y = (xs[:-1] + xs[1:]) / 2, (ys[:-1] + ys[1:]) / 2
    for tick in _marks(int(ticks[0]), int(ticks[-1])):
        page.text((float(np.interp(tick, ticks, middle_x)), bottom + 10), f"{tick:,}", 15, MUTED, "mt")
    for number in _marks(1, int(blocks[-1]) + 1):
        page.text((left - 12, float(np.interp(number, blocks + 1, middle_y))), f"{number:,}", 15, MUTED, "rm")
    page.text(((left + right) / 2, bottom + 36), "tick", 17, INK, "mt")
    page.text((60, (top + bottom) / 2), "block", 17, INK, turn=90)
    if plan.draft > plan.first:
        x = float(np.interp(plan.draft, ticks, xs[1:]))
        page.line([(x, top), (x, bottom - gap)], PAPER, 2)
        page.text((x + 12, bottom - 60), "end of draft", 15, PAPER, turn=90)
    _legend(page, (left, 712), NOISE[::-1], "noise", "clean")


def _canvas(page: _Page, plan: Plan) -> None:
    left, top, right, bottom = CANVAS
    scale = min((right - left) / plan.width, (bottom - top) / plan.height)
    blocks = plan.blocks
    page.text((left, top - 38), "Order of the blocks on the canvas", 20, INK)
    if plan.late:
        page.text((left, bottom + 10), "decided at the end of the draft", 17, INK)
    if blocks.size * scale <= 5:  # too small for a gap between them
        _mosaic(page, plan, scale)
        return
    colours = ramp(ORDER, np.linspace(0, 1, max(2, len(blocks))))
    if plan.late:
        colours = np.broadcast_to(np.array(UNDECIDED, np.uint8), colours.shape)
    small = min(min(b.width, b.height) for b in blocks) * scale
    path = []
    for number, (block, colour) in enumerate(zip(blocks, colours, strict=False)):
        x, y = left + block.left * scale, top + block.top * scale
        gap = 1 if small > 5 else 0
        page.box((x, y, x + block.width * scale - gap, y + block.height * scale - gap), tuple(colour))
        path.append((x + block.width * scale / 2, y + block.height * scale / 2))
        if small > 22 and not plan.late:
            dark = colour @ (0.299, 0.587, 0.114) < 140
            page.text(path[-1], f"{number + 1}", min(22, int(small * 0.5)), PAPER if dark else INK, "mm")
    if blocks.tiled and small <= 22 and len(blocks) <= 1000 and not plan.late:
        page.line(path, PAPER, 1)


def _mosaic(page: _Page, plan: Plan, scale: float) -> None:
    """The order of many small blocks: each pixel takes the colour of the block in its middle."""
    rows, columns = (max(1, round(cells * scale)) for cells in (plan.height, plan.width))
    ys = ((np.arange(rows) + 0.5) / rows * plan.height).astype(int).tolist()
    xs = ((np.arange(columns) + 0.5) / columns * plan.width).astype(int).tolist()
    places = np.array([[plan.blocks.at(y, x) for x in xs] for y in ys])
    colours = ramp(ORDER, places / max(1, len(plan.blocks) - 1))
    page.paste(CANVAS[:2], np.broadcast_to(np.array(UNDECIDED, np.uint8), colours.shape) if plan.late else colours)


def _legend(page: _Page, at: tuple[float, float], anchors: Sequence[tuple[int, int, int]], low: str, high: str) -> None:
    x, y = at
    page.text((x, y + 7), low, 15, MUTED, "lm")
    start = x + 52
    for i, colour in enumerate(ramp(anchors, np.linspace(0, 1, 180))):
        page.box((start + i, y, start + i + 1, y + 14), tuple(colour))
    page.text((start + 190, y + 7), high, 15, MUTED, "lm")


def _marks(first: int, last: int, most: int = 12) -> list[int]:
    """`first` and the multiples of a round number up to `last`, about `most` of them at the most."""
    step = next(n for e in range(12) for n in (10**e, 2 * 10**e, 5 * 10**e) if last <= most * n)
    return sorted({first, *range(-(-max(first, 1) // step) * step, last + 1, step)})


class _Page:
    """A drawing in page pixels, kept FINE times as large until it is finished."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def box(self, box: Sequence[float], colour: tuple[int, ...]) -> None:
        x0, y0, x1, y1 = (round(v * FINE) for v in box)
        self.draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), fill=colour)

    def paste(self, at: tuple[int, int], pixels: np.ndarray) -> None:
        """A picture (H, W, 3), uint8, with its top left corner there."""
        large = pixels.repeat(FINE, axis=0).repeat(FINE, axis=1)
        self.image.paste(Image.fromarray(large), (at[0] * FINE, at[1] * FINE))

    def line(self, points: Sequence[tuple[float, float]], colour: tuple[int, ...], width: float) -> None:
        self.draw.line([(x * FINE, y * FINE) for x, y in points], fill=colour, width=round(width * FINE), joint="curve")

    def text(
        self,
        at: tuple[float, float],
        text: str,
        size: int,
        colour: tuple[int, ...],
        anchor: str = "lt",
        turn: int = 0,
    ) -> None:
        font = ImageFont.load_default(size * FINE)
        if not turn:
            self.draw.text((at[0] * FINE, at[1] * FINE), text, fill=colour, font=font, anchor=anchor)
            return
        x0, y0, x1, y1 = (int(v) for v in font.getbbox(text))
        label = Image.new("L", (x1 - x0, y1 - y0), 0)
        ImageDraw.Draw(label).text((-x0, -y0), text, fill=255, font=font)
        label = label.rotate(turn, expand=True)
        corner = (round(at[0] * FINE - label.width / 2), round(at[1] * FINE - label.height / 2))
        self.image.paste(colour, (*corner, corner[0] + label.width, corner[1] + label.height), label)

    def finished(self) -> Image.Image:
        return self.image.reduce(FINE)
