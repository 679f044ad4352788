"""Answers in OpenAI's form: pictures at once, or as they appear."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .errors import Refusal
from .fields import Edit
from .job import Job
from .studio import Called, Finished, Partial, Run, Waiting


class EventStream(StreamingResponse):
    """Server-sent events of a run, which ends with the connection."""

    def __init__(self, run: Run) -> None:
        super().__init__(events(run), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.run.stop()


async def events(run: Run) -> AsyncIterator[str]:
    """Partial and finished pictures under OpenAI's names; as comments, which clients pass over, the place in line and
    the calls of the model."""
    kind = "image_edit" if isinstance(run.job.fields, Edit) else "image_generation"
    try:
        async for event in run:
            if isinstance(event, Waiting):
                yield f": place {event.place} of {event.length}\n\n"
            elif isinstance(event, Called):
                yield f": call {event.number} of {event.total}\n\n"
            elif isinstance(event, Partial):
                yield sent(f"{kind}.partial_image", run.job, event.content, partial_image_index=event.index)
            else:
                yield sent(f"{kind}.completed", run.job, event.content, seed=event.seed, usage=run.usage)
    except Refusal as refusal:
        yield f"event: error\ndata: {json.dumps(refusal.body)}\n\n"


def sent(name: str, job: Job, content: bytes, **more: Any) -> str:
    data = {"type": name, "b64_json": base64.b64encode(content).decode(), "created_at": int(time.time())}
    return f"event: {name}\ndata: {json.dumps(data | described(job) | more)}\n\n"


def described(job: Job) -> dict[str, Any]:
    """What every picture of a job has in common."""
    said = job.fields
    return {
        "background": "opaque",
        "output_format": said.output_format,
        "quality": {"hd": "high", "standard": "medium"}.get(said.quality, said.quality),
        "size": f"{job.width}x{job.height}",
    }


async def finished(request: Request, run: Run) -> list[Finished]:
    """All pictures of a run; if the connection closes before, the run ends, and so does this, with a Refusal that
    nobody reads."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def pictures() -> list[Finished]:
        return [event async for event in run if isinstance(event, Finished)]

    watch, work = asyncio.create_task(gone()), asyncio.create_task(pictures())
    try:
        await asyncio.wait((watch, work), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Refusal("The connection was closed.", 499)
        return work.result()
    finally:
        run.stop()
        for task in (watch, work):
            task.cancel()
