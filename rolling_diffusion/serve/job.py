"""A job: a request that was found good, with the plan of each of its pictures."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..core.plan import Plan
from ..defaults import CELL, LAST_SEED, SIDE, TOKEN, Card, nearest_side, plan_for
from ..recording import record
from .errors import Refusal, wrong_value
from .fields import QUALITY, Edit, Generation

if TYPE_CHECKING:
    from PIL import Image

# Fields that `generate` has under the same names.
AS_GENERATE = (
    *("prompt", "negative_prompt", "order", "window", "overlap", "draft", "lookahead", "extrapolation", "lag"),
    *("cfg", "steps"),
)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. calls: of the model, for one picture."""

    pixels: int
    steps: int = 100
    n: int = 10
    calls: int = 1000

    @classmethod
    def of(cls, card: Card) -> Limits:
        """Four times the area that the model was made for, and twice its steps where those are many."""
        return cls(4 * card.size**2, max(cls.steps, 2 * card.steps))


@dataclass(frozen=True)
class Job:
    """fields: as they were said. steps, width, height (pixels), seed of the first picture: what follows from them."""

    fields: Generation
    card: Card
    steps: int
    width: int
    height: int
    seed: int
    image: Image.Image | None = None
    mask: Image.Image | None = None

    @property
    def start(self) -> str | None:
        """What the picture starts from, as `pipeline.load` names it."""
        return None if self.image is None else "image" if self.mask is None else "mask"

    @property
    def strength(self) -> float | None:
        """How much is drawn anew; None for the pipeline's own. What is masked is: all of it."""
        said = self.fields.strength if isinstance(self.fields, Edit) else None
        return 1.0 if said is None and self.mask is not None else said

    def plan(self, number: int = 0, steps: int | None = None) -> Plan:
        """Of picture `number`; steps: that a picture to start from leaves. ValueError as `plan_for`."""
        said = self.fields
        return plan_for(
            self.card,
            self.height // CELL,
            self.width // CELL,
            self.steps if steps is None else steps,
            order=said.order,
            window=said.window,
            overlap=said.overlap,
            persistence=said.attention_persistence,
            draft=said.draft,
            lookahead=said.lookahead,
            lag=said.lag,
            seed=self.seed + number,
            multiple=TOKEN,
            extrapolation=said.extrapolation,
            guide="auto" if self.image is None else False,
        )


def recorded(job: Job, number: int, model: Mapping[str, Any]) -> dict[str, Any]:
    """What the file of picture `number` says of it, in the words of `generate`. model: what is said of the model.

    Of pictures to start from is known that they were there, and no name: `generate --from` asks for them.
    """
    fields, plan = job.fields, job.plan(number)
    said = {name: getattr(fields, name) for name in AS_GENERATE if name in fields.model_fields_set}
    said |= {"seed": job.seed + number, **model}
    if "attention_persistence" in fields.model_fields_set:
        said["persistence"] = fields.attention_persistence
    if fields.lookahead == "auto":
        said.pop("lookahead", None)
    if job.steps != job.card.steps:
        said["steps"] = job.steps
    if fields.sides is not None:
        said |= {"width": job.width, "height": job.height}
    said |= {name: "what was sent" for name, there in (("image", job.image), ("mask", job.mask)) if there is not None}
    if job.strength is not None:
        said["strength"] = job.strength
    followed = {"width": job.width, "height": job.height, "steps": job.steps, "window": plan.window}
    return record(__version__, said, followed | {"overlap": plan.overlap} | said)


def make_job(
    fields: Generation,
    card: Card,
    limits: Limits,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
) -> Job:
    """A job of what a request says; Refusal, in one sentence, for what cannot be done."""
    if fields.n > limits.n:
        raise wrong_value("n", f"it must be at most {limits.n}", "integer_above_max_value")
    for name in ("partial_images", "frames"):
        if getattr(fields, name) and not fields.stream:
            raise wrong_value(name, "partial pictures are streamed, so set stream to true")
    if fields.partial_images and fields.frames:
        raise wrong_value("frames", "it stands in place of partial_images, so leave one out")
    if fields.output_compression is not None and fields.output_format == "png":
        raise wrong_value("output_compression", "a png is never lossy, so take jpeg or webp")
    if mask is not None and image is not None and mask.size != image.size:
        raise wrong_value("mask", "it must be as large as the picture")
    steps = fields.steps or max(1, round(card.steps * QUALITY[fields.quality]))
    if steps > limits.steps:
        raise wrong_value("steps", f"this server takes at most {limits.steps} steps")
    width, height = _size(fields, card, limits, image)
    seed = secrets.randbelow(2**32 - limits.n) if fields.seed is None else fields.seed
    if seed + fields.n - 1 > LAST_SEED:
        raise wrong_value("seed", f"it leaves no seeds for {fields.n} pictures")
    job = Job(fields, card, steps, width, height, seed, image, mask)
    try:
        calls = job.plan().ticks
    except ValueError as error:
        raise refused_plan(error) from None
    if calls > limits.calls:
        raise Refusal(
            f"The plan takes {calls:,} calls of the model, and this server takes at most {limits.calls:,}: take a "
            "larger window, or fewer steps.",
            param="window",
            code="invalid_value",
        )
    return job


def refused_plan(error: ValueError) -> Refusal:
    """What does not fit together, with the parameter that the sentence begins with, if it does."""
    sentence = str(error)
    first = sentence.split(" ", 1)[0]
    return Refusal(f"{sentence}.", param=first if first in Edit.model_fields else None, code="invalid_value")


def _size(fields: Generation, card: Card, limits: Limits, image: Image.Image | None) -> tuple[int, int]:
    if fields.sides is not None:
        width, height = fields.sides
    elif image is None:
        width = height = card.size
    else:
        width, height = map(nearest_side, image.size)
    if not width or not height or width % SIDE or height % SIDE:
        raise wrong_value("size", f"both sides must be multiples of {SIDE}")
    if width * height > limits.pixels:
        raise wrong_value("size", f"{width}x{height} has more than the {limits.pixels:,} pixels that this server draws")
    return width, height
