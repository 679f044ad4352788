"""What may be seen of a picture while it appears: finished blocks sharp, the rest blurred by its noise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .defaults import CELL

if TYPE_CHECKING:
    from PIL import Image

    from .core.order import Block
    from .core.plan import Plan

PAPER = (243, 240, 232)
BLUR = 0.75 * CELL  # pixels, at equal powers of picture and noise: about what is finer than where their spectra meet


class Veil:
    """How much noise lies over each block of a run. Told of every tick: a block may come and go between two frames."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.levels: dict[Block, float] = {}

    def tell(self, tick: Any) -> None:
        self.plan = tick.plan
        self.levels.update(dict.fromkeys(tick.plan.blocks[: tick.blocks[0].index], 0.0))  # they finish in their order
        self.levels.update(zip(tick.blocks, tick.sigmas))

    def over(self, image: Image.Image) -> Image.Image:
        """What may be seen of the model's guess at the picture."""
        assert self.plan is not None
        return unveiled(image, self.plan, self.levels)


def unveiled(image: Image.Image, plan: Plan, levels: Mapping[Block, float]) -> Image.Image:
    """The picture as far as its noise lets it show: finished blocks sharp, others blurred by their noise (0 to 1).

    Blocks without a level are left as bare paper.

    The model's guess shows detail that noise still hides and later steps may change. A picture's spectrum falls as 1/f²
    and that of noise is flat: they meet at a wavelength in proportion to sigma / (1 - sigma), and what is finer is
    blurred.
    """
    from PIL import Image, ImageDraw, ImageFilter

    def area(blocks: Iterable[Block]) -> Image.Image:
        mask = Image.new("L", image.size)
        for block in blocks:
            top, left = block.top * CELL, block.left * CELL
            edges = (left, top, left + block.width * CELL - 1, top + block.height * CELL - 1)
            ImageDraw.Draw(mask).rectangle(edges, fill=255)
        return mask

    seen = image
    for level in sorted({*levels.values()}, reverse=True):
        radius = min(BLUR * level / max(1 - level, 0.01), min(image.size) / 4)
        soft = area(block for block in levels if levels[block] <= level).filter(ImageFilter.GaussianBlur(CELL))
        seen = Image.composite(image.filter(ImageFilter.GaussianBlur(radius)), seen, soft)
    seen.paste(PAPER, mask=area(block for block in plan.blocks if block not in levels))
    return seen
