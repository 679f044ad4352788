"""The studio: one model, one thread in which it draws, and the line before it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..defaults import SIDE
from ..loading import starting
from ..pipeline import Rolling, roll
from ..pipeline.space import ran_out
from .draw import Stopped, draw
from .errors import SERVER, Refusal, broken
from .job import Job, recorded, refused_plan
from .line import Line
from .metrics import Metrics
from .pictures import encoded

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("rolling_diffusion.serve")
UNTAKEN = 4  # partial pictures that a slow reader may leave untaken; more are not kept for it


@dataclass(frozen=True)
class Waiting:
    """So many stand before this request, of so many in line."""

    place: int
    length: int


@dataclass(frozen=True)
class Called:
    """The model was called, for the `number`th time of `total`, for one picture."""

    number: int
    total: int


@dataclass(frozen=True)
class Partial:
    """A partial picture, as a file."""

    index: int
    content: bytes


@dataclass(frozen=True)
class Finished:
    """A picture, as a file."""

    seed: int
    content: bytes


Event = Waiting | Called | Partial | Finished


class Studio:
    """pipeline: what draws. name: what callers call it. most: requests in line. offloaded: whether parts of the model
    wait off the GPU, which pipelines around the same parts would confuse. said: what pictures record of the model."""

    def __init__(
        self,
        pipeline: Rolling,
        name: str,
        most: int = 32,
        offloaded: bool = False,
        said: Mapping[str, Any] | None = None,
    ) -> None:
        self.said = {"model": name} if said is None else said
        self.name, self.card, self.created = name, pipeline.card, int(time.time())
        self.pipelines = {None: pipeline} | {start: sibling(pipeline, start, offloaded) for start in ("image", "mask")}
        self.line = Line(most)
        self.metrics = Metrics(lambda: len(self.line))
        self.thread = ThreadPoolExecutor(1, "model")
        self.runs: set[Run] = set()

    def start(self, job: Job) -> Run:
        """Puts a job in line; Refusal if the line is full, or if this model cannot start from a picture."""
        pipeline = self.pipelines[job.start]
        if isinstance(pipeline, Refusal):
            raise pipeline
        run = Run(self, job, pipeline)
        self.runs.add(run)
        return run

    async def close(self) -> None:
        """Every run ends within one call of the model, and the thread with them."""
        for run in list(self.runs):
            run.stop()
        await asyncio.gather(*(run.task for run in self.runs), return_exceptions=True)
        self.thread.shutdown()


def sibling(pipeline: Rolling, start: str, offloaded: bool) -> Rolling | Refusal:
    """The pipeline around the same parts that starts from a picture, or paints in a mask; or why there is none."""
    if offloaded:
        return Refusal("Edits need the whole model on one device: this server was started with offloading.")
    try:
        pipe = starting(pipeline.pipe, start)
    except ValueError as error:
        return Refusal(f"{error}.", param="image")
    pipe.set_progress_bar_config(disable=True)
    return roll(pipe, pipeline.card)


def tokens(pipeline: Rolling, job: Job) -> dict[str, Any]:
    """What a job is made of, as OpenAI counts it: tokens of the prompt, as far as it is read, and of pictures."""
    tokenizer = pipeline.tokenizer
    text = 0 if tokenizer is None else len(tokenizer(job.fields.prompt).input_ids)
    text = min(text, pipeline.card.max_sequence_length)
    picture = job.width * job.height // SIDE**2
    given = picture if job.image is not None else 0
    return {
        "input_tokens": text + given,
        "input_tokens_details": {"text_tokens": text, "image_tokens": given},
        "output_tokens": picture * job.fields.n,
        "total_tokens": text + given + picture * job.fields.n,
    }


class Run:
    """A job in line, then at the model. Iterating over it gives what happens, and raises what goes wrong."""

    def __init__(self, studio: Studio, job: Job, pipeline: Rolling) -> None:
        self.studio, self.job, self.pipeline = studio, job, pipeline
        self.usage: dict[str, Any] = {}  # known when the first picture is
        self.ticket = studio.line.join()
        self.stopped = threading.Event()
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event | Refusal | None] = asyncio.Queue()
        self.task = asyncio.create_task(self._run())

    def stop(self) -> None:
        """Nobody waits any more: the run ends within one call of the model."""
        if not self.task.done() and not self.stopped.is_set():
            self.stopped.set()
            self.ticket.moved.set()
            self.studio.metrics.stopped.inc()

    async def __aiter__(self) -> AsyncIterator[Event]:
        while (event := await self.events.get()) is not None:
            if isinstance(event, Refusal):
                raise event
            yield event

    async def _run(self) -> None:
        started = time.monotonic()
        metrics = self.studio.metrics
        try:
            while self.ticket.place and not self.stopped.is_set():
                self.events.put_nowait(Waiting(self.ticket.place, len(self.studio.line)))
                await self.ticket.move()
            metrics.waited.observe(time.monotonic() - started)
            for number in range(self.job.fields.n):
                if self.stopped.is_set():
                    break
                with metrics.seconds.time():
                    picture = await self.loop.run_in_executor(self.studio.thread, self._draw, number)
                metrics.pictures.inc()
                self.events.put_nowait(picture)
        except Stopped:
            pass
        except Refusal as refusal:
            metrics.failed.inc()
            self.events.put_nowait(refusal)
        except Exception:
            metrics.failed.inc()
            log.exception("a request failed")
            self.events.put_nowait(broken())
        finally:
            self.ticket.leave()
            self.studio.runs.discard(self)
            self.events.put_nowait(None)

    def _draw(self, number: int) -> Finished:
        """In the model's thread: everything that takes time."""

        def tell(event: Event) -> None:
            self.loop.call_soon_threadsafe(self._tell, event)

        def ticked(tick: Any) -> None:
            self.studio.metrics.calls.inc()
            tell(Called(tick.number + 1, tick.total))

        def shown(index: int, image: Image.Image) -> None:
            if self.events.qsize() < UNTAKEN:
                tell(Partial(index, self._file(image)))

        try:
            self.usage = self.usage or tokens(self.pipeline, self.job)  # here: a tokenizer serves one thread at a time
            image = draw(self.pipeline, self.job, number, self.stopped, ticked, shown)
        except (Stopped, Refusal):
            raise
        except ValueError as error:
            raise refused_plan(error) from None
        except Exception as error:
            if ran_out(error):
                raise Refusal("Out of memory: a smaller size needs less.", 500, kind=SERVER) from None
            log.exception("drawing failed")
            raise broken() from None
        record = recorded(self.job, number, self.studio.said)
        return Finished(self.job.seed + number, self._file(image, record))

    def _tell(self, event: Event) -> None:
        if not isinstance(event, Called) or self.events.qsize() < UNTAKEN:
            self.events.put_nowait(event)

    def _file(self, image: Image.Image, record: Mapping[str, Any] | None = None) -> bytes:
        return encoded(image, self.job.fields.output_format, self.job.fields.output_compression, record)
